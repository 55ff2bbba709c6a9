"""Losses other than the negative log-likelihood of whole segmentations.

Of the same exact posterior, they ask for other things: "marginal" that the label of every position
is probable, "boundary" that segments start where they should, "softmax_margin" that wrong labels
are less probable by more, the more they cost. The first two take one forward-backward, and in the
backward pass one product with the Hessian of log Z; the third is log Z of another problem.

References
----------
S. Kakade, Y. W. Teh and S. T. Roweis, An Alternate Objective Function for Markovian Fields, ICML
2002 (the sum of the log marginals).
K. Gimpel and N. A. Smith, Softmax-Margin CRFs: Training Log-Linear Models with Cost Functions,
NAACL 2010.
T.-Y. Lin, P. Goyal, R. Girshick, K. He and P. Dollár, Focal Loss for Dense Object Detection, ICCV
2017.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.inference.expectations import centered, position_marginals, start_marginals
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.problem.potentials import Potentials, explicit_start, score_segments
from flash_semicrf.problem.segments import SegmentTable, table_to_labels
from flash_semicrf.problem.validation import check_potentials

__all__ = ["LOSSES", "Loss", "boundary_loss", "marginal_loss", "softmax_margin_loss"]

Loss: TypeAlias = Literal["likelihood", "marginal", "boundary", "softmax_margin", "focal"]
LOSSES = ("likelihood", "marginal", "boundary", "softmax_margin", "focal")

_FLOOR = 1e-10
"""Probabilities below it count as this one, and their gradient is divided by it: as running sums,
marginals are known to some 1e-12, and the reciprocal of a smaller one would be noise. A model that
is so sure of something wrong learns little from it; the likelihood has no such limit."""


def marginal_loss(
    potentials: Potentials,
    gold: SegmentTable,
    weight: Tensor | None = None,
    *,
    focus: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Negative log-probability of the label of every position, summed over positions.

        loss = - sum_t weight_t (1 - P_t)^focus log P_t,    P_t = P(the label at t is gold | x)

    Parameters
    ----------
    potentials : Potentials
    gold : SegmentTable
        Segments that tile every sequence.
    weight : Tensor of shape (B, T), optional
        Of positions, >= 0; 1 by default.
    focus : float, default=0.0
        Exponent, >= 0, by which positions that are right already count less.
    backend : str
        As for `flash_semicrf.log_partition`.

    Returns
    -------
    float64 Tensor of shape (B,)
        >= 0, in nats; differentiable once in every parameter.

    Raises
    ------
    TypeError, ValueError
        As for `flash_semicrf.log_partition`.

    Examples
    --------
    >>> from flash_semicrf import Segment
    >>> from flash_semicrf.problem.segments import segments_to_table
    >>> zeros = Potentials(
    ...     torch.zeros(1, 3, 2), torch.zeros(2, 2), torch.zeros(3, 2), torch.tensor([3])
    ... )
    >>> gold = segments_to_table([[Segment(0, 2, 1)]])
    >>> round(float(marginal_loss(zeros, gold).div(3).neg().exp()), 6)  # two equal labels
    0.5
    """
    p = explicit_start(centered(check_potentials(potentials)))
    labels = table_to_labels(gold, p.batch_size, p.num_positions)
    marginals = position_marginals(p, backend)
    right = marginals.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return _summed(right, labels >= 0, weight, focus)


def boundary_loss(
    potentials: Potentials,
    gold: SegmentTable,
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-probability of what starts at every position, summed over positions.

    That is the label of the segment that starts there, or that none does.

    Parameters
    ----------
    potentials, gold, weight, backend
        As for `marginal_loss`.

    Returns
    -------
    float64 Tensor of shape (B,)
        >= 0, in nats; differentiable once in every parameter.

    Raises
    ------
    TypeError, ValueError
        As for `flash_semicrf.log_partition`.
    """
    p = explicit_start(centered(check_potentials(potentials)))
    marginals = start_marginals(p, backend)
    starts = torch.full(marginals.shape[:2], -1, device=p.device)
    starts[gold.sequence, gold.start] = gold.label
    some = marginals.gather(2, starts.clamp(min=0)[..., None])[..., 0]
    right = torch.where(starts >= 0, some, 1.0 - marginals.sum(-1))
    inside = torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]
    return _summed(right, inside, weight)


def softmax_margin_loss(
    potentials: Potentials,
    gold: SegmentTable,
    cost: Tensor | float = 1.0,
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood among segmentations that are preferred by what they cost.

        loss = log sum_y exp(score(y) + cost(y)) - score(gold)

    Parameters
    ----------
    potentials, gold, weight, backend
        As for `marginal_loss`; the weight of a position multiplies its costs.
    cost : float, or Tensor of shape (C, C), default=1.0
        ``cost[true, predicted]`` of each position, >= 0; its diagonal is not read. A high row makes
        the model miss fewer positions of a label, a high column give fewer false alarms.

    Returns
    -------
    float64 Tensor of shape (B,)
        >= 0, in nats; differentiable in every parameter.

    Raises
    ------
    TypeError, ValueError
        As for `flash_semicrf.log_partition`.
    """
    p = potentials
    labels = table_to_labels(gold, p.batch_size, p.num_positions)
    costs = torch.as_tensor(cost, dtype=p.dtype, device=p.device)
    costs = costs.expand(p.num_labels, p.num_labels)
    costs = costs * (1.0 - torch.eye(p.num_labels, dtype=p.dtype, device=p.device))
    added = torch.where(labels[..., None] >= 0, costs[labels.clamp(min=0)], 0.0)
    if weight is not None:
        added = added * weight[..., None].to(added)
    log_z = log_partition(p.replace(scores=p.scores + added), backend)
    return log_z - score_segments(p, gold)


def _summed(
    probability: Tensor, counted: Tensor, weight: Tensor | None, focus: float = 0.0
) -> Tensor:
    """Sum over positions (B, T) of -weight (1 - P)^focus log P, of those that are counted."""
    known = probability.detach().clamp(_FLOOR, 1.0)
    log_p = known.log() + (probability - probability.detach()) / known
    loss = -log_p
    if focus:
        loss = loss * (1.0 - probability).clamp(min=0.0) ** focus
    if weight is not None:
        loss = loss * weight.to(loss)
    return torch.where(counted, loss, 0.0).sum(1)

"""Posterior marginals of a segmentation, and the expectations that follow from them.

The score is linear in its parameters, so its expectation is their inner product with the expected
counts: each marginal is the expected count of one parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials, accumulator_dtype, first_term

__all__ = ["SegmentMarginals", "expected_score", "expected_segments", "fold_marginals"]

IMPOSSIBLE = 1e-12
"""Bound of rounding errors in position marginals, which are running sums."""


MASK = 1e4
"""Scores below -MASK are masks that stand for -inf."""


class SegmentMarginals(NamedTuple):
    """Posterior probabilities and expected counts of a batch of sequences.

    Attributes
    ----------
    position : Tensor of shape (B, T, C)
        P(the segment that covers position t has label c); sums to 1 over labels.
    start : Tensor of shape (B, T, C)
        P(a segment of label c starts at position t).
    end : Tensor of shape (B, T, C)
        P(a segment of label c has its last position at t).
    transition : float64 Tensor of shape (B, C, C) or (B, K, C, C), or None
        Expected number of times that c_dst follows c_src (by the duration of the segment arrived
        in, if the transitions are); the first segment follows nothing and is not counted.
    duration : float64 Tensor of shape (B, K, C), or None
        Expected number of segments of label c that last k positions, at row k-1. Where the label
        has a duration tail, row K-1 counts those of K positions and of more.
    tail : float64 Tensor of shape (B, C), or None
        Expected number of positions beyond the K-th of their segment; 0 without a duration tail.
    segment : Tensor of shape (B, T, K, C), or None
        P(a segment of label c starts at position t and lasts k positions), at ``[:, t, k - 1, c]``;
        the last row counts those of K positions and of more. Of problems with segment scores.
    change : Tensor of shape (B, T, C, C), or None
        P(a segment of c_dst that follows c_src starts at position t). Of problems with transition
        scores.
    """

    position: Tensor
    start: Tensor
    end: Tensor
    transition: Tensor | None = None
    duration: Tensor | None = None
    tail: Tensor | None = None
    segment: Tensor | None = None
    change: Tensor | None = None

    @property
    def boundary(self) -> Tensor:
        """P(some segment starts at position t), shape (B, T)."""
        return self.start.sum(-1)


def expected_segments(marginals: SegmentMarginals) -> Tensor:
    """Expected number of segments of each label, float64 Tensor of shape (B, C)."""
    return marginals.start.sum(1, dtype=accumulator_dtype(marginals.start.device))


def inner_product(values: Tensor, counts: Tensor, noise: float = 0.0) -> Tensor:
    """Sum of values times expected counts for each sequence, (B,), in float64.

    Parameters
    ----------
    values : Tensor of shape (B, ...) or (...)
        -inf times 0 counts as 0, as do the values of padding.
    counts : Tensor of shape (B, ...)
        >= 0.
    noise : float
        Counts up to this are treated as 0 for values that forbid or mask.
    """
    values, counts = values.detach(), counts.detach()
    if counts.device.type == "cpu":
        # numpy, for the reason that `flash_semicrf.problem.validation.extremes` gives.
        value, count = values.numpy(), counts.numpy().astype(np.float64, copy=False)
        is_noise = (count <= noise) & (value < -MASK)
        product = np.where(is_noise | (count == 0) | (value == -np.inf), 0.0, value) * count
        forbidden = ((value == -np.inf) & (count > noise)).reshape(len(count), -1).any(1)
        total = np.where(forbidden, -np.inf, product.reshape(len(count), -1).sum(1))
        return torch.from_numpy(total)
    wide = accumulator_dtype(counts.device)
    values, counts = values.to(wide), counts.to(wide)
    nothing = (counts <= noise) & (values < -MASK)
    nothing = nothing | (counts == 0) | (values == -torch.inf)
    products = torch.where(nothing, 0.0, values) * counts
    dead = ((values == -torch.inf) & (counts > noise)).flatten(1).any(1)
    return products.flatten(1).sum(1).masked_fill(dead, -torch.inf)


def expected_score(potentials: Potentials, marginals: SegmentMarginals) -> Tensor:
    """Expected score, by the given potentials, under the distribution of given marginals.

    Parameters
    ----------
    potentials : Potentials
        Of the same problem, or of another on the same sequences.
    marginals : SegmentMarginals
        Including counts. For (K, C, C) transitions `potentials` needs ``initial_scores``: the terms
        of first segments depend on the duration, which the marginals do not contain.

    Returns
    -------
    float64 Tensor of shape (B,)
        Without gradient; -inf if a segmentation of positive probability is forbidden.

    Raises
    ------
    ValueError
        If the marginals have no counts, or transitions by duration come without initial scores.

    Examples
    --------
    >>> from flash_semicrf.inference.log_partition import log_partition
    >>> from flash_semicrf.inference.posterior import segment_marginals
    >>> from flash_semicrf.testing import random_problem
    >>> problem = random_problem(batch_size=1)
    >>> entropy = log_partition(problem) - expected_score(problem, segment_marginals(problem))
    >>> bool(entropy > 0)
    True
    """
    p, m = potentials, marginals
    if m.transition is None or m.duration is None:
        raise ValueError("`marginals` must hold expected counts; got counts=False.")
    given = p.parameters()
    attached = {"segment_scores": m.segment, "transition_scores": m.change}
    for name, counts in attached.items():
        if name in given and counts is None:
            raise ValueError(
                f"`marginals` must be of a problem with `{name}`, as `potentials` is: their "
                "expectation needs counts by position. Give that problem zeros."
            )
    initial = first_term(p)
    if initial.dim() == 2:
        raise ValueError("`potentials` with (K, C, C) transitions must have `initial_scores`.")
    total = inner_product(p.scores, m.position, IMPOSSIBLE)
    total = total + inner_product(p.duration_bias, m.duration)
    total = total + inner_product(p.transition, m.transition)
    if m.tail is not None:
        no_tail = torch.full_like(p.duration_bias[0], -torch.inf)
        total = total + inner_product(
            no_tail if p.duration_tail is None else p.duration_tail, m.tail
        )
    total = total + inner_product(initial, m.start[:, 0])
    for scores, marginal in ((p.start_scores, m.start), (p.end_scores, m.end)):
        if scores is not None:
            total = total + inner_product(scores, marginal)
    for name, counts in attached.items():
        if counts is not None and name in given:
            total = total + inner_product(given[name], counts)
    if p.final_scores is not None:
        last = m.end[torch.arange(p.batch_size, device=p.device), p.lengths - 1]
        total = total + inner_product(p.final_scores, last)
    return total


def fold_marginals(marginals: SegmentMarginals, num_labels: int) -> SegmentMarginals:
    """Marginals of a constrained problem for the C labels of the original one."""
    folded = {}
    for name, value in marginals._asdict().items():
        if value is not None:
            value = value.unflatten(-1, (-1, num_labels)).sum(-2)
        if value is not None and name in ("transition", "change"):
            value = value.unflatten(-2, (-1, num_labels)).sum(-3)
        folded[name] = value
    return SegmentMarginals(**folded)

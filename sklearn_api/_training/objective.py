"""The loss of each sequence, or crop, of a batch, as `SemiCRFSegmenter` is told to compute it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.nn.objectives import Loss, boundary_loss, marginal_loss, softmax_margin_loss
from flash_semicrf.problem.constraints import constrain
from flash_semicrf.problem.flags import Validate
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._training.crop_likelihood import crop_loss, known_ends

__all__ = ["Objective", "losses_of"]


class Objective(NamedTuple):
    """Parameters of `SemiCRFSegmenter` that say what is minimised."""

    loss: Loss = "likelihood"
    margin_cost: float = 1.0
    focus: float = 2.0


def losses_of(
    objective: Objective,
    problem: Potentials,
    gold: SegmentTable,
    crop: Tensor | None,
    weights: Tensor | None,
    validate: Validate,
) -> Tensor:
    """Loss of each sequence or crop, in nats.

    Parameters
    ----------
    objective : Objective
    problem : Potentials
        Of the sequences, or of the widened crops.
    gold : SegmentTable
        Segments that tile them.
    crop : int64 Tensor of shape (B, 4), optional
        Last two columns: `held_start` and `held_end` of
        `sklearn_api._training.crop_likelihood.known_ends`.
    weights : float64 Tensor of shape (B, T), optional
        Of positions. The likelihood is of a whole: they act on it through their mean.
    validate : {"auto", "values", "shapes"}
        As for `flash_semicrf.log_partition`.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable.
    """
    own = None if crop is None else _own_positions(problem, crop)
    if objective.loss != "likelihood":
        return _by_positions(objective, problem, gold, crop, _product(own, weights))
    if crop is None:
        nll = log_partition(problem, validate=validate) - score_segments(problem, gold)
    else:
        nll = crop_loss(problem, gold, crop)
    if weights is None:
        return nll
    counted = problem.lengths if own is None else own.sum(1)
    return nll * (_product(own, weights).sum(1) / counted)


def _by_positions(
    objective: Objective,
    problem: Potentials,
    gold: SegmentTable,
    crop: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """A loss that is a sum over positions, given what is known at the ends of crops."""
    if crop is not None:
        ends = (problem.lengths, crop[:, 2], crop[:, 3], problem.num_labels)
        problem = constrain(problem, known_ends(gold, *ends))
    if objective.loss == "softmax_margin":
        return softmax_margin_loss(problem, gold, objective.margin_cost, weights)
    if objective.loss == "boundary":
        return boundary_loss(problem, gold, weights)
    focus = objective.focus if objective.loss == "focal" else 0.0
    return marginal_loss(problem, gold, weights, focus=focus)


def _own_positions(problem: Potentials, crop: Tensor) -> Tensor:
    """Positions of a widened crop that no other crop has, bool (B, T)."""
    position = torch.arange(problem.num_positions, device=problem.device)
    first = (crop[:, 2] - 1).clamp(min=0)
    stop = problem.lengths - (crop[:, 3] - 1).clamp(min=0)
    return (position >= first[:, None]) & (position < stop[:, None])


def _product(own: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if own is None or weights is None:
        return weights if own is None else own.double()
    return torch.where(own, weights, 0.0)

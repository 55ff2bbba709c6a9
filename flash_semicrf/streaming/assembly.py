"""Finite masks: scores such as -1e9 in place of -inf.

A sum that includes a mask loses the precision of the other scores. Kernels therefore subtract the
common part of a position, which is its largest score if that is huge, and exclude scores far below
the largest from running sums. Nothing is rounded to -inf: a segmentation that cannot avoid a mask
keeps its score. Where every sequence has segmentations that avoid all masks, and these have all of
the probability that float64 can show, the others may be left out: `without_masks`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials, accumulator_dtype

__all__ = [
    "HUGE",
    "common_parts",
    "in_float64",
    "running_total",
    "without_masks",
    "without_spans",
]

HUGE = 1e4
"""Scores of a larger absolute value are masks, or sums with masks."""


_LARGE = ("segment_scores", "transition_scores")
"""Parameters that are too large for a copy."""


def in_float64(potentials: Potentials) -> Potentials:
    """The problem in float64, but for segment scores and transition scores, which are large.

    Kernels read those by the row, in the dtype that they have. Detached.
    """
    named = potentials.parameters()
    return potentials.replace(
        **{n: v.detach() if n in _LARGE else v.detach().double() for n, v in named.items()}
    )


def without_spans(potentials: Potentials) -> str | None:
    """Why kernels that read neither segment scores nor transition scores cannot run a problem."""
    for name in _LARGE:
        if getattr(potentials, name) is not None:
            return f"it has no kernels for `{name}`"
    return None


def common_parts(scores: Tensor, lengths: Tensor) -> Tensor:
    """Largest score of each position if it is huge and does not forbid, else 0; (B, T)."""
    inside = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    peak = scores.amax(-1)
    return torch.where(inside & (peak.abs() > HUGE) & (peak > NEG_INF), peak, 0.0)


def running_total(parts: Tensor) -> Tensor:
    """Sum of the subtracted parts before each position, (B, T) to float64 (B, T + 1)."""
    wide = accumulator_dtype(parts.device)
    return torch.nn.functional.pad(parts.to(wide).cumsum(1), (1, 0))


def without_masks(potentials: Potentials) -> tuple[Potentials, Tensor] | None:
    """The problem with -inf in place of masks, and what log Z has to reach for it to be the same.

    Returns
    -------
    potentials : Potentials
        Scores of at most ``-HUGE`` forbid.
    least : Tensor of shape (B,)
        If log Z is at least this, the segmentations left out have less than e^-50 of Z. There are
        at most (1 + C e^g)^T of a sequence, weighted by what their segments get, g at most each,
        and a position of each gets the largest mask at best; -inf for a sequence without masks,
        NaN where that is not known.

    None where no score is a mask.
    """
    p = potentials
    scores = p.scores.detach()
    inside = torch.arange(scores.shape[1], device=scores.device) < p.lengths[:, None]
    masked = (scores <= -HUGE) & (scores > NEG_INF) & inside[..., None]
    if not bool(masked.any()):
        return None
    mask = scores.masked_fill(~masked, -math.inf).amax((1, 2)).double()
    rest = scores.amax(-1).clamp(min=0.0).masked_fill(~inside, 0.0).double().sum(1)
    gains = (
        *(p.transition, p.duration_bias, p.start_scores, p.end_scores, p.duration_tail),
        *(p.segment_scores, p.transition_scores),
    )
    once = _gain(p.initial_scores, p.final_scores) + math.log(p.num_labels)
    segments = p.lengths * (_gain(*gains) + math.log(1 + p.num_labels))
    least = mask + rest + segments + once + 50.0
    return p.replace(scores=scores.masked_fill(masked, -math.inf)), least


def _gain(*parameters: Tensor | None) -> float:
    """The most that a segmentation gets from an entry of each; NaN if any entry is."""
    given = [value.detach() for value in parameters if value is not None]
    return sum(float(value.max().clamp(min=0.0)) for value in given)

"""Finite masks: scores such as -1e9 in place of -inf.

A sum that includes a mask loses the precision of the other scores. Kernels therefore subtract the
common part of a position, which is its largest score if that is huge, and exclude scores far below
the largest from running sums. Nothing is rounded to -inf: a segmentation that cannot avoid a mask
keeps its score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, accumulator_dtype

__all__ = ["HUGE", "common_parts", "running_total"]

HUGE = 1e4
"""Scores of a larger absolute value are masks, or sums with masks."""


def common_parts(scores: Tensor, lengths: Tensor) -> Tensor:
    """Largest score of each position if it is huge and does not forbid, else 0; (B, T)."""
    inside = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    peak = scores.amax(-1)
    return torch.where(inside & (peak.abs() > HUGE) & (peak > NEG_INF), peak, 0.0)


def running_total(parts: Tensor) -> Tensor:
    """Sum of the subtracted parts before each position, (B, T) to float64 (B, T + 1)."""
    wide = accumulator_dtype(parts.device)
    return torch.nn.functional.pad(parts.to(wide).cumsum(1), (1, 0))

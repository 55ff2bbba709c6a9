"""Masks that are finite: scores like -1e9 where -inf is meant.

Sums that take one in keep no digits of the scores beside it. Kernels therefore leave out the
common part of a position, its largest score where that is huge, and keep scores far below the
largest out of running sums. Nothing is rounded to -inf: a segmentation that has to pass a mask
keeps its score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, accumulator_dtype

__all__ = ["HUGE", "common_parts", "running_total"]

HUGE = 1e4
"""Scores beyond it are masks, or carry one."""


def common_parts(scores: Tensor, lengths: Tensor) -> Tensor:
    """Largest score of each position where it is huge and forbids nothing, else 0; (B, T)."""
    inside = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    peak = scores.amax(-1)
    return torch.where(inside & (peak.abs() > HUGE) & (peak > NEG_INF), peak, 0.0)


def running_total(parts: Tensor) -> Tensor:
    """Sum of what has been left out before each position, (B, T) to float64 (B, T + 1)."""
    wide = accumulator_dtype(parts.device)
    return torch.nn.functional.pad(parts.to(wide).cumsum(1), (1, 0))

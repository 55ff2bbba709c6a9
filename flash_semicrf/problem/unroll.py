"""Equivalent of a problem with a `duration_tail` that has a score for every duration up to T.

It has the same labels, and K = T. The exact engine, which supports no tail, runs on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials, accumulator_dtype

__all__ = ["fold_durations", "unrolled"]


def unrolled(potentials: Potentials) -> Potentials:
    """Problem without a tail, with a score for every duration up to T.

    Parameters
    ----------
    potentials : Potentials

    Returns
    -------
    Potentials
        With K = max(K, T) and `duration_bias` in float64, differentiable; the problem itself if it
        has no tail.
    """
    p = potentials
    if p.duration_tail is None:
        return p
    beyond = max(0, p.num_positions - p.max_duration)
    wide = accumulator_dtype(p.device)
    bias = p.duration_bias.to(wide)
    steps = torch.arange(1, beyond + 1, device=p.device, dtype=wide)
    longer = bias[-1] + steps[:, None] * p.duration_tail.to(wide)
    changed = {"duration_bias": torch.cat([bias, longer])}
    for name, dims in (("transition", 3), ("initial_scores", 2)):
        value = getattr(p, name)
        if value is not None and value.dim() == dims:
            changed[name] = torch.cat([value, value[-1:].expand(beyond, *value.shape[1:])])
    spans = p.segment_scores
    if spans is not None:
        longest = spans[:, :, -1:].expand(-1, -1, beyond, -1)
        changed["segment_scores"] = torch.cat([spans, longest], 2)
    return p.replace(duration_tail=None, **changed)


def fold_durations(counts: Tensor, max_duration: int) -> tuple[Tensor, Tensor]:
    """Counts by duration for the original problem of an unrolled one.

    Parameters
    ----------
    counts : Tensor of shape (B, max(K, T), ...)
    max_duration : int
        K.

    Returns
    -------
    beyond : Tensor of shape (B, ...)
        Number of positions beyond the K-th.
    by_row : Tensor of shape (B, K, ...)
        The last row also counts the durations above K.
    """
    by_row, longer = counts[:, :max_duration].clone(), counts[:, max_duration:]
    by_row[:, -1] += longer.sum(1)
    steps = torch.arange(1, longer.shape[1] + 1, device=counts.device, dtype=counts.dtype)
    return torch.einsum("bk...,k->b...", longer, steps), by_row

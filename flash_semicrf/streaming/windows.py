"""Messages beside two boundaries of each sequence: all that one side of a boundary needs to know of
the other.

What follows boundary t depends on what comes before it by alpha of the K boundaries up to t alone,
since no segment is longer than K; what comes before depends on beta of the K boundaries from t on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Forward", "Windows", "after", "before", "taken"]


class Windows(NamedTuple):
    """Logarithms of messages, -inf where there is no boundary and where nothing reaches one.

    Attributes
    ----------
    alpha : float64 Tensor of shape (N, 2, K, C)
        Of the K boundaries up to each of a sequence's two.
    beta : float64 Tensor of shape (N, 2, K, C), or None
        Of the K boundaries from there on; or eta, from which beta follows.
    left_out : float64 Tensor of shape (N, 2)
        Sum of what the scores before each boundary were lowered by.
    rounding : float
        What float32 arithmetic may have changed logarithms in a window by, one against the other.
    """

    alpha: Tensor
    beta: Tensor | None
    left_out: Tensor
    rounding: float = 0.0


class Forward(NamedTuple):
    """Logarithms of all messages of a forward pass, without the common parts of the scores.

    Attributes
    ----------
    log_z : float64 Tensor of shape (B,)
    alpha : float64 Tensor of shape (B, T, C)
        alpha_{p+1} in row p; rows after the end of a sequence are arbitrary.
    gamma : float64 Tensor of shape (B, T, C), or None
        Sum over the labels before a segment that begins at p; None with transitions by duration.
    """

    log_z: Tensor
    alpha: Tensor
    gamma: Tensor | None


def before(bounds: Tensor, max_duration: int) -> Tensor:
    """The K boundaries up to each of some, (N, 2) to (N, 2, K)."""
    return bounds[..., None] - torch.arange(max_duration - 1, -1, -1, device=bounds.device)


def after(bounds: Tensor, max_duration: int) -> Tensor:
    """The K boundaries from each of some on, (N, 2) to (N, 2, K)."""
    return bounds[..., None] + torch.arange(max_duration, device=bounds.device)


def taken(rows: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """Entries of each sequence's rows (N, T, ...) at some places (N, 2, K); -inf if not valid."""
    index = torch.arange(len(rows), device=rows.device)[:, None, None]
    found = rows[index, torch.where(valid, place, 0)]
    return torch.where(valid.view(*valid.shape, *(1,) * (rows.dim() - 2)), found, -torch.inf)

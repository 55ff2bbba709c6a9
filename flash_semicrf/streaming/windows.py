"""Messages beside two boundaries of each sequence: all that one side of a boundary needs to know of
the other.

What follows boundary t depends on what comes before it by alpha of the K boundaries up to t alone,
since no segment is longer than K; what comes before depends on beta of the K boundaries from t on.
With a duration tail it depends on one boundary more, K positions away, and on one number for each
label: the sum of the segments that have more than K positions on that side of the boundary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials

__all__ = [
    "Changes",
    "Forward",
    "Tangents",
    "Windows",
    "after",
    "before",
    "boundaries",
    "taken",
    "with_longer",
]


class Windows(NamedTuple):
    """Logarithms of messages, -inf where there is no boundary and where nothing reaches one.

    Attributes
    ----------
    alpha : float64 Tensor of shape (N, 2, K, C)
        Of the K boundaries up to each of a sequence's two. With a tail (N, 2, K + 2, C): of one
        boundary more, and of the longer segments.
    beta : float64 Tensor of shape (N, 2, K, C), or None
        Of the K boundaries from there on; or eta, from which beta follows. With a tail as alpha.
    left_out : float64 Tensor of shape (N, 2)
        Sum of what the scores before each boundary were lowered by.
    """

    alpha: Tensor
    beta: Tensor | None
    left_out: Tensor


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


class Changes(NamedTuple):
    """Derivatives of messages along a direction; row p is that of boundary p + 1.

    Attributes
    ----------
    end : float64 Tensor of shape (N, T, C)
        Marginal of each end; the derivatives are arbitrary where it is 0.
    alpha, beta : float64 Tensors of shape (N, T, C)
    left_out : float64 Tensor of shape (N, 2)
        Sum of what the direction's scores before each boundary of the core were lowered by.
    """

    end: Tensor
    alpha: Tensor
    beta: Tensor
    left_out: Tensor


class Tangents(NamedTuple):
    """Derivatives of the gradients of pieces.

    Attributes
    ----------
    log_z, mean : float64 Tensors of shape (N,)
        Log Z and its derivative.
    found : dict of Tensor
        Derivative of the gradient by each wanted parameter.
    windows : Windows
        Of the messages.
    changes : Changes
    """

    log_z: Tensor
    mean: Tensor
    found: dict[str, Tensor]
    windows: Windows
    changes: Changes


def boundaries(p: Potentials) -> int:
    """Boundaries on one side that a window has."""
    return p.max_duration + (p.duration_tail is not None)


def with_longer(rows: Tensor, longer: Tensor | None) -> Tensor:
    """Windows (N, 2, K + 1, C) with what longer segments have (N, 2, 1, C), if there are any."""
    return rows if longer is None else torch.cat([rows, longer], 2)


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

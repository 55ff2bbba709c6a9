"""Whether a piece that started somewhere else goes on as if it had started at the beginning.

The window that a piece has at its first position, after its warm-up, is compared with the one at
which the piece before it arrives there. If they differ by a constant factor alone, everything that
follows from one follows from the other, whatever comes later; the factor is what log Z lacks. So a
certificate needs no assumption about the model, and by induction from the first piece, which starts
where its sequence does, all pieces are right. The same holds backwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.streaming.windows import Windows

__all__ = ["Certificate", "certificate_of"]

_TOLERANCE = 1e-11
"""Largest difference of logarithms, beside what rounding leaves of them."""

_ROUNDINGS = 16.0


class Certificate(NamedTuple):
    """Comparison of every row of pieces with the row before it.

    Attributes
    ----------
    certain : bool Tensor of shape (N,)
        True for the first piece of a sequence.
    scale : float64 Tensor of shape (N,)
        What to add to log Z of the piece for what precedes its warm-up; 0 for the first piece, and
        where nothing is certain.
    back : float64 Tensor of shape (N,)
        What to add to beta of the piece before for what follows its row, without left-out parts; 0
        without backward windows.
    """

    certain: Tensor
    scale: Tensor
    back: Tensor


def certificate_of(windows: Windows, follows: Tensor) -> Certificate:
    """Compare the windows of neighbouring pieces.

    Parameters
    ----------
    windows : Windows
        At the first position of each piece and at its end.
    follows : bool Tensor of shape (N,)
        False for the first piece of a sequence; True where the row before is its left neighbour.
    """
    certain, level = _constant(
        _previous(windows.alpha[:, 1]), windows.alpha[:, 0], windows.rounding
    )
    level = level + _previous(windows.left_out[:, 1]) - windows.left_out[:, 0]
    back = torch.zeros_like(level)
    if windows.beta is not None:
        agrees, back = _constant(
            windows.beta[:, 0], _previous(windows.beta[:, 1]), windows.rounding
        )
        certain = certain & agrees
        back = torch.where(certain & follows, back, 0.0)
    return Certificate(certain | ~follows, torch.where(certain & follows, level, 0.0), back)


def _previous(rows: Tensor) -> Tensor:
    return torch.roll(rows, 1, 0)


def _constant(x: Tensor, y: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Whether x - y is one number for each row, to rounding, and that number; (N, K, C) to (N,).

    Entries of -inf in both agree, and those that differ by up to `rounding`; rows without another
    entry do not count as constant. An entry may be off by the rounding of its size and of that of
    the most probable one, and counts for as much in the mean: a finite mask in one does not hide
    what the others differ by.
    """
    x, y = x.flatten(1), y.flatten(1)
    dead = (x == -torch.inf) & (y == -torch.inf)
    difference = torch.where(dead, 0.0, x - y)
    top = torch.maximum(x.amax(1).abs(), y.amax(1).abs())[:, None]
    largest = torch.where(dead, 0.0, torch.maximum(torch.maximum(x.abs(), y.abs()), top))
    allowed = _TOLERANCE + rounding + _ROUNDINGS * torch.finfo(x.dtype).eps * largest
    weight = torch.where(dead, 0.0, allowed**-2)
    number = (weight * difference).sum(1) / weight.sum(1)
    fits = dead | ((difference - number[:, None]).abs() <= allowed)
    return fits.all(1) & (~dead).any(1), number

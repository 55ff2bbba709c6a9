"""Whether a piece that started somewhere else goes on as if it had started at the beginning.

The window that a piece has at its first position, after its warm-up, is compared with the one at
which the piece before it arrives there. If they differ by a constant factor alone, everything that
follows from one follows from the other, whatever comes later; the factor is what log Z lacks. So a
certificate needs no assumption about the model, and by induction from the first piece, which starts
where its sequence does, all pieces are right. The same holds backwards.

A later message's derivative is a mean of those in the window and of the direction's scores, with
weights that both pieces share where their windows agree. So derivatives in the windows that differ
by one number lead to derivatives that differ by this number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.streaming.windows import Windows

__all__ = ["Certificate", "certificate_of", "certificate_of_changes"]

_TOLERANCE = 1e-11
"""Largest difference of logarithms, beside what rounding leaves of them."""

_ROUNDINGS = 16.0

_LEAST = 1e-100
"""Tolerance where the derivatives have no size: a number that can be squared."""


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
    return _certificate(windows, windows, follows, None)


def certificate_of_changes(
    changes: Windows, windows: Windows, follows: Tensor, size: Tensor
) -> Certificate:
    """Compare the derivatives in the windows of neighbouring pieces, which themselves agree.

    Parameters
    ----------
    changes : Windows
        Derivatives of the messages; not read where these are -inf.
    windows : Windows
        The messages.
    follows : bool Tensor of shape (N,)
    size : float64 Tensor of shape (N,)
        What derivatives may be off by, beside their rounding, in 1e-11.
    """
    return _certificate(changes, windows, follows, (_TOLERANCE * size).clamp(min=_LEAST))


def _certificate(
    compared: Windows, windows: Windows, follows: Tensor, tolerance: Tensor | None
) -> Certificate:
    """Compare the derivatives of windows, or without a tolerance themselves."""

    def agree(x: Tensor, y: Tensor, log_x: Tensor, log_y: Tensor) -> tuple[Tensor, Tensor]:
        if tolerance is None:
            return _constant(x, y)
        x, y, log_x, log_y = (rows.flatten(1) for rows in (x, y, log_x, log_y))
        top = torch.maximum(_of_largest(x, log_x), _of_largest(y, log_y))
        x, y = (torch.where(log == -torch.inf, log, rows) for rows, log in ((x, log_x), (y, log_y)))
        return _constant(x, y, tolerance[:, None], top)

    alpha, log = compared.alpha, windows.alpha
    certain, level = agree(_previous(alpha[:, 1]), alpha[:, 0], _previous(log[:, 1]), log[:, 0])
    level = level + _previous(compared.left_out[:, 1]) - compared.left_out[:, 0]
    back = torch.zeros_like(level)
    if windows.beta is not None and compared.beta is not None:
        beta, log = compared.beta, windows.beta
        agrees, back = agree(beta[:, 0], _previous(beta[:, 1]), log[:, 0], _previous(log[:, 1]))
        certain = certain & agrees
        back = torch.where(certain & follows, back, 0.0)
    return Certificate(certain | ~follows, torch.where(certain & follows, level, 0.0), back)


def _of_largest(rows: Tensor, logs: Tensor) -> Tensor:
    """Size of each row's entry where another row is largest, (N, entries) to (N, 1)."""
    return rows.gather(1, logs.argmax(1, keepdim=True)).abs()


def _previous(rows: Tensor) -> Tensor:
    return torch.roll(rows, 1, 0)


def _constant(
    x: Tensor, y: Tensor, tolerance: Tensor | float = _TOLERANCE, top: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Whether x - y is one number for each row, to rounding, and that number; (N, K, C) to (N,).

    Entries of -inf in both agree; rows without another entry do not count as constant. An entry may
    be off by the rounding of its size and of that of the most probable one, `top`, and counts for
    as much in the mean: a finite mask in one does not hide what the others differ by.
    """
    x, y = x.flatten(1), y.flatten(1)
    dead = (x == -torch.inf) & (y == -torch.inf)
    difference = torch.where(dead, 0.0, x - y)
    if top is None:
        top = torch.maximum(x.amax(1).abs(), y.amax(1).abs())[:, None]
    largest = torch.where(dead, 0.0, torch.maximum(torch.maximum(x.abs(), y.abs()), top))
    allowed = tolerance + _ROUNDINGS * torch.finfo(x.dtype).eps * largest
    weight = torch.where(dead, 0.0, allowed**-2)
    number = (weight * difference).sum(1) / weight.sum(1)
    fits = dead | ((difference - number[:, None]).abs() <= allowed)
    return fits.all(1) & (~dead).any(1), number

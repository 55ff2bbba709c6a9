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

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.streaming.windows import Windows

__all__ = ["Certificate", "certificate_of", "certificate_of_changes"]

_TOLERANCE = 1e-11
"""Largest difference of logarithms, beside what rounding leaves of them."""

_ROUNDINGS = 16.0

_NOTHING = 1e-130
"""Probability below which the CPU's passes leave derivatives at 0."""

_LEAST = 1e-100
"""Tolerance where the derivatives have no size: a number that can be squared."""

_Agreement: TypeAlias = tuple[Tensor, Tensor]


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
    forwards = _constant(*_arrivals(windows.alpha))
    backwards = None if windows.beta is None else _constant(*_departures(windows.beta))
    return _certificate(windows.left_out, follows, forwards, backwards)


def certificate_of_changes(
    changes: Windows, marginals: Windows, follows: Tensor, size: Tensor
) -> Certificate:
    """Compare the derivatives of the messages in windows which themselves agree.

    Parameters
    ----------
    changes : Windows
        Derivatives of the messages.
    marginals : Windows
        Probabilities of their boundaries. Where there is none that float64 can show beside others,
        derivatives are not compared: nothing is made of them.
    follows : bool Tensor of shape (N,)
    size : float64 Tensor of shape (N,)
        In units of this the tolerance is 1e-11, beside rounding.
    """
    tolerance = (_TOLERANCE * size).clamp(min=_LEAST)[:, None]
    forwards = _same_change(_arrivals(changes.alpha), _arrivals(marginals.alpha), tolerance)
    backwards = None
    if changes.beta is not None and marginals.beta is not None:
        ends = _departures(marginals.beta)
        backwards = _same_change(_departures(changes.beta), ends, tolerance)
    return _certificate(changes.left_out, follows, forwards, backwards)


def _certificate(
    left_out: Tensor, follows: Tensor, forwards: _Agreement, backwards: _Agreement | None
) -> Certificate:
    certain, level = forwards
    level = level + _previous(left_out[:, 1]) - left_out[:, 0]
    back = torch.zeros_like(level)
    if backwards is not None:
        agrees, back = backwards
        certain = certain & agrees
        back = torch.where(certain & follows, back, 0.0)
    return Certificate(certain | ~follows, torch.where(certain & follows, level, 0.0), back)


def _arrivals(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Windows (N, 2, K, C) of both pieces at a cut: of the one that ends there, then the other."""
    return _previous(alpha[:, 1]), alpha[:, 0]


def _departures(beta: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the passes from the end: first of the piece that begins at the cut."""
    return beta[:, 0], _previous(beta[:, 1])


def _same_change(
    changes: tuple[Tensor, Tensor], marginals: tuple[Tensor, Tensor], tolerance: Tensor
) -> _Agreement:
    """`_constant` of derivatives at boundaries of these probabilities, each (N, K, C)."""
    x, y, p, q = (rows.flatten(1) for rows in (*changes, *marginals))
    top = torch.maximum(_of_largest(x, p), _of_largest(y, q))
    dead = ~(torch.minimum(p, q) > _NOTHING)
    x, y = (torch.where(dead, -torch.inf, rows) for rows in (x, y))
    return _constant(x, y, tolerance, top)


def _of_largest(rows: Tensor, others: Tensor) -> Tensor:
    """Size of each row's entry where that of others is largest, (N, entries) to (N, 1)."""
    return rows.gather(1, others.argmax(1, keepdim=True)).abs()


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

"""Derivatives along a direction, for transitions by duration, as the kernels read and fill them.

Rows are those of `flash_semicrf.streaming.cpu.by_duration.model`; all arrays are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.jit import helper

__all__ = ["Slopes", "Tangent", "Totals", "tangent_of", "totals_of"]


class Tangent(NamedTuple):
    """Direction of one sequence's positions, and derivatives of its messages.

    Those of a batch have a leading axis.

    Attributes
    ----------
    scores, start, end, has_boundary
        As in `Sequence`.
    alpha, beta : arrays of shape (T, C)
        Derivatives; the last row of the latter starts as that of the final scores.
    rest : array of shape (T * C,)
        Row s: the derivative of what may follow K positions from s; unused without a tail.
    """

    scores: np.ndarray
    start: np.ndarray
    end: np.ndarray
    has_boundary: bool
    alpha: np.ndarray
    beta: np.ndarray
    rest: np.ndarray


class Slopes(NamedTuple):
    """Direction of the shared parameters.

    Attributes
    ----------
    bias, first : arrays of shape (R,)
        Derivatives of D and of the first segment's term.
    scores : array of shape (C * R,)
        Derivatives of A, a row for each c'.
    forward, backward : arrays
        Times ``Weights.forward`` and ``Weights.backward``.
    tail : array of shape (C,)
        Zeros without a tail.
    """

    bias: np.ndarray
    first: np.ndarray
    scores: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    tail: np.ndarray


class Totals(NamedTuple):
    """Derivatives of one sequence's expected counts; those of a batch have a leading axis.

    Attributes
    ----------
    start : array of shape (T, C)
    duration, first : arrays of shape (R,)
        Of all segments, and of first segments.
    transition, direct : arrays of shape (C * R,), or (1,) if not wanted
        Their sum is that of transitions, less dA times the count; the former still lacks the
        factor ``Weights.forward``.
    beyond : array of shape (C,)
        Of positions beyond the K-th.
    """

    start: np.ndarray
    duration: np.ndarray
    first: np.ndarray
    transition: np.ndarray
    direct: np.ndarray
    beyond: np.ndarray


@helper
def tangent_of(batch, b):
    """`Tangent` of sequence b of a batch."""
    given = batch.scores[b], batch.start[b], batch.end[b], batch.has_boundary
    return Tangent(*given, batch.alpha[b], batch.beta[b], batch.rest[b])


@helper
def totals_of(batch, b):
    """`Totals` of sequence b of a batch."""
    rows = batch.start[b], batch.duration[b], batch.first[b]
    return Totals(*rows, batch.transition[b], batch.direct[b], batch.beyond[b])

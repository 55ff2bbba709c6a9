"""What the kernels for tangents, with transitions by duration, read and fill.

Rows are those of `flash_semicrf.streaming.cpu.by_duration.parameters`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Sequence", "Slopes", "Totals"]


class Sequence(NamedTuple):
    """One sequence, its messages and the direction.

    Attributes
    ----------
    scores, start, end : arrays of shape (T, C)
        The latter two read only if `has_boundary`.
    has_boundary : bool
    d_scores, d_start, d_end : arrays of shape (T, C)
    has_d_boundary : bool
    alpha, beta : arrays of shape (T, C)
        Row p: alpha_{p+1} and beta_{p+1}, less their offsets.
    d_alpha, d_beta : arrays of shape (T, C)
        Get their derivatives; the last row of the latter holds that of the final scores.
    rest, further : arrays of shape (T * C,)
        See `flash_semicrf.streaming.cpu.by_duration.passes.backward_pass`; read only with a tail.
    d_rest : array of shape (T * C,)
        Gets, in row s, the derivative of what may follow K positions from s.
    forward, backward : arrays of shape (T + 1,)
    length : int
    offset, value : float
        log Z = offset + value.
    """

    scores: np.ndarray
    start: np.ndarray
    end: np.ndarray
    has_boundary: bool
    d_scores: np.ndarray
    d_start: np.ndarray
    d_end: np.ndarray
    has_d_boundary: bool
    alpha: np.ndarray
    beta: np.ndarray
    d_alpha: np.ndarray
    d_beta: np.ndarray
    rest: np.ndarray
    further: np.ndarray
    d_rest: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    length: int
    offset: float
    value: float


class Slopes(NamedTuple):
    """The direction's shared parameters.

    Attributes
    ----------
    bias, first : arrays of shape (R,)
        Derivatives of D and of the first segment's term.
    scores : array of shape (C * R,)
        Derivatives of A, a row for each c'.
    forward, backward : arrays
        Times ``Weights.forward`` and ``Weights.backward``.
    tail : array of shape (C,)
        Read only with a tail.
    """

    bias: np.ndarray
    first: np.ndarray
    scores: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    tail: np.ndarray


class Totals(NamedTuple):
    """Derivatives of the counts.

    Attributes
    ----------
    start : array of shape (T, C)
    duration, first : arrays of shape (R,)
        Of all segments, and of first segments.
    transition, direct : arrays of shape (C * R,)
        Their sum is that of transitions, less dA times the count; the former still lacks the
        factor ``Weights.forward``.
    beyond : array of shape (C,)
        Of positions beyond the K-th.
    want_transition : bool
    """

    start: np.ndarray
    duration: np.ndarray
    first: np.ndarray
    transition: np.ndarray
    direct: np.ndarray
    beyond: np.ndarray
    want_transition: bool

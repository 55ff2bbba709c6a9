"""Parameters of transitions by duration as the kernels read them.

A *row* holds a value for each label c and duration k, at index ``c * K + k - 1``, and is padded to
a multiple of `TILE`: its size is R.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    forbid,
    padded_labels,
    start_term,
    tail_term,
)
from flash_semicrf.streaming.cpu.vector import TILE

__all__ = ["Arrivals", "Weights", "arrivals_of", "labels_and_durations", "rows_of", "weights_of"]


class Arrivals(NamedTuple):
    """Scores of arriving in a segment; -inf where forbidden and in the padding.

    Attributes
    ----------
    max_duration : int
    bias : float64 array of shape (R,)
        D_k(c).
    scores : float64 array of shape (C * R,)
        A_k[c', c], a row for each c'.
    first : float64 array of shape (R,)
        D_k(c) and what the first segment gets in place of a transition.
    tail : float64 array of shape (C,) or None
        Log-rate of the durations beyond K.
    """

    max_duration: int
    bias: np.ndarray
    scores: np.ndarray
    first: np.ndarray
    tail: np.ndarray | None


class Weights(NamedTuple):
    """Exponentials of the transitions, for matrix products in both directions.

    Attributes
    ----------
    forward : float64 array of shape (C * R,)
        exp(A_k[c', c] - peak), a row for each c'.
    peak : float64 array of shape (R,)
        max over c' of A_k[c', c]; -inf where nothing arrives.
    reach : float64 array of shape (R,)
        peak + D_k(c).
    backward : float64 array of shape (R * padded C,)
        exp(A_k[c', c] - source_peak[c']), a row of c' for each element of a row.
    source_peak : float64 array of shape (C,)
        max over k and c of A_k[c', c].
    """

    forward: np.ndarray
    peak: np.ndarray
    reach: np.ndarray
    backward: np.ndarray
    source_peak: np.ndarray


def rows_of(values: np.ndarray, padding: float = -np.inf) -> np.ndarray:
    """(..., K, C) as rows (..., R)."""
    *leading, max_duration, num_labels = values.shape
    used = max_duration * num_labels
    row = np.full((*leading, -(-used // TILE) * TILE), padding)
    row[..., :used] = np.swapaxes(values, -1, -2).reshape(*leading, used)
    return row


def labels_and_durations(rows: np.ndarray, max_duration: int, num_labels: int) -> np.ndarray:
    """Rows (..., R) as (..., K, C)."""
    used = rows[..., : max_duration * num_labels]
    return np.swapaxes(used.reshape(*rows.shape[:-1], num_labels, max_duration), -1, -2)


def arrivals_of(potentials: Potentials) -> Arrivals:
    """Prepare the scores."""
    p = potentials
    transition = forbid(array_of(p.transition)).swapaxes(0, 1)
    bias = rows_of(forbid(array_of(p.duration_bias)))
    first = rows_of(start_term(p)) + bias
    return Arrivals(p.max_duration, bias, rows_of(transition).ravel(), first, tail_term(p))


def weights_of(arrivals: Arrivals) -> Weights:
    """Prepare the exponentials."""
    scores = arrivals.scores.reshape(-1, len(arrivals.bias))
    peak, source_peak = scores.max(0), scores.max(1)
    forward = np.exp(scores - np.where(peak == -np.inf, 0.0, peak))
    padded = np.zeros((scores.shape[1], padded_labels(len(scores))))
    finite = np.where(source_peak == -np.inf, 0.0, source_peak)
    padded[:, : len(scores)] = np.exp(scores - finite[:, None]).T
    return Weights(forward.ravel(), peak, peak + arrivals.bias, padded.ravel(), source_peak)

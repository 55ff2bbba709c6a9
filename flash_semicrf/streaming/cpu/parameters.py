"""Parameters in the forms that the CPU kernels read, prepared once per call."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.threads import position_cost
from flash_semicrf.streaming.cpu.vector import TILE

__all__ = [
    "CERTAIN",
    "Transition",
    "Window",
    "array_of",
    "boundary_arrays",
    "cost_of",
    "end_term",
    "forbid",
    "start_term",
    "sum_of_sources",
    "tail_term",
    "transition_of",
    "window_of",
]

FLOOR = -650.0
"""Exponents below this are flushed to zero; their sums are certified not to miss them."""


CERTAIN = 1e-175
"""A scaled sum at least this large has lost nothing that float64 could show."""

_SMALLEST = math.exp(FLOOR)


class Window(NamedTuple):
    """Duration scores D, in the forms that the window sums read.

    Attributes
    ----------
    weights : float64 array of shape (C * (K + 3 * TILE),)
        Row c holds exp(D_k(c) - peak[c]) at index TILE + k, zeros elsewhere, so that a tile of
        neighbouring outputs may reach beyond 1..K.
    near : float64 array of shape (TILE * padded C,)
        The same by duration: row k holds exp(D_k(c) - peak[c]) for all labels, k < TILE.
    bias : float64 array of shape (C, K + 1)
        D_k(c) at [c, k]; entry 0 is -inf.
    descending : float64 array of shape (C * (K + 8),)
        Row c holds D_k(c) at index 8 + K - k, in the order of the sources, -inf before them.
    peak : float64 array of shape (C,)
        max over k of D_k(c); 0 for a label without any allowed duration.
    tail : float64 array of shape (C,) or None
        Log-rate of the durations beyond K.
    """

    weights: np.ndarray
    near: np.ndarray
    bias: np.ndarray
    descending: np.ndarray
    peak: np.ndarray
    tail: np.ndarray | None


class Transition(NamedTuple):
    """A static transition matrix in one direction, [from, to].

    Attributes
    ----------
    weights : float64 array of shape (C * padded C,)
        exp(A[from, to] - peak[to]), rows padded to a multiple of 8 labels with ones.
    scores : float64 array of shape (C, C)
    into : float64 array of shape (C * padded C,)
        The same by the label reached, [to, from], rows padded with -inf.
    peak : float64 array of shape (C,)
        max over from; 0 for a label that cannot be reached.
    """

    weights: np.ndarray
    scores: np.ndarray
    into: np.ndarray
    peak: np.ndarray


def forbid(values: np.ndarray) -> np.ndarray:
    """float64 copy with everything <= NEG_INF as -inf."""
    values = values.astype(np.float64)
    values[values <= NEG_INF] = -np.inf
    return values


def array_of(tensor: Tensor) -> np.ndarray:
    """C-contiguous numpy view (or copy) of a CPU tensor, its dtype kept."""
    return np.ascontiguousarray(tensor.detach().numpy())


def _weights(scores: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(exp(scores - peak), peak), peak the finite maximum over an axis."""
    peak = scores.max(axis)
    peak[peak == -np.inf] = 0.0
    weights = np.exp(scores - (peak[None] if axis == 0 else peak[:, None]))
    weights[weights <= _SMALLEST] = 0.0
    return weights, peak


def window_of(potentials: Potentials) -> Window:
    """Prepare the duration scores."""
    bias = forbid(array_of(potentials.duration_bias)).T
    weights, peak = _weights(bias, 1)
    num_labels, max_duration = bias.shape
    padded = np.zeros((num_labels, max_duration + 3 * TILE))
    padded[:, TILE + 1 : TILE + 1 + max_duration] = weights
    with_zero = np.full((num_labels, max_duration + 1), -np.inf)
    with_zero[:, 1:] = bias
    near = np.zeros((TILE, padded_labels(num_labels)))
    near[:, :num_labels] = padded[:, TILE : 2 * TILE].T
    descending = np.full((num_labels, LANES + max_duration), -np.inf)
    descending[:, LANES:] = bias[:, ::-1]
    rows = (padded.ravel(), near.ravel(), with_zero, descending.ravel())
    return Window(*rows, peak, tail_term(potentials))


def transition_of(scores: np.ndarray) -> Transition:
    """Prepare a (C, C) transition matrix given as [from, to], -inf where forbidden."""
    weights, peak = _weights(scores, 0)
    num_labels = len(scores)
    padded = np.ones((num_labels, padded_labels(num_labels)))
    padded[:, :num_labels] = weights
    into = np.full_like(padded, -np.inf)
    into[:, :num_labels] = scores.T
    return Transition(padded.ravel(), np.ascontiguousarray(scores), into.ravel(), peak)


def boundary_arrays(p: Potentials, scores: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray]:
    """(given at all, start scores, end scores); (B, 1, 1) zeros when neither is given."""
    if p.start_scores is None and p.end_scores is None:
        nothing = np.zeros((p.batch_size, 1, 1), scores.dtype)
        return False, nothing, nothing
    given = (p.start_scores, p.end_scores)
    start, end = (np.zeros_like(scores) if x is None else array_of(x) for x in given)
    return True, start, end


def sum_of_sources(transition: Transition) -> np.ndarray:
    """Log-sum-exp over the labels that each label (C,) may follow."""
    num_labels = len(transition.peak)
    weights = transition.weights.reshape(num_labels, -1)[:, :num_labels]
    with np.errstate(divide="ignore"):
        return np.log(weights.sum(0)) + transition.peak


def cost_of(potentials: Potentials) -> float:
    """Cost of one position, in the unit of `flash_semicrf.streaming.cpu.threads.position_cost`."""
    p = potentials
    by_duration = p.num_labels if p.transition.dim() == 3 else 1
    return position_cost(p.max_duration * by_duration, p.num_labels)


def padded_labels(num_labels: int) -> int:
    """Number of labels rounded up to whole vectors."""
    return -(-num_labels // LANES) * LANES


def start_term(potentials: Potentials) -> np.ndarray:
    """Scores of the first segment in place of a transition: (C,), or (K, C) by duration."""
    p = potentials
    if p.initial_scores is not None:
        first = forbid(array_of(p.initial_scores))
        by_label_only = p.transition.dim() == 3 and first.ndim == 1
        return np.tile(first, (p.max_duration, 1)) if by_label_only else first
    transition = forbid(array_of(p.transition))
    peak = transition.max(-2)
    peak[peak == -np.inf] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(transition - peak[..., None, :]).sum(-2)) + peak


def tail_term(potentials: Potentials) -> np.ndarray | None:
    """Log-rates of the durations beyond K: (C,), or None without a tail."""
    tail = potentials.duration_tail
    return None if tail is None else forbid(array_of(tail))


def end_term(potentials: Potentials) -> np.ndarray:
    """Scores of the last label: (C,)."""
    if potentials.final_scores is None:
        return np.zeros(potentials.num_labels)
    return forbid(array_of(potentials.final_scores))

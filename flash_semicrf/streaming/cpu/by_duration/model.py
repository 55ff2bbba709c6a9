"""A problem whose scores go by duration, and its messages, as the kernels read them.

A *row* holds a value for each label c and duration k, at index ``c * K + k - 1``, and is padded to
a multiple of `TILE`: its size is R. A *row of transitions* is such a row or, for static
transitions, one with a value for each label, its size M. All arrays are float64, but for those of
`flash_semicrf.streaming.cpu.by_duration.attached`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu.by_duration.attached import Attached, attached_of, attached_to
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    boundary_arrays,
    end_term,
    forbid,
    padded_labels,
    start_term,
    tail_term,
)
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.vector import TILE

__all__ = [
    "Messages",
    "Model",
    "Sequence",
    "Weights",
    "labels_and_durations",
    "messages_of",
    "model_of",
    "rows_of",
    "sequence_of",
    "sequences_of",
    "transition_place",
    "weights_of",
]


class Sequence(NamedTuple):
    """Positions of one sequence; those of a batch have a leading axis."""

    scores: np.ndarray  # (T, C)
    start: np.ndarray  # (T, C), or (1, 1) zeros without boundary scores
    end: np.ndarray
    has_boundary: bool
    length: np.ndarray  # int64 scalar
    attached: Attached | None  # scores of segments and of transitions by position


class Messages(NamedTuple):
    """Messages of one sequence; those of a batch have a leading axis."""

    alpha: np.ndarray  # (T, C) row p: alpha_{p+1} less its offset
    beta: np.ndarray  # row p: beta_{p+1} less its offset
    forward: np.ndarray  # (T + 1,) offsets, whole numbers, by the steps from position 0
    backward: np.ndarray  # by the steps from the end
    # (T * C,), unused without a tail. Row p: Q_{p+K} + S_{p+K} - S_p less the offset of beta_{p+1};
    # the positions beyond the K-th that are expected of a segment of the class from p.
    rest: np.ndarray
    further: np.ndarray
    total: np.ndarray  # (2,) offset and value: log Z is their sum


class Model(NamedTuple):
    """Parameters shared by all positions; -inf where forbidden and in the padding."""

    max_duration: int
    step: int  # entries of a row of transitions for each label: K, or 1 if they are static
    bias: np.ndarray  # (R,) D_k(c)
    scores: np.ndarray  # (C * M,) A_k[c', c], a row for each c'
    first: np.ndarray  # (R,) D_k(c) and what the first segment gets in place of a transition
    free_start: bool  # the first segment's source label is summed out (no initial scores)
    last: np.ndarray  # (C,) final scores
    tail: np.ndarray | None  # (C,) log-rates of the durations beyond K


class Weights(NamedTuple):
    """Exponentials of the transitions, for matrix products in both directions."""

    forward: np.ndarray  # (C * R,) exp(A_k[c', c] - peak), a row for each c'
    peak: np.ndarray  # (R,) max over c' of A_k[c', c]; -inf where nothing arrives
    backward: np.ndarray  # (R * padded C,) exp(A_k[c', c] - source_peak[c']), a row for each k, c
    source_peak: np.ndarray  # (C,) max over k and c of A_k[c', c]


@owning
def sequence_of(batch, b):
    """`Sequence` b of a batch."""
    boundary = batch.start[b], batch.end[b], batch.has_boundary
    attached = attached_of(batch.attached, b)
    return Sequence(batch.scores[b], *boundary, batch.length[b], attached)


@owning
def messages_of(batch, b):
    """`Messages` of sequence b of a batch."""
    offsets = batch.forward[b], batch.backward[b]
    return Messages(
        batch.alpha[b], batch.beta[b], *offsets, batch.rest[b], batch.further[b], batch.total[b]
    )


@helper
def transition_place(model, label, duration):
    """Place in a row of transitions of those into a segment of a label and a duration."""
    return label * model.step + min(duration, model.step) - 1


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


def sequences_of(potentials: Potentials) -> Sequence:
    """Positions of a batch, from a problem in float64 but for what is attached."""
    scores = array_of(potentials.scores)
    has_boundary, start, end = boundary_arrays(potentials, scores)
    lengths = array_of(potentials.lengths)
    return Sequence(scores, start, end, has_boundary, lengths, attached_to(potentials))


def model_of(potentials: Potentials) -> Model:
    """Parameters shared by all positions."""
    p = potentials
    transition = forbid(array_of(p.transition)).reshape(-1, p.num_labels, p.num_labels)
    scores, step = rows_of(transition.swapaxes(0, 1)).ravel(), len(transition)
    bias = rows_of(forbid(array_of(p.duration_bias)))
    first = np.broadcast_to(start_term(p), p.duration_bias.shape)
    first, free_start = rows_of(first) + bias, p.initial_scores is None
    return Model(p.max_duration, step, bias, scores, first, free_start, end_term(p), tail_term(p))


def weights_of(model: Model) -> Weights:
    """Exponentials of a model's transitions."""
    scores = model.scores.reshape(-1, len(model.bias))
    peak, source_peak = scores.max(0), scores.max(1)
    forward = np.exp(scores - np.where(peak == -np.inf, 0.0, peak))
    padded = np.zeros((scores.shape[1], padded_labels(len(scores))))
    finite = np.where(source_peak == -np.inf, 0.0, source_peak)
    padded[:, : len(scores)] = np.exp(scores - finite[:, None]).T
    return Weights(forward.ravel(), peak, padded.ravel(), source_peak)

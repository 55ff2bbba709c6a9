"""Scores of single segments (T, K, C) and of transitions by position (T, C, C).

Kernels read them a row at a time, in the dtype in which they are given. With either of them
transitions are summed as log-sum-exps, which cost C² exponentials a position if they are static and
K·C² by duration: a row of transitions has an entry for each label, or for each label and duration
(`Model.step` entries a label). Sums of what may follow a label's segments are reduced to such a
row. For problems with neither, whose first argument is None, these functions are compiled to
nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.cpu.by_duration.products import exact_arrivals, exact_departure
from flash_semicrf.streaming.cpu.parameters import array_of
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.vector import TILE, exp_row

__all__ = [
    "Attached",
    "Work",
    "add_spans",
    "arrive_in",
    "attached_like",
    "attached_of",
    "attached_to",
    "depart_to",
    "fill_matrix",
    "make_work",
    "moved",
    "reduce_row",
    "spanned",
    "spread_row",
]


class Attached(NamedTuple):
    """Scores of one sequence, or something of their shapes; of a batch, with a leading axis."""

    spans: np.ndarray  # (T, K, C), or (1, 1, 1)
    moves: np.ndarray  # (T, C, C), or (1, 1, 1); row 0 is not read
    has_spans: bool
    has_moves: bool


class Work(NamedTuple):
    """Workspace; M is the size of a row of transitions, R that of a row by label and duration."""

    matrix: np.ndarray  # (C * M,) transitions at a position, a row for each label before
    arriving: np.ndarray  # (M,) log-sum of what arrives
    onward: np.ndarray  # (M,) log-sum of what follows
    sums: np.ndarray  # (M,)
    source: np.ndarray  # (C,) alpha
    terms: np.ndarray  # (R,)
    shares: np.ndarray  # (M,)


def _record(spans: np.ndarray | None, moves: np.ndarray | None, batch_size: int) -> Attached | None:
    """Record of two arrays; None where both are."""
    if spans is None and moves is None:
        return None
    # What is absent has the dtype of the other: kernels are compiled for each dtype.
    dtype = (moves if spans is None else spans).dtype
    absent = np.zeros((batch_size, 1, 1, 1), dtype)
    found = (absent if x is None else x for x in (spans, moves))
    return Attached(*found, spans is not None, moves is not None)


def attached_to(potentials: Potentials) -> Attached | None:
    """Segment scores and transition scores of a batch."""
    p = potentials

    def rows(given: Tensor | None) -> np.ndarray | None:
        return None if given is None else array_of(given)

    return _record(rows(p.segment_scores), rows(p.transition_scores), p.batch_size)


def attached_like(
    p: Potentials, wanted: set[str], dtype: type[np.floating] | None = None
) -> Attached | None:
    """Zeros for gradients by those that are wanted, in the dtypes of the parameters or in one."""
    given = attached_to(p)
    if given is None:
        return None
    spans, moves = (
        np.zeros(x.shape if name in wanted else (p.batch_size, 1, 1, 1), dtype or x.dtype)
        for name, x in (("segment_scores", given.spans), ("transition_scores", given.moves))
    )
    return Attached(spans, moves, "segment_scores" in wanted, "transition_scores" in wanted)


@owning
def attached_of(batch, b):
    """`Attached` of sequence b of a batch."""
    if batch is None:
        return None
    return Attached(batch.spans[b], batch.moves[b], batch.has_spans, batch.has_moves)


@owning
def make_work(attached, model):
    """Workspace of the functions below."""
    if attached is None:
        return None
    num_labels, size = model.last.shape[0], model.bias.shape[0]
    width = model.scores.shape[0] // num_labels
    return Work(
        model.scores.copy(),
        np.full(width, -math.inf),
        np.full(width, -math.inf),
        np.zeros(width),
        np.zeros(num_labels),
        np.full(size, -math.inf),
        np.zeros(width),
    )


@helper
def spanned(attached, position, k, label, score):
    """`score` and that of the segment of k positions, K at most, from `position` on."""
    if attached is None:
        return score
    if not attached.has_spans:
        return score
    added = np.float64(attached.spans[position, k - 1, label])
    return score + added if added > NEG_INF else -math.inf


@helper
def moved(attached, position, source, label, score):
    """`score` and that of a transition at `position`, which is not 0."""
    if attached is None:
        return score
    if not attached.has_moves:
        return score
    added = np.float64(attached.moves[position, source, label])
    return score + added if added > NEG_INF else -math.inf


@helper
def add_spans(attached, position, length, longest, row):
    """Add the scores of the segments from `position` on that end in the sequence to a row (R,)."""
    if attached is None:
        return
    if not attached.has_spans:
        return
    spans = attached.spans[position]
    for k in range(min(longest, length - position)):
        for c in range(spans.shape[1]):
            score = np.float64(spans[k, c])
            row[c * longest + k] += score if score > NEG_INF else -math.inf


@helper
def fill_matrix(attached, position, scores, step, matrix):
    """matrix = the transitions at `position`: `scores` and those of the position, both (C * M,).

    Without the latter `matrix`, which holds `scores` to begin with, stays as it is.
    """
    if attached is None:
        return
    if not attached.has_moves:
        return
    moves = attached.moves[position]
    num_labels = moves.shape[0]
    width = matrix.shape[0] // num_labels
    for source in range(num_labels):
        for label in range(num_labels):
            score = np.float64(moves[source, label])
            added = score if score > NEG_INF else -math.inf
            first = source * width + label * step
            for j in range(first, first + step):
                matrix[j] = scores[j] + added


@helper
def spread_row(arriving, model, row):
    """row = the entry of a row of transitions for each label and duration."""
    longest, step = model.max_duration, model.step
    for j in range(model.last.shape[0] * longest):
        row[j] = arriving[j // longest] if step == 1 else arriving[j]


@helper
def reduce_row(row, model, terms, onward):
    """onward = log-sums over durations of a row (R,), or that itself for transitions by duration.

    `terms` (R,) is workspace.
    """
    num_labels, longest = model.last.shape[0], model.max_duration
    if model.step == longest:
        for j in range(num_labels * longest):
            onward[j] = row[j]
        return
    for label in range(num_labels):
        first = label * longest
        top = -math.inf
        for j in range(first, first + longest):
            top = max(top, row[j])
        onward[label] = top if top > NEG_INF else -math.inf
        for j in range(first, first + longest):
            terms[j] = row[j] - top if top > NEG_INF else -math.inf
    exp_row(terms, 0, terms, 0, terms.shape[0])
    for label in range(num_labels):
        if onward[label] > -math.inf:
            total = 0.0
            for j in range(label * longest, (label + 1) * longest):
                total += terms[j]
            onward[label] += math.log(total)


@helper
def arrive_in(attached, alpha, model, position, work, row):
    """row = gamma + D at `position` from alpha (C,), without the scores of segments."""
    if attached is None:
        return
    fill_matrix(attached, position, model.scores, model.step, work.matrix)
    for column in range(0, work.arriving.shape[0], TILE):
        exact_arrivals(alpha, work.matrix, column, work.arriving, work.sums)
    spread_row(work.arriving, model, row)
    for j in range(row.shape[0]):
        row[j] += model.bias[j]


@helper
def depart_to(attached, position, eta, model, work, beta):
    """beta (C,) before `position` from eta, a row with the scores of segments."""
    if attached is None:
        return
    fill_matrix(attached, position, model.scores, model.step, work.matrix)
    reduce_row(eta, model, work.terms, work.onward)
    for c in range(beta.shape[0]):
        beta[c] = exact_departure(work.onward, work.matrix, c)

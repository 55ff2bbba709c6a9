"""Decoding for static transitions: the max pass, and a walk back without back-pointers.

    h_s(c)     = max_{c'} [alpha_s(c') + A[c', c]] + start_s(c) - S_s(c)
    alpha_t(c) = S_t(c) + end_{t-1}(c) + max_{k=1..K} [h_{t-k}(c) + D_k(c)]

with the first segment's transition term in place of the maximum in h_0. The pass keeps h and alpha.
The walk recovers the duration of a segment by the argmax over k and the label before it by the
argmax over c': K + C work per segment, and nothing of size T·C·K. With a duration tail

    g_t(c) = tail(c) + max [g_{t-1}(c), h_{t-1-K}(c) + D_K(c)]

joins the second maximum for the durations beyond K, and the walk follows which of the two it was. S
and alpha are shifted by whole numbers as in `message_pass`; h does not change under that shift. S
of most labels falls behind alpha by about a nat per position: before it loses digits, it is brought
back to 0 by a whole number, which the h and g of the window gain. Those kept for the walk do not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import kernel_of_loops
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    boundary_arrays,
    cost_of,
    end_term,
    forbid,
    start_term,
    tail_term,
)
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.static.records import sequence_of
from flash_semicrf.streaming.cpu.static.tail import MASK, add_longer_max
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import TILE, max_tile
from flash_semicrf.streaming.cpu.walks import table_of_walks
from flash_semicrf.streaming.cpu.windows import forward_windows
from flash_semicrf.streaming.windows import Windows

__all__ = ["max_messages", "viterbi", "viterbi_of_pieces"]

_FAR = 1024.0
"""A frame beyond this is brought back between blocks."""


class _Problem(NamedTuple):
    """The arrays of a batch that the max pass reads.

    Attributes
    ----------
    scores, start_scores, end_scores, has_boundary, lengths, first, last
        As those of `flash_semicrf.streaming.cpu.static.records.Batch`.
    transition : float64 array of shape (C, C)
    bias : float64 array of shape (K, C)
    padded_bias : float64 array of shape (C * (K + 3 * TILE),)
        By label: D_k(c) at ``TILE + k`` of row c, -inf elsewhere.
    tail : float64 array of shape (C,) or None
    """

    scores: np.ndarray
    start_scores: np.ndarray
    end_scores: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    first: np.ndarray
    last: np.ndarray
    transition: np.ndarray
    bias: np.ndarray
    padded_bias: np.ndarray
    tail: np.ndarray | None


class _MaxRows(NamedTuple):
    """Messages of the max pass, of a batch, or without the first axis of a sequence.

    Attributes
    ----------
    alpha, sources : float64 arrays of shape (B, T, C)
        Row p: alpha_{p+1}, less its offset, and h_p.
    longer : float64 array of shape (B, T, C)
        g; (B, T, 0) without a tail.
    went_on : bool array of shape (B, T, C)
        g comes from the g before it.
    offset : float64 array of shape (B, T + 1)
    """

    alpha: np.ndarray
    sources: np.ndarray
    longer: np.ndarray
    went_on: np.ndarray
    offset: np.ndarray


class _Walks(NamedTuple):
    """Best segmentations of a batch.

    Attributes
    ----------
    best : float64 array of shape (B,)
    starts, labels : int64 arrays of shape (B, T)
        The last `counts` entries of each row.
    counts : int64 array of shape (B,)
    """

    best: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    counts: np.ndarray


@helper
def _bring_back(window, frame, rest, moved, newest, count):
    """Bring frames back to 0, and the `count` sources up to column `newest` and g with them."""
    capacity = window.shape[0] // frame.shape[0]
    for c in range(frame.shape[0]):
        if abs(frame[c]) > _FAR:
            shift = np.rint(frame[c])
            frame[c] -= shift
            moved[c] += shift
            rest[c] += shift
            last = c * capacity + newest
            for j in range(last + 1 - count, last + 1):
                window[j] += shift


@owning
def _max_pass(problem, sequence, rows):
    """Fill the rows of a sequence."""
    scores, start, end, length = (
        sequence.scores,
        sequence.opening,
        sequence.closing,
        sequence.length,
    )
    first, transition, bias = problem.first, problem.transition, problem.padded_bias
    has_boundary, alpha, sources = sequence.has_boundary, rows.alpha, rows.sources
    offset = rows.offset
    num_labels = first.shape[0]
    bias_row = bias.shape[0] // num_labels
    longest = bias_row - 3 * TILE
    capacity = longest + TILE * max(4, -(-longest // TILE))
    window = np.full(num_labels * capacity, -math.inf)
    live_until = np.full(num_labels, -1)
    sums = np.full(num_labels * TILE, -math.inf)
    frame = np.zeros(num_labels)  # S_t, less `moved`
    moved = np.zeros(num_labels)
    source = np.empty(num_labels)
    rest = np.full(num_labels, -math.inf)
    own = np.zeros(num_labels, np.bool_)
    base = 1 - longest
    offset[0] = 0.0
    for c in range(num_labels):
        source[c] = first[c]
    for block in range(0, length, TILE):
        if block + TILE - base >= capacity:
            drop = block + 1 - longest - base
            for c in range(num_labels):
                for i in range(c * capacity, c * capacity + longest):
                    window[i] = window[i + drop]
            base += drop
        _bring_back(window, frame, rest, moved, block - 1 - base, min(block, longest))
        for i in range(min(TILE, length - block)):
            step = block + i  # the source's step; the output's is one later
            for c in range(num_labels):
                h = source[c] - frame[c]
                if has_boundary:
                    h += start[step, c]
                # Where its label is forbidden none starts: nothing to clear from the window.
                h = h if h > NEG_INF and scores[step, c] > NEG_INF else -math.inf
                window[c * capacity + step - base] = h
                sources[step, c] = h - moved[c]
                if h > NEG_INF:
                    live_until[c] = step + longest
                if i == 0:
                    sums[c * TILE : (c + 1) * TILE] = -math.inf
                    if live_until[c] > step:
                        oldest = c * capacity + step + 1 - longest - base
                        far = c * bias_row + TILE + longest
                        max_tile(window, oldest, 1, bias, far, -1, longest, sums, c * TILE)
                elif h > NEG_INF:
                    near = c * bias_row + TILE + 1 - i
                    max_tile(
                        window, c * capacity + step - base, 1, bias, near, 0, 1, sums, c * TILE
                    )
            top = -math.inf
            for c in range(num_labels):
                x = scores[step, c]
                if abs(x) < MASK:
                    frame[c] += x
                elif live_until[c] > step:
                    # What forbids or masks goes to the sources: in the frame it would take the
                    # precision of those that come.
                    x = x if x > NEG_INF else -math.inf
                    newest = c * capacity + step - base
                    for j in range(newest - min(step, longest - 1), newest + 1):
                        window[j] += x
                    for j in range(c * TILE + i, (c + 1) * TILE):
                        sums[j] += x
                    if x == -math.inf:
                        live_until[c] = -1
                x = frame[c] + sums[c * TILE + i]
                if has_boundary:
                    x += end[step, c]
                alpha[step, c] = x if x > NEG_INF else -math.inf
                top = max(top, alpha[step, c])
            oldest = step + 1 - longest - base if step + 1 >= longest else -1
            top = add_longer_max(
                problem.tail, top, (rest, own), sequence, step, rows, frame, window, oldest, bias
            )
            for c in range(rows.longer.shape[1]):
                rows.longer[step, c] -= moved[c]
            shift = 0.0
            if i == TILE - 1 and top > NEG_INF:
                if top < -MASK:
                    # All that ends here is masked: what goes on must not be shifted by as much.
                    for c in range(num_labels):
                        top = max(top, rest[c] + frame[c])
                        newest = c * capacity + step - base
                        for j in range(newest - min(step, longest - 1), newest + 1):
                            top = max(top, window[j] + frame[c])
                shift = np.rint(top)
            offset[step + 1] = offset[step] + shift
            for c in range(num_labels):
                alpha[step, c] -= shift
                frame[c] -= shift
            if step + 1 < length:
                for c in range(num_labels):
                    source[c] = -math.inf
                for c_src in range(num_labels):
                    value = alpha[step, c_src]
                    for c in range(num_labels):
                        x = value + transition[c_src, c]
                        source[c] = x if x > source[c] else source[c]


@helper
def _best_duration(scores, bias, rows, stop, label):
    """Duration of the best segment that ends before `stop`; the shortest of equals."""
    sources, longer, went_on = rows.sources, rows.longer, rows.went_on
    best = -math.inf
    duration = 0
    masks = 0.0
    for k in range(1, min(bias.shape[0], stop) + 1):
        score = scores[stop - k, label]
        if not score > NEG_INF:
            break
        if not abs(score) < MASK:
            masks += score
        x = sources[stop - k, label] + bias[k - 1, label] + masks
        if x > best:
            best = x
            duration = k
    if went_on.shape[1] > 0 and longer[stop - 1, label] > best:
        duration = bias.shape[0] + 1
        while went_on[stop - duration + bias.shape[0], label]:
            duration += 1
    return duration


@owning
def _walk(problem, sequence, rows, starts, labels):
    """Write the segments backwards into the end of `starts` and `labels`; return their number."""
    scores, length, alpha = sequence.scores, sequence.length, rows.alpha
    bias, transition, last = problem.bias, problem.transition, problem.last
    num_labels = last.shape[0]
    value = alpha[length - 1] + last
    capacity = starts.shape[0]
    count = 0
    stop = length
    while stop > 0:
        best = value.max()
        label = -1
        duration = 0
        for c in range(num_labels):
            if value[c] == best:
                k = _best_duration(scores, bias, rows, stop, c)
                if label < 0 or k < duration:
                    label = c
                    duration = k
        count += 1
        stop -= duration
        starts[capacity - count] = stop
        labels[capacity - count] = label
        if stop > 0:
            for c in range(num_labels):
                value[c] = alpha[stop - 1, c] + transition[c, label]
    return count


@kernel_of_loops
def _run(queue, decode, problem, rows, walks):
    b = take(queue)
    while b >= 0:
        sequence = sequence_of(problem, b, False)
        own = _MaxRows(
            rows.alpha[b], rows.sources[b], rows.longer[b], rows.went_on[b], rows.offset[b]
        )
        _max_pass(problem, sequence, own)
        length = sequence.length
        best = own.offset[length] + (own.alpha[length - 1] + problem.last).max()
        walks.best[b] = best
        walks.counts[b] = 0
        if decode and best > -math.inf:
            starts, labels = walks.starts[b], walks.labels[b]
            walks.counts[b] = _walk(problem, sequence, own, starts, labels)
        b = take(queue)


def _decode(p: Potentials, decode: bool) -> tuple[_MaxRows, _Walks]:
    """Messages of the max pass, and with `decode` the best segmentations."""
    scores = array_of(p.scores)
    has_boundary, start, end = boundary_arrays(p, scores)
    bias = forbid(array_of(p.duration_bias))
    padded = np.full((p.num_labels, p.max_duration + 3 * TILE), -np.inf)
    padded[:, TILE + 1 : TILE + 1 + p.max_duration] = bias.T
    lengths, tail = array_of(p.lengths), tail_term(p)
    first, last, transition = start_term(p), end_term(p), forbid(array_of(p.transition))
    given = (scores, start, end, has_boundary, lengths, first, last, transition, bias)
    problem = _Problem(*given, padded.ravel(), tail)
    shape = (*scores.shape[:2], p.num_labels if tail is not None else 0)
    # Zeros, not empty: the rows of padding are converted along with the others.
    alpha, sources = np.zeros(scores.shape), np.empty(scores.shape)
    offset = np.zeros((p.batch_size, p.num_positions + 1))
    rows = _MaxRows(alpha, sources, np.empty(shape), np.zeros(shape, np.bool_), offset)
    starts, labels = np.empty((2, p.batch_size, p.num_positions if decode else 1), dtype=np.int64)
    best, counts = np.empty(p.batch_size), np.empty(p.batch_size, dtype=np.int64)
    walks = _Walks(best, starts, labels, counts)
    given = (decode, problem, rows, walks)
    threads.run(_run, np.arange(p.batch_size), lengths * cost_of(p), given)
    return rows, walks


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    _, walks = _decode(potentials, decode=True)
    lengths = array_of(potentials.lengths)
    table = table_of_walks(walks.starts, walks.labels, walks.counts, lengths)
    return torch.from_numpy(walks.best), table


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best segmentations and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    rows, walks = _decode(p, decode=True)
    lengths = array_of(p.lengths)
    table = table_of_walks(walks.starts, walks.labels, walks.counts, lengths)
    windows = forward_windows(rows.alpha, rows.offset, p, core)
    return torch.from_numpy(walks.best), table, windows


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    rows, _ = _decode(potentials, decode=False)
    alpha = rows.alpha
    alpha += rows.offset[:, 1:, None]
    return torch.from_numpy(np.concatenate([np.zeros_like(alpha[:, :1]), alpha], 1))

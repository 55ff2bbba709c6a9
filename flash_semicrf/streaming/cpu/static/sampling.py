"""Segmentations drawn from their distribution, for static transitions.

The forward pass keeps alpha and gamma. Then each sample is a walk from the end: at position s,
before a segment of label c, the label there and its segment's duration are drawn by

    P(c' | s, c)  = exp(alpha_s(c') + A[c', c] - gamma_s(c))
    P(k  | s, c') = exp(gamma_{s-k}(c') + start_{s-k}(c') + D_k(c') + S_s(c') - S_{s-k}(c')
                        + end_{s-1}(c') - alpha_s(c'))

from uniform numbers, by adding up terms until their sum exceeds the number: the totals are known
beforehand, so the terms after it are never computed. (Forward filtering, backward sampling: Scott
2002, "Bayesian methods for hidden Markov models", JASA 97.) Durations come in rising order, and
with a duration tail go on beyond K in the same way. Cost about k + C per segment.

All samples of a task walk through a block of positions before the next block: for its positions the
exponentials of alpha, gamma and the first duration are taken once, as rows. A total that is too
small for them is drawn from by logarithms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import CERTAIN, padded_labels
from flash_semicrf.streaming.cpu.parts import helper, inlined
from flash_semicrf.streaming.cpu.static.batch import batch_of, forward_messages, rows_of
from flash_semicrf.streaming.cpu.static.records import Batch, Rows, sequence_of
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import exp_row
from flash_semicrf.streaming.cpu.vector_search import count_below
from flash_semicrf.streaming.cpu.walks import NEGLIGIBLE, draw, sample_walks
from flash_semicrf.streaming.windows import Forward

__all__ = ["sample", "sample_from"]

_BLOCK = 32  # positions whose rows are prepared at once


class _Model(NamedTuple):
    """Parameters in the form that walks read.

    Attributes
    ----------
    into : float64 array of shape (C + 1, C)
        Row c: the way into label c, by the label it comes from; row C: out of the last label.
    weights : float64 array of shape (C * padded C,)
        exp(into[c] - peak[c]) of labels c < C, in padded rows.
    peak : float64 array of shape (C,)
    bias : float64 array of shape (C, K + 1)
    tail : float64 array of shape (C,)
        -inf without one.
    """

    into: np.ndarray
    weights: np.ndarray
    peak: np.ndarray
    bias: np.ndarray
    tail: np.ndarray


class _Forward(NamedTuple):
    """Messages of the forward pass of one sequence.

    Attributes
    ----------
    alpha, gamma : float64 arrays of shape (T, C)
    offsets : float64 array of shape (T + 1,)
    value : float
        Log Z less the offset of the last message.
    """

    alpha: np.ndarray
    gamma: np.ndarray
    offsets: np.ndarray
    value: float


class _Walks(NamedTuple):
    """Where the samples of a sequence stand, and what they have passed.

    Attributes
    ----------
    first, last : int
        The samples of the task are those of ``[first, last)``.
    positions, nexts : int64 arrays of shape (N,)
        First position of the segment drawn last, and its label, C before the first draw.
    state, increment : uint64 arrays of shape (N,)
        Streams of random numbers.
    counts, starts, labels : integer arrays of shape (N,), (N, T), (N, T)
        Segments drawn, from the end of each row.
    """

    first: int
    last: int
    positions: np.ndarray
    nexts: np.ndarray
    state: np.ndarray
    increment: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    labels: np.ndarray


@helper
def _exponents(sequence, forward, model, begin, stop, rows):
    """Fill the rows of the positions begin + 1..stop and take their exponentials.

    Three rows per position s, of padded labels each: exp(alpha_s(c) - top), top the largest
    alpha; exp(gamma_s(c) - top - peak(c)), the total of the label draw; P(k = 1 | s, c).
    """
    scores, start, end = sequence.scores, sequence.opening, sequence.closing
    alpha, gamma, offsets = forward.alpha, forward.gamma, forward.offsets
    bias, peak, has_boundary = model.bias, model.peak, sequence.has_boundary
    num_labels = scores.shape[1]
    padded = -(-num_labels // LANES) * LANES
    for s in range(begin + 1, stop + 1):
        first = 3 * (s - begin - 1) * padded
        shift = offsets[s - 1] - offsets[s]
        top = -math.inf
        for c in range(num_labels):
            top = max(top, alpha[s - 1, c])
        for c in range(num_labels):
            rows[first + c] = alpha[s - 1, c] - top
            x = gamma[s - 1, c] + shift + bias[c, 1] + scores[s - 1, c] - alpha[s - 1, c]
            if has_boundary:
                x += start[s - 1, c] + end[s - 1, c]
            rows[first + 2 * padded + c] = x
        if s < gamma.shape[0]:
            for c in range(num_labels):
                rows[first + padded + c] = gamma[s, c] - top - peak[c]
    exp_row(rows, 0, rows, 0, 3 * (stop - begin) * padded)


@helper
def _exact_label(alpha, into, following, position, total, u):
    """Draw the label before `position` by logarithms."""
    acc = 0.0
    label = -1
    for c in range(into.shape[1]):
        x = alpha[position - 1, c] + into[following, c] - total
        if x > NEGLIGIBLE or (label < 0 and x > NEG_INF):
            acc += math.exp(x)
            label = c
            if acc > u:
                break
    return label


@inlined
def _later_duration(sequence, forward, model, stop, label, acc, u):
    """Draw a duration of 2 or more: `acc` is P(k = 1)."""
    scores, start, has_boundary = sequence.scores, sequence.opening, sequence.has_boundary
    gamma, offsets, bias, tail = forward.gamma, forward.offsets, model.bias, model.tail
    duration = 1 if acc > 0.0 else 0
    longest = bias.shape[1] - 1
    last = stop if tail[label] > NEG_INF else min(longest, stop)
    total = forward.alpha[stop - 1, label]
    if has_boundary:
        total -= sequence.closing[stop - 1, label]
    content = float(scores[stop - 1, label])
    for k in range(2, last + 1):
        s = stop - k
        content += scores[s, label]
        if not content > NEG_INF:
            break
        weight = bias[label, min(k, longest)]
        if k > longest:
            weight += (k - longest) * tail[label]
        x = gamma[s, label] + (offsets[s] - offsets[stop]) + weight + content - total
        if has_boundary:
            x += start[s, label]
        if x > NEGLIGIBLE or (duration == 0 and x > NEG_INF):
            acc += math.exp(x)
            duration = k
            if acc > u:
                break
    return duration


@helper
def _walk_block(sequence, forward, model, begin, stop, rows, walks):
    """Carry every sample that stands at one of begin + 1..stop on, to `begin` or before it."""
    num_labels = sequence.scores.shape[1]
    padded = -(-num_labels // LANES) * LANES
    alpha, gamma, into, weights = forward.alpha, forward.gamma, model.into, model.weights
    positions, nexts, counts = walks.positions, walks.nexts, walks.counts
    state, increment, starts, labels = walks.state, walks.increment, walks.starts, walks.labels
    capacity = starts.shape[1]
    for position in range(stop, begin, -1):
        row = 3 * (position - begin - 1) * padded
        totals, firsts = row + padded, row + 2 * padded
        # Sample after sample, not walk after walk: the draws at one position do not wait for each
        # other, and the search for the label has no branch that could be mispredicted.
        for j in range(walks.first, walks.last):
            if positions[j] != position:
                continue
            following = nexts[j]
            count = counts[j]
            u = draw(state[j], increment[j], np.uint64(2 * count))
            label = num_labels
            if following < num_labels and rows[totals + following] >= CERTAIN:
                bound = u * rows[totals + following]
                label = count_below(rows, row, weights, following * padded, padded, bound)
            if label >= num_labels:
                total = forward.value if following == num_labels else gamma[position, following]
                label = _exact_label(alpha, into, following, position, total, u)
            u = draw(state[j], increment[j], np.uint64(2 * count + 1))
            duration = 1
            acc = rows[firsts + label]
            if not acc > u:
                duration = _later_duration(sequence, forward, model, position, label, acc, u)
            positions[j] = position - duration
            nexts[j] = label
            counts[j] = count + 1
            starts[j, capacity - 1 - count] = position - duration
            labels[j, capacity - 1 - count] = label


@kernel
def _run(queue, shares, batch, messages, model, stream, counts, starts, labels):
    """Task i is the samples (sequence, first, last) in row i of `shares`."""
    num_labels = batch.scores.shape[2]
    padded = -(-num_labels // LANES) * LANES
    rows = np.zeros(3 * _BLOCK * padded)
    positions = np.zeros(counts.shape[1], dtype=np.int64)
    nexts = np.zeros(counts.shape[1], dtype=np.int64)
    task = take(queue)
    while task >= 0:
        b, first_sample, last_sample = shares[task]
        sequence = sequence_of(batch, b, False)
        length, value = sequence.length, messages.total[b, 1]
        forward = _Forward(messages.alpha[b], messages.gamma[b], messages.forward[b], value)
        walks = _Walks(
            first_sample,
            last_sample,
            positions,
            nexts,
            stream[0, :, b],
            stream[1, :, b],
            counts[b],
            starts[b],
            labels[b],
        )
        for j in range(first_sample, last_sample):
            positions[j] = length
            nexts[j] = num_labels
        for block in range((length - 1) // _BLOCK, -1, -1):
            begin = block * _BLOCK
            stop = min(begin + _BLOCK, length)
            furthest = 0
            for j in range(first_sample, last_sample):
                furthest = max(furthest, positions[j])
            if furthest <= begin:
                continue
            _exponents(sequence, forward, model, begin, stop, rows)
            _walk_block(sequence, forward, model, begin, stop, rows, walks)
        task = take(queue)


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    return _drawn(potentials, *forward_messages(potentials), num_samples, seed)


def sample_from(p: Potentials, forward: Forward, num_samples: int, seed: int) -> SegmentTable:
    """Draw from messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    return _drawn(p, batch_of(p), rows_of(p, forward), num_samples, seed)


def _drawn(p: Potentials, batch: Batch, rows: Rows, num_samples: int, seed: int) -> SegmentTable:
    num_labels, padded = p.num_labels, padded_labels(p.num_labels)
    into = np.vstack([np.ascontiguousarray(batch.forward.scores.T), batch.last])
    weights = np.zeros((num_labels, padded))
    weights[:, :num_labels] = batch.forward.weights.reshape(num_labels, padded)[:, :num_labels].T
    tail = np.full(num_labels, -np.inf) if batch.window.tail is None else batch.window.tail
    model = _Model(into, weights.ravel(), batch.forward.peak, batch.window.bias, tail)
    return sample_walks(p, num_samples, seed, rows.total[:, 1], _run, (batch, rows, model))

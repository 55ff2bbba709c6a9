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

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu.jit import helper, inlined, kernel
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import padded_labels
from flash_semicrf.streaming.cpu.static.batch import forward_messages
from flash_semicrf.streaming.cpu.static.passes import CERTAIN
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import exp_row
from flash_semicrf.streaming.cpu.vector_search import count_below
from flash_semicrf.streaming.cpu.walks import NEGLIGIBLE, draw, sample_walks

__all__ = ["sample"]

_BLOCK = 32  # positions whose rows are prepared at once


@helper
def _exponents(
    scores, start, end, has_boundary, alpha, gamma, offsets, peak, bias, begin, stop, padded, rows
):
    """Fill the rows of the positions begin + 1..stop and take their exponentials.

    Three rows per position s, of `padded` labels each: exp(alpha_s(c) - top), top the largest
    alpha; exp(gamma_s(c) - top - peak(c)), the total of the label draw; P(k = 1 | s, c).
    """
    num_labels = scores.shape[1]
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
def _later_duration(
    scores, start, end, has_boundary, alpha, gamma, offsets, bias, tail, stop, label, acc, u
):
    """Draw a duration of 2 or more: `acc` is P(k = 1)."""
    duration = 1 if acc > 0.0 else 0
    longest = bias.shape[1] - 1
    last = stop if tail[label] > NEG_INF else min(longest, stop)
    total = alpha[stop - 1, label]
    if has_boundary:
        total -= end[stop - 1, label]
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
def _walk_block(
    scores, start, end, has_boundary, alpha, gamma, offsets, value, into, weights, bias, tail,
    begin, stop, padded, rows, state, increment, first_sample, last_sample, positions, nexts,
    counts, starts, labels,
):  # fmt: skip
    """Carry every sample that stands at one of begin + 1..stop on, to `begin` or before it."""
    num_labels = scores.shape[1]
    capacity = starts.shape[1]
    for position in range(stop, begin, -1):
        row = 3 * (position - begin - 1) * padded
        totals, firsts = row + padded, row + 2 * padded
        # Sample after sample, not walk after walk: the draws at one position do not wait for each
        # other, and the search for the label has no branch that could be mispredicted.
        for j in range(first_sample, last_sample):
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
                total = value if following == num_labels else gamma[position, following]
                label = _exact_label(alpha, into, following, position, total, u)
            u = draw(state[j], increment[j], np.uint64(2 * count + 1))
            duration = 1
            acc = rows[firsts + label]
            if not acc > u:
                duration = _later_duration(
                    scores, start, end, has_boundary, alpha, gamma, offsets, bias, tail, position,
                    label, acc, u,
                )  # fmt: skip
            positions[j] = position - duration
            nexts[j] = label
            counts[j] = count + 1
            starts[j, capacity - 1 - count] = position - duration
            labels[j, capacity - 1 - count] = label


@kernel
def _run(
    queue, shares, scores, start, end, has_boundary, lengths, alpha, gamma, offsets, total, into,
    weights, peak, bias, tail, stream, counts, starts, labels,
):  # fmt: skip
    """Task i is the samples (sequence, first, last) in row i of `shares`."""
    num_labels = scores.shape[2]
    padded = -(-num_labels // LANES) * LANES
    rows = np.zeros(3 * _BLOCK * padded)
    positions = np.zeros(counts.shape[1], dtype=np.int64)
    nexts = np.zeros(counts.shape[1], dtype=np.int64)
    task = take(queue)
    while task >= 0:
        b, first_sample, last_sample = shares[task]
        length = lengths[b]
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
            _exponents(
                scores[b], start[b], end[b], has_boundary, alpha[b], gamma[b], offsets[b], peak,
                bias, begin, stop, padded, rows,
            )  # fmt: skip
            _walk_block(
                scores[b], start[b], end[b], has_boundary, alpha[b], gamma[b], offsets[b],
                total[b, 1], into, weights, bias, tail, begin, stop, padded, rows,
                stream[0, :, b], stream[1, :, b], first_sample, last_sample, positions, nexts,
                counts[b], starts[b], labels[b],
            )  # fmt: skip
        task = take(queue)


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    batch, rows = forward_messages(p)
    # Row c: the way into label c, by the label it comes from; row C: out of the last label.
    num_labels, padded = p.num_labels, padded_labels(p.num_labels)
    into = np.concatenate([batch.forward.scores.T, batch.last[None]])
    weights = np.zeros((num_labels, padded))
    weights[:, :num_labels] = batch.forward.weights.reshape(num_labels, padded)[:, :num_labels].T
    tail = np.full(num_labels, -np.inf) if batch.window.tail is None else batch.window.tail
    given = (batch.scores, batch.start_scores, batch.end_scores, batch.has_boundary)
    messages = (batch.lengths, rows.alpha, rows.gamma, rows.forward, rows.total)
    model = (into, weights.ravel(), batch.forward.peak, batch.window.bias, tail)
    return sample_walks(p, num_samples, seed, rows.total[:, 1], _run, (*given, *messages, *model))

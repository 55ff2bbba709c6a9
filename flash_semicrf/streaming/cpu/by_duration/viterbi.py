"""Decoding for transitions by duration: the max pass, and a walk back without back-pointers.

The pass is that of `flash_semicrf.streaming.cpu.by_duration.passes` with maxima for sums, the first
segment's transition term apart, and keeps alpha. The walk recovers the label and the duration of
each segment as an argmax: K·C work per segment and label that ties. Where a segment is longer than
K, the pass has written down its start.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu import pool
from flash_semicrf.streaming.cpu.by_duration.parameters import arrivals_of
from flash_semicrf.streaming.cpu.by_duration.tail import (
    best_longer,
    extend_best,
    make_origins,
    note_beaten,
)
from flash_semicrf.streaming.cpu.by_duration.window import (
    absorb,
    copy_row,
    highest,
    make_window,
    slide_left,
    whole_level,
)
from flash_semicrf.streaming.cpu.jit import helper, kernel
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, end_term
from flash_semicrf.streaming.cpu.static.batch import boundary_arrays
from flash_semicrf.streaming.cpu.static.viterbi import table_of_walks
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import TILE, max_tile

__all__ = ["max_messages", "viterbi"]

_BLOCK = 64  # positions between two slides of the window


@helper
def _push(tail, window, origins, column, start, has_boundary, position, values):
    """Add the source at `position` to the K outputs from `column` on."""
    longest = window.max_duration
    for c in range(window.frame.shape[0]):
        shift = -window.frame[c]
        if has_boundary:
            shift += start[position, c]
        first = c * window.capacity + column
        note_beaten(tail, origins, window.values, first, values, c * longest, shift, longest)
        tops = window.values[first : first + longest]
        source = values[c * longest : (c + 1) * longest]
        for k in range(longest):
            tops[k] = max(tops[k], source[k] + shift)


@helper
def _final_row(alpha, last):
    """alpha + last."""
    row = np.empty(last.shape[0])
    for c in range(last.shape[0]):
        row[c] = alpha[c] + last[c]
    return row


@helper
def _max_pass(scores, start, end, has_boundary, length, arrivals, alpha_rows, origin_rows, offsets):
    """Fill alpha_rows (T, C) and offsets (T + 1,) as `forward_pass` does.

    With a tail also origin_rows (T, C), where the best segments start, if above K, else -1.
    """
    num_labels = scores.shape[1]
    size = arrivals.bias.shape[0]
    window = make_window(num_labels, arrivals.max_duration, _BLOCK)
    origins = make_origins(arrivals.tail, window)
    values = np.empty(size)
    copy_row(arrivals.first, values)
    offsets[0] = 0.0
    for position in range(length):
        column = position % _BLOCK
        alpha = alpha_rows[position]
        _push(arrivals.tail, window, origins, column, start, has_boundary, position, values)
        for c in range(num_labels):
            absorb(window, c, scores[position, c])
            x = window.values[c * window.capacity + column] + window.frame[c]
            if has_boundary:
                x += end[position, c]
            alpha[c] = x if x > NEG_INF else -math.inf
        extend_best(arrivals.tail, window, origins, column, position, origin_rows)
        top = highest(alpha)
        last = column == _BLOCK - 1
        shift = whole_level(top, window) if last else 0.0
        offsets[position + 1] = offsets[position] + shift
        if last:
            for c in range(num_labels):
                alpha[c] -= shift
                window.frame[c] -= shift
            slide_left(window)
        values[:] = -math.inf
        for j in range(0, size, TILE):
            max_tile(alpha, 0, 1, arrivals.scores, j, size, num_labels, values, j)
        for j in range(size):
            values[j] += arrivals.bias[j]


@helper
def _best_duration(
    scores, start, has_boundary, stop, label, arrivals, alpha_rows, origin_rows, offsets
):
    """Shortest best duration of a segment of `label` that ends before `stop`."""
    longest = arrivals.max_duration
    size = arrivals.bias.shape[0]
    content = 0.0
    best = -math.inf
    duration = best_longer(arrivals.tail, origin_rows, stop, label)
    if duration > 0:
        return duration
    for k in range(1, min(longest, stop) + 1):
        position = stop - k
        if not scores[position, label] > NEG_INF:
            break
        content += scores[position, label]
        j = label * longest + k - 1
        if position == 0:
            source = arrivals.first[j]
        else:
            source = -math.inf
            for c in range(alpha_rows.shape[1]):
                source = max(source, alpha_rows[position - 1, c] + arrivals.scores[c * size + j])
            source += arrivals.bias[j]
        x = source + content + (offsets[position] - offsets[stop])
        if has_boundary:
            x += start[position, label]
        if x > best:
            best = x
            duration = k
    return duration


@helper
def _walk(
    scores, start, has_boundary, length, last, arrivals, alpha_rows, origin_rows, offsets, starts,
    labels,
):  # fmt: skip
    """Write the segments backwards into the end of `starts` and `labels`; return their number."""
    num_labels = last.shape[0]
    size = arrivals.bias.shape[0]
    value = _final_row(alpha_rows[length - 1], last)
    count = 0
    stop = length
    while stop > 0:
        best = highest(value)
        label = -1
        duration = 0
        for c in range(num_labels):
            if value[c] == best:
                k = _best_duration(
                    scores, start, has_boundary, stop, c, arrivals, alpha_rows, origin_rows, offsets
                )
                if label < 0 or k < duration:
                    label = c
                    duration = k
        count += 1
        stop -= duration
        starts[starts.shape[0] - count] = stop
        labels[starts.shape[0] - count] = label
        if stop > 0:
            j = label * arrivals.max_duration + min(duration, arrivals.max_duration) - 1
            for c in range(num_labels):
                value[c] = alpha_rows[stop - 1, c] + arrivals.scores[c * size + j]
    return count


@kernel
def _run(
    queue, decode, scores, start, end, has_boundary, lengths, last, arrivals, alpha, origins,
    offsets, best, starts, labels, counts,
):  # fmt: skip
    b = take(queue)
    while b >= 0:
        length = lengths[b]
        _max_pass(
            scores[b], start[b], end[b], has_boundary, length, arrivals, alpha[b], origins[b],
            offsets[b],
        )  # fmt: skip
        best[b] = offsets[b, length] + highest(_final_row(alpha[b, length - 1], last))
        counts[b] = 0
        if decode and best[b] > -math.inf:
            counts[b] = _walk(
                scores[b], start[b], has_boundary, length, last, arrivals, alpha[b], origins[b],
                offsets[b], starts[b], labels[b],
            )  # fmt: skip
        b = take(queue)


def _decode(p: Potentials, decode: bool) -> tuple[np.ndarray, ...]:
    p = p.to(torch.float64)
    scores = array_of(p.scores)
    has_boundary, start, end = boundary_arrays(p, scores)
    arrivals = arrivals_of(p)
    last, lengths = end_term(p), array_of(p.lengths)
    alpha = np.zeros(scores.shape)
    longer = scores.shape if p.duration_tail is not None else (p.batch_size, 1, 1)
    origins = np.empty(longer, dtype=np.int32)
    offsets = np.zeros((p.batch_size, p.num_positions + 1))
    best = np.empty(p.batch_size)
    starts, labels = np.empty((2, p.batch_size, p.num_positions if decode else 1), dtype=np.int64)
    counts = np.empty(p.batch_size, dtype=np.int64)
    given = (decode, scores, start, end, has_boundary, lengths, last, arrivals)
    found = (alpha, origins, offsets, best, starts, labels, counts)
    pool.run(_run, np.arange(p.batch_size), lengths * cost_of(p), (*given, *found))
    return alpha, offsets, best, starts, labels, counts


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    _, _, best, starts, labels, counts = _decode(potentials, decode=True)
    table = table_of_walks(starts, labels, counts, array_of(potentials.lengths))
    return torch.from_numpy(best), table


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    alpha, offsets, *_ = _decode(potentials, decode=False)
    alpha += offsets[:, 1:, None]
    return torch.from_numpy(np.concatenate([np.zeros_like(alpha[:, :1]), alpha], 1))

"""Decoding by duration: the max pass, and a walk back without back-pointers.

The pass is that of `flash_semicrf.streaming.cpu.by_duration.passes` with maxima for sums, the first
segment's transition term apart, and keeps alpha. The walk recovers the label and the duration of
each segment as an argmax: K·C work per segment and label that ties. Where a segment is longer than
K, the pass has written down its start.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import in_float64
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.by_duration.attached import (
    add_spans,
    fill_matrix,
    make_work,
    moved,
    spanned,
    spread_row,
)
from flash_semicrf.streaming.cpu.by_duration.model import (
    model_of,
    sequence_of,
    sequences_of,
    transition_place,
)
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
from flash_semicrf.streaming.cpu.jit import kernel_of_loops
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of
from flash_semicrf.streaming.cpu.parts import inlined, owning
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import TILE, fill, max_tile
from flash_semicrf.streaming.cpu.walks import table_of_walks
from flash_semicrf.streaming.cpu.windows import forward_windows
from flash_semicrf.streaming.windows import Windows

__all__ = ["max_messages", "viterbi", "viterbi_of_pieces"]

_BLOCK = 64  # positions between two slides of the window


class _Paths(NamedTuple):
    """Messages and segments of one sequence; those of a batch have a leading axis."""

    alpha: np.ndarray  # (T, C)
    origins: np.ndarray  # (T, C) with a tail: where the best segments start, if above K, else -1
    offsets: np.ndarray  # (T + 1,)
    starts: np.ndarray  # (T,), or (1,) without decoding: filled from the end
    labels: np.ndarray


@inlined
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


@inlined
def _arrive(attached, alpha, model, position, work, values):
    """values = max over c' of alpha(c') and the transition, a row."""
    fill(values, 0, values.shape[0], -math.inf)
    if attached is None:
        for j in range(0, values.shape[0], TILE):
            size, count = values.shape[0], alpha.shape[0]
            max_tile(alpha, 0, 1, model.scores, j, size, count, values, j)
        return
    fill_matrix(attached, position, model.scores, model.step, work.matrix)
    width = work.arriving.shape[0]
    fill(work.arriving, 0, width, -math.inf)
    for j in range(0, width, TILE):
        max_tile(alpha, 0, 1, work.matrix, j, width, alpha.shape[0], work.arriving, j)
    spread_row(work.arriving, model, values)


@owning
def _max_pass(sequence, model, paths):
    """Fill alpha and its offsets as `forward_pass` does, and with a tail the origins."""
    num_labels, size = model.last.shape[0], model.bias.shape[0]
    window = make_window(num_labels, model.max_duration, _BLOCK)
    origins = make_origins(model.tail, window)
    scores, start, end, has_boundary, length, attached = sequence
    work = make_work(attached, model)
    messages, offsets, values = paths.alpha, paths.offsets, np.empty(size)
    copy_row(model.first, values)
    offsets[0] = 0.0
    for position in range(length):
        column = position % _BLOCK
        alpha = messages[position]
        add_spans(attached, position, length, model.max_duration, values)
        _push(model.tail, window, origins, column, start, has_boundary, position, values)
        for c in range(num_labels):
            absorb(window, c, scores[position, c])
            x = window.values[c * window.capacity + column] + window.frame[c]
            if has_boundary:
                x += end[position, c]
            alpha[c] = x if x > NEG_INF else -math.inf
        extend_best(model.tail, window, origins, column, position, paths.origins)
        top = highest(alpha)
        last = column == _BLOCK - 1
        shift = whole_level(top, window) if last else 0.0
        offsets[position + 1] = offsets[position] + shift
        if last:
            for c in range(num_labels):
                alpha[c] -= shift
                window.frame[c] -= shift
            slide_left(window)
        if position == length - 1:
            break
        _arrive(attached, alpha, model, position + 1, work, values)
        for j in range(size):
            values[j] += model.bias[j]


@inlined
def _best_duration(sequence, model, paths, stop, label):
    """Shortest best duration of a segment of `label` that ends before `stop`."""
    longest, width = model.max_duration, model.scores.shape[0] // model.last.shape[0]
    attached = sequence.attached
    content = 0.0
    best = -math.inf
    duration = best_longer(model.tail, paths.origins, stop, label)
    if duration > 0:
        return duration
    for k in range(1, min(longest, stop) + 1):
        position = stop - k
        if not sequence.scores[position, label] > NEG_INF:
            break
        content += sequence.scores[position, label]
        j = label * longest + k - 1
        if position == 0:
            source = model.first[j]
        else:
            source = -math.inf
            place = transition_place(model, label, k)
            for c in range(model.last.shape[0]):
                into = moved(attached, position, c, label, model.scores[c * width + place])
                source = max(source, paths.alpha[position - 1, c] + into)
            source += model.bias[j]
        source = spanned(attached, position, k, label, source)
        x = source + content + (paths.offsets[position] - paths.offsets[stop])
        if sequence.has_boundary:
            x += sequence.start[position, label]
        if x > best:
            best = x
            duration = k
    return duration


@owning
def _walk(sequence, model, paths, value):
    """Write the segments, the last one first; return their number.

    `value` (C,), the last message with the final scores, is overwritten.
    """
    capacity, width = paths.starts.shape[0], model.scores.shape[0] // model.last.shape[0]
    attached = sequence.attached
    count = 0
    stop = sequence.length
    while stop > 0:
        best = highest(value)
        label = -1
        duration = 0
        for c in range(value.shape[0]):
            if value[c] == best:
                k = _best_duration(sequence, model, paths, stop, c)
                if label < 0 or k < duration:
                    label = c
                    duration = k
        count += 1
        stop -= duration
        paths.starts[capacity - count] = stop
        paths.labels[capacity - count] = label
        if stop > 0:
            place = transition_place(model, label, duration)
            for c in range(value.shape[0]):
                into = moved(attached, stop, c, label, model.scores[c * width + place])
                value[c] = paths.alpha[stop - 1, c] + into
    return count


@kernel_of_loops
def _run(queue, decode, sequences, model, found, best, counts):
    value = np.empty(model.last.shape[0])
    b = take(queue)
    while b >= 0:
        sequence, offsets = sequence_of(sequences, b), found.offsets[b]
        alpha, origins = found.alpha[b], found.origins[b]
        paths = _Paths(alpha, origins, offsets, found.starts[b], found.labels[b])
        _max_pass(sequence, model, paths)
        for c in range(value.shape[0]):
            value[c] = alpha[sequence.length - 1, c] + model.last[c]
        best[b] = offsets[sequence.length] + highest(value)
        counts[b] = 0
        if decode and best[b] > -math.inf:
            counts[b] = _walk(sequence, model, paths, value)
        b = take(queue)


def _decoded(p: Potentials, decode: bool) -> tuple[_Paths, np.ndarray, np.ndarray]:
    """Messages and segments, best scores and numbers of segments."""
    double = in_float64(p)
    sequences = sequences_of(double)
    longer = sequences.scores.shape if p.duration_tail is not None else (p.batch_size, 1, 1)
    found = _Paths(
        np.zeros(sequences.scores.shape),
        np.empty(longer, dtype=np.int32),
        np.zeros((p.batch_size, p.num_positions + 1)),
        *np.empty((2, p.batch_size, p.num_positions if decode else 1), dtype=np.int64),
    )
    best, counts = np.empty(p.batch_size), np.empty(p.batch_size, dtype=np.int64)
    given = (decode, sequences, model_of(double), found, best, counts)
    threads.run(_run, np.arange(p.batch_size), sequences.length * cost_of(p), given)
    return found, best, counts


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    found, best, counts = _decoded(potentials, decode=True)
    table = table_of_walks(found.starts, found.labels, counts, array_of(potentials.lengths))
    return torch.from_numpy(best), table


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best segmentations and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    found, best, counts = _decoded(p, decode=True)
    table = table_of_walks(found.starts, found.labels, counts, array_of(p.lengths))
    windows = forward_windows(found.alpha, found.offsets, p, core)
    return torch.from_numpy(best), table, windows


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    found, _, _ = _decoded(potentials, decode=False)
    alpha = found.alpha
    alpha += found.offsets[:, 1:, None]
    return torch.from_numpy(np.concatenate([np.zeros_like(alpha[:, :1]), alpha], 1))

"""Gradients of log Z from the messages of both passes, for transitions by duration.

    P(segment [s, s+k) of label c after c') = exp(alpha_s(c') + A_k[c', c] + eta_s(k, c) - log Z)

Summed over s it is the gradient by A_k[c', c]; over s and c', by D_k(c); over k and c', the
marginal of a start. For tiles of positions the sums over c' and over s are matrix products of the
exponentials of alpha less its maximum, and of eta plus it; where the latter leaves the range, its
terms are added one by one. Nothing is sequential, so a sequence may be cut into chunks. Cost
T·K·C²; accumulated in float64. With scores of segments or of transitions by position,
`flash_semicrf.streaming.cpu.by_duration.attached_gradient` takes the place of the products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.by_duration.attached import Attached, add_spans, make_work
from flash_semicrf.streaming.cpu.by_duration.attached_gradient import add_starts
from flash_semicrf.streaming.cpu.by_duration.tail import add_further, extend_ends, resume_ends
from flash_semicrf.streaming.cpu.by_duration.window import (
    copy_row,
    highest,
    make_window,
    slide_right,
    start_segments,
    take_end,
)
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.vector import TILE, exp_row, multiply_tile

__all__ = ["Sums", "segment_gradient"]

_HIGH = 300.0  # the second factor's exponents stay below it: what the first flushes is nothing
_NEGLIGIBLE = -50.0  # log of a marginal that no float64 gradient would show


class Sums(NamedTuple):
    """Expected counts of the segments that start in a chunk, added up."""

    start: np.ndarray  # (T, C) row p: probability of a start at p
    end: np.ndarray  # of an end
    duration: np.ndarray  # (R,)
    transition: np.ndarray  # (C * M,), or (1,) if not wanted
    beyond: np.ndarray  # (C,) positions beyond the K-th; unused without a tail
    attached: Attached | None  # (T, K, C) and (T, C, C), by position


class _Tile(NamedTuple):
    """Workspace: one row for each of up to `TILE` positions, the last one first."""

    position: np.ndarray  # (TILE,)
    sources: np.ndarray  # (TILE * padded C,) exp(alpha - its maximum)
    sinks: np.ndarray  # (TILE * R,) exp(eta + that maximum + the transitions' peak - log Z)
    products: np.ndarray  # (TILE * R,) sources @ exp(A - peak)
    further: np.ndarray  # (TILE * C,) positions expected beyond the K-th
    transition: np.ndarray  # (C * R,) sources.T @ sinks, of all tiles, if wanted


@helper
def _add_first(eta, level, model, further, row, sums):
    """Add the first segments of a problem with initial scores: they have no source label."""
    longest = model.max_duration
    for c in range(model.last.shape[0]):
        for j in range(c * longest, (c + 1) * longest):
            x = eta[j] - model.bias[j] + model.first[j] + level
            if x > _NEGLIGIBLE:
                term = math.exp(min(x, 0.0))
                sums.start[0, c] += term
                sums.duration[j] += term
                if j == (c + 1) * longest - 1:
                    add_further(model.tail, sums.beyond, c, term, further, row)


@helper
def _add_term_by_term(source, sink, position, model, weights, further, row, sums):
    """Add, and take out of `sink`, the elements whose exponential is out of range."""
    longest = model.max_duration
    num_labels = sums.start.shape[1]
    size = sink.shape[0]
    for j in range(num_labels * longest):
        if sink[j] <= _HIGH:
            continue
        for c in range(num_labels):
            x = source[c] + (model.scores[c * size + j] - weights.peak[j]) + sink[j]
            if x > _NEGLIGIBLE:
                term = math.exp(min(x, 0.0))
                sums.start[position, j // longest] += term
                sums.duration[j] += term
                if sums.transition.shape[0] > 1:
                    sums.transition[c * size + j] += term
                if (j + 1) % longest == 0:
                    add_further(model.tail, sums.beyond, j // longest, term, further, row)
        sink[j] = -math.inf


@helper
def _fill_row(messages, position, reference, model, weights, source, sink, further, row, sums):
    """Turn eta in `sink`, less `reference`, into the factors of one position, a row of the tile.

    Without weights nothing is done.
    """
    if weights is None:
        return
    num_labels = messages.alpha.shape[1]
    level = messages.forward[position] + reference - messages.total[0] - messages.total[1]
    source[:] = -math.inf
    if position > 0:
        copy_row(messages.alpha[position - 1], source)
    elif model.free_start:
        source[:num_labels] = 0.0
    else:
        _add_first(sink, level, model, further, row, sums)
    top = highest(source)
    if top == -math.inf:
        sink[:] = -math.inf
        return
    for c in range(num_labels):
        source[c] -= top
    beyond = 0
    for j in range(sink.shape[0]):
        sink[j] += weights.peak[j] + (level + top)
        beyond += sink[j] > _HIGH
    if beyond > 0:
        _add_term_by_term(source, sink, position, model, weights, further, row, sums)


@helper
def _add_tile(tile, count, model, weights, sums):
    """Add the segments of the tile's first `count` rows."""
    if weights is None:
        return
    num_labels, longest, size = model.last.shape[0], model.max_duration, model.bias.shape[0]
    padded = tile.sources.shape[0] // TILE
    sources, sinks, products = tile.sources, tile.sinks, tile.products
    exp_row(sources, 0, sources, 0, count * padded)
    exp_row(sinks, 0, sinks, 0, count * size)
    products[:] = 0.0
    for j in range(0, size, TILE):
        for i in range(count):
            first, out = i * padded, i * size + j
            multiply_tile(sources, first, 1, weights.forward, j, size, num_labels, products, out)
        if sums.transition.shape[0] > 1:
            for c in range(num_labels):
                out = c * size + j
                multiply_tile(sources, c, padded, sinks, j, size, count, tile.transition, out)
    for i in range(count):
        for c in range(num_labels):
            first = i * size + c * longest
            product = products[first : first + longest]
            sink = sinks[first : first + longest]
            duration = sums.duration[c * longest : (c + 1) * longest]
            started = 0.0
            for k in range(longest):
                product[k] *= sink[k]
                duration[k] += product[k]
            for k in range(longest):
                started += product[k]
            sums.start[tile.position[i], c] += started
            add_further(model.tail, sums.beyond, c, product[longest - 1], tile.further, i)


@helper
def _add_transitions(tile, weights, sums):
    """Add the transitions of all tiles."""
    if weights is None:
        return
    if sums.transition.shape[0] > 1:
        for j in range(sums.transition.shape[0]):
            sums.transition[j] += tile.transition[j] * weights.forward[j]


@helper
def _end_marginals(messages, length, begin, stop, rows):
    """rows[p, c] = P(a segment of c ends at p), for positions ``[begin, stop)``."""
    offset, value = messages.total[0], messages.total[1]
    for p in range(begin, stop):
        level = messages.forward[p + 1] + messages.backward[length - p - 1] - offset - value
        for c in range(rows.shape[1]):
            rows[p, c] = math.exp(min(messages.alpha[p, c] + messages.beta[p, c] + level, 0.0))


@owning
def segment_gradient(sequence, messages, model, weights, begin, stop, sums):
    """Add up the segments that start, and write the ends, in positions ``[begin, stop)``."""
    scores, start, end, has_boundary, length, attached = sequence
    beta, backward = messages.beta, messages.backward
    num_labels, size = model.last.shape[0], model.bias.shape[0]
    padded = -(-num_labels // LANES) * LANES
    window = make_window(num_labels, model.max_duration, TILE)
    work = make_work(attached, model)
    tile = _Tile(
        np.zeros(TILE, np.int64),
        np.full(TILE * padded, -math.inf),
        np.full(TILE * size, -math.inf),
        np.zeros(TILE * size),
        np.zeros(TILE * num_labels),
        np.zeros(sums.transition.shape[0]),
    )
    further, rows = np.zeros(num_labels), tile.further
    last = min(length, stop - 1 + model.max_duration)
    reference = backward[length - last]
    for block in range(last, begin, -TILE):
        if block < last:
            moved = backward[length - block] - reference
            reference += moved
            for c in range(num_labels):
                window.frame[c] -= moved
            slide_right(window)
        count = 0
        for i in range(min(TILE, block - begin)):
            position, column = block - 1 - i, TILE - 1 - i
            offset = backward[length - position - 1] - reference
            take_end(window, column, scores, end, has_boundary, position, beta[position], offset)
            if position >= stop:
                continue
            if position == stop - 1 and stop < length:
                moved = backward[length - stop - 1] - reference
                resume_ends(model.tail, window, column, scores, stop, messages, moved, further)
            extend_ends(model.tail, window, column, further, rows, count)
            source = tile.sources[count * padded : (count + 1) * padded]
            sink = tile.sinks[count * size : (count + 1) * size]
            start_segments(window, column, model.bias, start, has_boundary, position, sink)
            sink[num_labels * model.max_duration :] = -math.inf
            add_spans(attached, position, length, model.max_duration, sink)
            _fill_row(
                messages, position, reference, model, weights, source, sink, rows, count, sums
            )
            add_starts(
                attached, messages, position, reference, model, work, sink, rows, count, sums
            )
            tile.position[count] = position
            count += 1
        _add_tile(tile, count, model, weights, sums)
    _add_transitions(tile, weights, sums)
    _end_marginals(messages, length, begin, stop, sums.end)

"""Gradients of log Z from the messages of both passes, for transitions by duration.

    P(segment [s, s+k) of label c after c') = exp(alpha_s(c') + A_k[c', c] + eta_s(k, c) - log Z)

Summed over s it is the gradient by A_k[c', c]; over s and c', by D_k(c); over k and c', the
marginal of a start. For tiles of positions the sums over c' and over s are matrix products of the
exponentials of alpha less its maximum, and of eta plus it; where the latter leaves the range, its
terms are added one by one. Nothing is sequential, so a sequence may be cut into chunks. Cost
T·K·C²; accumulated in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.by_duration.tail import add_further, extend_ends, resume_ends
from flash_semicrf.streaming.cpu.by_duration.window import (
    copy_row,
    highest,
    make_window,
    slide_right,
    start_segments,
    take_end,
)
from flash_semicrf.streaming.cpu.jit import helper
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.vector import TILE, exp_row, multiply_tile

__all__ = ["Messages", "segment_gradient"]

_HIGH = (
    300.0  # exponents of the second factor stay below it; what the first flushes is then nothing
)
_NEGLIGIBLE = -50.0  # log of a marginal that no float64 gradient would show


class Messages(NamedTuple):
    """Messages of one sequence.

    Attributes
    ----------
    alpha, beta : float64 arrays of shape (T, C)
        Row p: alpha_{p+1} and beta_{p+1}, less their offsets.
    forward, backward : float64 arrays of shape (T + 1,)
        Whole-number offsets of the two passes, by their steps.
    rest, further : float64 arrays of shape (T * C,)
        See `backward_pass`; read only with a tail.
    length : int
    offset, value : float
        log Z = offset + value.
    """

    alpha: np.ndarray
    beta: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    rest: np.ndarray
    further: np.ndarray
    length: int
    offset: float
    value: float


class _Tile(NamedTuple):
    """Workspace: one row for each of up to `TILE` positions, the last one first."""

    position: np.ndarray  # (TILE,)
    sources: np.ndarray  # (TILE * padded C,) exp(alpha - its maximum)
    sinks: np.ndarray  # (TILE * R,) exp(eta + that maximum + the transitions' peak - log Z)
    products: np.ndarray  # (TILE * R,) sources @ exp(A - peak)
    further: np.ndarray  # (TILE * C,) positions expected beyond the K-th


class Sums(NamedTuple):
    """What the segments that start in a chunk add up to.

    Attributes
    ----------
    start : float64 array of shape (T, C)
        Row p: probability of a start at p.
    duration : float64 array of shape (R,)
    transition : float64 array of shape (C * R,)
        Left alone unless `want_transition`.
    beyond : float64 array of shape (C,)
        Positions beyond the K-th; left alone without a tail.
    want_transition : bool
    """

    start: np.ndarray
    duration: np.ndarray
    transition: np.ndarray
    beyond: np.ndarray
    want_transition: bool


@helper
def _add_first(eta, level, arrivals, num_labels, further, row, sums):
    """Add the first segments of a problem with initial scores: they have no source label."""
    longest = arrivals.max_duration
    for c in range(num_labels):
        for j in range(c * longest, (c + 1) * longest):
            x = eta[j] - arrivals.bias[j] + arrivals.first[j] + level
            if x > _NEGLIGIBLE:
                term = math.exp(min(x, 0.0))
                sums.start[0, c] += term
                sums.duration[j] += term
                if j == (c + 1) * longest - 1:
                    add_further(arrivals.tail, sums.beyond, c, term, further, row)


@helper
def _add_term_by_term(source, sink, position, arrivals, weights, further, row, sums):
    """Add, and take out of `sink`, the elements whose exponential is out of range."""
    longest = arrivals.max_duration
    num_labels = sums.start.shape[1]
    size = sink.shape[0]
    for j in range(num_labels * longest):
        if sink[j] <= _HIGH:
            continue
        for c in range(num_labels):
            x = source[c] + (arrivals.scores[c * size + j] - weights.peak[j]) + sink[j]
            if x > _NEGLIGIBLE:
                term = math.exp(min(x, 0.0))
                sums.start[position, j // longest] += term
                sums.duration[j] += term
                if sums.want_transition:
                    sums.transition[c * size + j] += term
                if (j + 1) % longest == 0:
                    add_further(arrivals.tail, sums.beyond, j // longest, term, further, row)
        sink[j] = -math.inf


@helper
def _fill_row(
    messages, position, reference, free_start, arrivals, weights, source, sink, further, row, sums
):
    """Turn eta in `sink`, less `reference`, into the factors of one position, a row of the tile."""
    num_labels = messages.alpha.shape[1]
    level = messages.forward[position] + reference - messages.offset - messages.value
    source[:] = -math.inf
    if position > 0:
        copy_row(messages.alpha[position - 1], source)
    elif free_start:
        source[:num_labels] = 0.0
    else:
        _add_first(sink, level, arrivals, num_labels, further, row, sums)
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
        _add_term_by_term(source, sink, position, arrivals, weights, further, row, sums)


@helper
def _add_tile(tile, count, arrivals, weights, sums, total):
    """Add the segments of the tile's first `count` rows."""
    num_labels = sums.start.shape[1]
    longest = arrivals.max_duration
    size = arrivals.bias.shape[0]
    padded = tile.sources.shape[0] // TILE
    exp_row(tile.sources, 0, tile.sources, 0, count * padded)
    exp_row(tile.sinks, 0, tile.sinks, 0, count * size)
    tile.products[:] = 0.0
    for column in range(0, size, TILE):
        for i in range(count):
            multiply_tile(
                tile.sources, i * padded, 1, weights.forward, column, size, num_labels,
                tile.products, i * size + column,
            )  # fmt: skip
        if sums.want_transition:
            for c in range(num_labels):
                multiply_tile(
                    tile.sources, c, padded, tile.sinks, column, size, count,
                    total, c * size + column,
                )  # fmt: skip
    for i in range(count):
        for c in range(num_labels):
            first = i * size + c * longest
            products = tile.products[first : first + longest]
            sinks = tile.sinks[first : first + longest]
            duration = sums.duration[c * longest : (c + 1) * longest]
            started = 0.0
            for k in range(longest):
                products[k] *= sinks[k]
                duration[k] += products[k]
            for k in range(longest):
                started += products[k]
            sums.start[tile.position[i], c] += started
            add_further(arrivals.tail, sums.beyond, c, products[longest - 1], tile.further, i)


@helper
def end_marginals(messages, begin, stop, rows):
    """rows[p, c] = P(a segment of c ends at p), for positions ``[begin, stop)``."""
    for p in range(begin, stop):
        whole = messages.forward[p + 1] + messages.backward[messages.length - p - 1]
        level = whole - messages.offset - messages.value
        for c in range(rows.shape[1]):
            rows[p, c] = math.exp(min(messages.alpha[p, c] + messages.beta[p, c] + level, 0.0))


@helper
def segment_gradient(
    messages, begin, stop, scores, start, end, has_boundary, free_start, arrivals, weights, sums
):
    """Add up the segments that start in positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    scores, start, end : arrays of shape (T, C)
        `start` and `end` are read only if `has_boundary`.
    has_boundary : bool
    free_start : bool
        The first segment's source label is summed out (no initial scores).
    arrivals : Arrivals
    weights : Weights
    sums : Sums
        Added to; `sums.start` starts as zeros.
    """
    num_labels = scores.shape[1]
    size = arrivals.bias.shape[0]
    padded = -(-num_labels // LANES) * LANES
    window = make_window(num_labels, arrivals.max_duration, TILE)
    tile = _Tile(
        np.zeros(TILE, np.int64),
        np.full(TILE * padded, -math.inf),
        np.full(TILE * size, -math.inf),
        np.zeros(TILE * size),
        np.zeros(TILE * num_labels),
    )
    further = np.zeros(num_labels)
    total = np.zeros(num_labels * size if sums.want_transition else 1)
    last = min(messages.length, stop - 1 + arrivals.max_duration)
    reference = messages.backward[messages.length - last]
    for block in range(last, begin, -TILE):
        if block < last:
            moved = messages.backward[messages.length - block] - reference
            reference += moved
            for c in range(num_labels):
                window.frame[c] -= moved
            slide_right(window)
        count = 0
        for i in range(min(TILE, block - begin)):
            position = block - 1 - i
            column = TILE - 1 - i
            offset = messages.backward[messages.length - position - 1] - reference
            beta = messages.beta[position]
            take_end(window, column, scores, end, has_boundary, position, beta, offset)
            if position >= stop:
                continue
            if position == stop - 1 and stop < messages.length:
                resume_ends(
                    arrivals.tail, window, column, scores, stop, messages, reference, further
                )
            extend_ends(arrivals.tail, window, column, further, tile.further, count)
            source = tile.sources[count * padded : (count + 1) * padded]
            sink = tile.sinks[count * size : (count + 1) * size]
            start_segments(window, column, arrivals.bias, start, has_boundary, position, sink)
            sink[num_labels * arrivals.max_duration :] = -math.inf
            _fill_row(
                messages, position, reference, free_start, arrivals, weights, source, sink,
                tile.further, count, sums,
            )  # fmt: skip
            tile.position[count] = position
            count += 1
        _add_tile(tile, count, arrivals, weights, sums, total)
    if sums.want_transition:
        for j in range(num_labels * size):
            sums.transition[j] += total[j] * weights.forward[j]

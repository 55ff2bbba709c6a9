"""One pass of messages over one sequence, forwards or backwards, for transitions by duration.

With rows over (c, k) as in `flash_semicrf.streaming.cpu.by_duration.parameters`, the forward pass
pushes each source onto the K outputs it reaches,

    gamma_s(k, c) = LSE_{c'} [alpha_s(c') + A_k[c', c]]
    alpha_t(c)    = LSE_k [gamma_{t-k}(k, c) + D_k(c) + start_{t-k}(c) + S_t(c) - S_{t-k}(c)]
                    + end_{t-1}(c)

as running pairs (maximum, sum of exponentials below it); the backward pass reads the K ends ahead,

    eta_s(k, c)   = D_k(c) + start_s(c) + S_{s+k}(c) - S_s(c) + end_{s+k-1}(c) + beta_{s+k}(c)
    beta_s(c')    = LSE_{k,c} [A_k[c', c] + eta_s(k, c)].

Durations beyond K count as K: see `flash_semicrf.streaming.cpu.by_duration.tail`.
Both sums over labels are products with exp(A), which cost T·K·C² multiply-adds; a product below
`CERTAIN` may have lost terms and is redone as a log-sum-exp. Everything is float64; workspace
O(KC). The messages are shifted by a whole number at the end of each block, kept apart.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.by_duration.tail import extend_ends, extend_outputs, keep_ends
from flash_semicrf.streaming.cpu.by_duration.window import (
    FLOOR,
    absorb,
    copy_row,
    highest,
    make_window,
    slide_left,
    slide_right,
    start_segments,
    take_end,
    whole_level,
)
from flash_semicrf.streaming.cpu.jit import helper
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.static.passes import CERTAIN
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_row,
    log_row,
    max_tile,
    multiply_tile,
    multiply_tile8,
)

__all__ = ["BLOCK", "backward_pass", "exact_arrival", "forward_pass"]

BLOCK = 64
"""Positions between two slides of a window."""


@helper
def exact_arrival(alpha, scores, size, j):
    """LSE over c' of alpha(c') + A[c', j]."""
    top = -math.inf
    for c in range(alpha.shape[0]):
        top = max(top, alpha[c] + scores[c * size + j])
    if top == -math.inf:
        return top
    total = 0.0
    for c in range(alpha.shape[0]):
        total += math.exp(alpha[c] + scores[c * size + j] - top)
    return top + math.log(total)


@helper
def _arrive(alpha, arrivals, weights, small, sums, values):
    """values = gamma + D, a row, from alpha (C,); `small` and `sums` are workspace."""
    top = highest(alpha)
    values[:] = -math.inf
    if top == -math.inf:
        return
    num_labels = alpha.shape[0]
    size = values.shape[0]
    for c in range(num_labels):
        small[c] = alpha[c] - top
    exp_row(small, 0, small, 0, small.shape[0])
    sums[:] = 0.0
    for column in range(0, size, TILE):
        multiply_tile(small, 0, 1, weights.forward, column, size, num_labels, sums, column)
    log_row(sums, 0, values, 0, size)
    uncertain = 0
    for j in range(size):
        certain = sums[j] >= CERTAIN
        value = values[j] + top + weights.reach[j]
        values[j] = value if certain else -math.inf
        uncertain += (not certain) and weights.reach[j] > -math.inf
    if uncertain > 0:
        for j in range(size):
            if sums[j] < CERTAIN and weights.reach[j] > -math.inf:
                exact = exact_arrival(alpha, arrivals.scores, size, j)
                values[j] = exact + arrivals.bias[j]


@helper
def _push(window, sums, column, start, has_boundary, position, values, gaps):
    """Add the source at `position` to the K outputs from `column` on; `gaps` is workspace."""
    longest = window.max_duration
    for c in range(window.frame.shape[0]):
        shift = -window.frame[c]
        if has_boundary:
            shift += start[position, c]
        first = c * window.capacity + column
        tops = window.values[first : first + longest]
        source = values[c * longest : (c + 1) * longest]
        gap = gaps[c * longest : (c + 1) * longest]
        for k in range(longest):
            source[k] += shift
            gap[k] = -abs(source[k] - tops[k])
    exp_row(gaps, 0, gaps, 0, gaps.shape[0])
    for c in range(window.frame.shape[0]):
        first = c * window.capacity + column
        tops = window.values[first : first + longest]
        totals = sums[first : first + longest]
        source = values[c * longest : (c + 1) * longest]
        gap = gaps[c * longest : (c + 1) * longest]
        for k in range(longest):
            higher = source[k] > tops[k]
            raised = totals[k] * gap[k] + 1.0
            added = totals[k] + gap[k]
            totals[k] = raised if higher else added
            tops[k] = source[k] if higher else tops[k]


@helper
def _emit(window, sums, column, scores, end, has_boundary, position, small, alpha):
    """alpha of the segments that end at `position`, the output in `column`; `small` is scratch."""
    num_labels = alpha.shape[0]
    for c in range(num_labels):
        absorb(window, c, scores[position, c])
        small[c] = sums[c * window.capacity + column]
    log_row(small, 0, small, 0, small.shape[0])
    for c in range(num_labels):
        x = window.values[c * window.capacity + column] + small[c] + window.frame[c]
        if has_boundary:
            x += end[position, c]
        alpha[c] = x if x > NEG_INF else -math.inf


@helper
def _slide_sums(window, sums):
    for c in range(window.frame.shape[0]):
        row = sums[c * window.capacity : (c + 1) * window.capacity]
        for i in range(window.max_duration):
            row[i] = row[i + window.block]
        for i in range(window.max_duration, window.capacity):
            row[i] = 0.0


@helper
def _shift(message, window):
    """Take a whole number off a message and the frames that follow it, and return it."""
    delta = whole_level(highest(message), window)
    for c in range(message.shape[0]):
        message[c] -= delta
        window.frame[c] -= delta
    return delta


@helper
def forward_pass(
    scores, start, end, has_boundary, length, last, arrivals, weights, keep, alpha_rows, offsets
):
    """Run the forward pass.

    Parameters
    ----------
    scores, start, end : arrays of shape (T, C)
        `start` and `end` are read only if `has_boundary`.
    has_boundary : bool
    length : int
    last : float64 array of shape (C,)
        Final scores.
    arrivals : Arrivals
    weights : Weights
    keep : bool
        Write the messages.
    alpha_rows : float64 array of shape (T, C)
        Row p: alpha_{p+1} less its offset.
    offsets : float64 array of shape (T + 1,)
        Whole numbers to add to alpha_0..alpha_length.

    Returns
    -------
    offset, value : float
        log Z = offset + value.
    """
    num_labels = last.shape[0]
    size = arrivals.bias.shape[0]
    window = make_window(num_labels, arrivals.max_duration, BLOCK)
    sums = np.zeros(window.values.shape[0])
    values, row = np.zeros(size), np.zeros(size)
    small = np.ones(-(-num_labels // LANES) * LANES)
    alpha = np.zeros(num_labels)
    shift = 0.0
    if keep:
        offsets[0] = 0.0
    for position in range(length):
        column = position % BLOCK
        if position == 0:
            copy_row(arrivals.first, values)
        else:
            _arrive(alpha, arrivals, weights, small, row, values)
        _push(window, sums, column, start, has_boundary, position, values, row)
        _emit(window, sums, column, scores, end, has_boundary, position, small, alpha)
        extend_outputs(arrivals.tail, window, sums, column)
        if column == BLOCK - 1 or position == length - 1:
            shift += _shift(alpha, window)
            slide_left(window)
            _slide_sums(window, sums)
        if keep:
            offsets[position + 1] = shift
            copy_row(alpha, alpha_rows[position])
    for c in range(num_labels):
        alpha[c] += last[c]
    top = highest(alpha)
    if not top > NEG_INF:
        return 0.0, -math.inf
    total = 0.0
    for c in range(num_labels):
        total += math.exp(alpha[c] - top)
    return shift, top + math.log(total)


@helper
def _exact_departure(eta, scores, size, label):
    """LSE over a row of A[label, j] + eta(j)."""
    row = scores[label * size : (label + 1) * size]
    top = -math.inf
    for j in range(size):
        top = max(top, row[j] + eta[j])
    if not top > NEG_INF:
        return -math.inf
    total = 0.0
    for j in range(size):
        x = row[j] + eta[j] - top
        if x > -45.0:
            total += math.exp(x)
    return top + math.log(total)


@helper
def _highest_of_many(row):
    """Maximum of a row, several lanes at a time."""
    lanes = np.full(TILE, FLOOR)
    max_tile(np.zeros(1), 0, 0, row, 0, TILE, row.shape[0] // TILE, lanes, 0)
    return highest(lanes)


@helper
def _depart(eta, arrivals, weights, row, small, sums, beta):
    """beta (C,) from eta, a row; `row`, `small` and `sums` are workspace."""
    size = eta.shape[0]
    top = _highest_of_many(eta)
    beta[:] = -math.inf
    if not top > NEG_INF:
        return
    for j in range(size):
        row[j] = eta[j] - top
    exp_row(row, 0, row, 0, size)
    padded = sums.shape[0]
    sums[:] = 0.0
    column = 0
    while column + TILE <= padded:
        multiply_tile(row, 0, 1, weights.backward, column, padded, size, sums, column)
        column += TILE
    if column < padded:
        multiply_tile8(row, 0, 1, weights.backward, column, padded, size, sums, column)
    log_row(sums, 0, small, 0, padded)
    for c in range(beta.shape[0]):
        if sums[c] >= CERTAIN:
            beta[c] = top + weights.source_peak[c] + small[c]
        elif weights.source_peak[c] > -math.inf:
            beta[c] = _exact_departure(eta, arrivals.scores, size, c)


@helper
def backward_pass(
    scores, start, end, has_boundary, length, last, arrivals, weights, beta_rows, offsets,
    rest_rows, further_rows,
):  # fmt: skip
    """Run the backward pass and keep its messages.

    Parameters
    ----------
    scores, start, end, has_boundary, length, last, arrivals, weights
        As for `forward_pass`.
    beta_rows : float64 array of shape (T, C)
        Row p: beta_{p+1} less its offset.
    offsets : float64 array of shape (T + 1,)
        Whole numbers to add to beta_length..beta_1, by the steps taken from the end.
    rest_rows, further_rows : float64 arrays of shape (T * C,)
        Left alone without a tail. Row p: Q_{p+K} + S_{p+K} - S_p, less the offset of beta_{p+1},
        and the positions beyond the K-th that are expected of a segment of the class from p.
    """
    num_labels = last.shape[0]
    size = arrivals.bias.shape[0]
    window = make_window(num_labels, arrivals.max_duration, BLOCK)
    eta, row = np.full(size, -math.inf), np.zeros(size)
    small, sums = np.zeros((2, -(-num_labels // LANES) * LANES))
    beta, further = last.copy(), np.zeros(num_labels)
    shift = 0.0
    for step in range(length):
        position = length - 1 - step
        column = BLOCK - 1 - step % BLOCK
        copy_row(beta, beta_rows[position])
        offsets[step] = shift
        take_end(window, column, scores, end, has_boundary, position, beta, 0.0)
        extend_ends(arrivals.tail, window, column, further, further_rows, position)
        keep_ends(arrivals.tail, window, column, rest_rows, position)
        if position == 0:
            break
        start_segments(window, column, arrivals.bias, start, has_boundary, position, eta)
        _depart(eta, arrivals, weights, row, small, sums, beta)
        if column == 0:
            shift += _shift(beta, window)
            slide_right(window)

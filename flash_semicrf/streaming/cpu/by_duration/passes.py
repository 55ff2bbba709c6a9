"""One pass of messages over one sequence, forwards or backwards, for transitions by duration.

With rows over (c, k) as in `flash_semicrf.streaming.cpu.by_duration.model`, the forward pass
pushes each source onto the K outputs it reaches,

    gamma_s(k, c) = LSE_{c'} [alpha_s(c') + A_k[c', c]]
    alpha_t(c)    = LSE_k [gamma_{t-k}(k, c) + D_k(c) + start_{t-k}(c) + S_t(c) - S_{t-k}(c)]
                    + end_{t-1}(c)

as running pairs (maximum, sum of exponentials below it); the backward pass reads the K ends ahead,

    eta_s(k, c)   = D_k(c) + start_s(c) + S_{s+k}(c) - S_s(c) + end_{s+k-1}(c) + beta_{s+k}(c)
    beta_s(c')    = LSE_{k,c} [A_k[c', c] + eta_s(k, c)].

Scores of segments are added to gamma and to eta, those of transitions by position to A: see
`flash_semicrf.streaming.cpu.by_duration.attached`. Durations beyond K count as K: see
`flash_semicrf.streaming.cpu.by_duration.tail`.
Both sums over labels are products with exp(A), which cost T·K·C² multiply-adds; a product below
`CERTAIN` may have lost terms and is redone as a log-sum-exp. Everything is float64; workspace
O(KC). The messages are shifted by a whole number at the end of each block, kept apart.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.by_duration.attached import (
    add_spans,
    arrive_in,
    depart_to,
    make_work,
)
from flash_semicrf.streaming.cpu.by_duration.products import exact_arrivals, exact_departure
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
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import CERTAIN
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_row,
    log_row,
    max_tile,
    multiply_row,
    multiply_tile,
)

__all__ = ["backward_pass", "forward_pass"]

_BLOCK = 64  # positions between two slides of a window


@helper
def _sum_of_few(values):
    """LSE of a short array."""
    top = highest(values)
    if not top > NEG_INF:
        return -math.inf
    total = 0.0
    for value in values:
        total += math.exp(value - top)
    return top + math.log(total)


@helper
def _add_peaks(weights, model, reach):
    """reach = D and the peak of the weights, a row."""
    if weights is None:
        return
    for j in range(reach.shape[0]):
        reach[j] = weights.peak[j] + model.bias[j]


@helper
def _arrive(alpha, model, weights, reach, small, sums, exact, values):
    """values = gamma + D, a row, from alpha (C,); `small`, `sums` and `exact` are workspace.

    `reach` is D and the peak of the weights. Without weights nothing is done.
    """
    if weights is None:
        return
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
    for column in range(0, size, TILE):
        uncertain = 0
        for j in range(column, column + TILE):
            certain = sums[j] >= CERTAIN
            values[j] = values[j] + top + reach[j] if certain else -math.inf
            uncertain += (not certain) and reach[j] > -math.inf
        if uncertain > 0:
            exact_arrivals(alpha, model.scores, column, exact, sums)
            for j in range(column, column + TILE):
                values[j] = exact[j] + model.bias[j]


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


@owning
def forward_pass(sequence, model, weights, messages, keep):
    """Fill `messages.total`, and with `keep` those of the forward pass."""
    scores, start, end, has_boundary, length, attached = sequence
    num_labels, size, longest = model.last.shape[0], model.bias.shape[0], model.max_duration
    window = make_window(num_labels, longest, _BLOCK)
    sums = np.zeros(window.values.shape[0])
    values, row, reach, exact = np.zeros((4, size))
    work = make_work(attached, model)
    _add_peaks(weights, model, reach)
    small = np.ones(-(-num_labels // LANES) * LANES)
    alpha = np.zeros(num_labels)
    shift = 0.0
    if keep:
        messages.forward[0] = 0.0
    for position in range(length):
        column = position % _BLOCK
        if position == 0:
            copy_row(model.first, values)
        else:
            _arrive(alpha, model, weights, reach, small, row, exact, values)
            arrive_in(attached, alpha, model, position, work, values)
        add_spans(attached, position, length, longest, values)
        _push(window, sums, column, start, has_boundary, position, values, row)
        _emit(window, sums, column, scores, end, has_boundary, position, small, alpha)
        extend_outputs(model.tail, window, sums, column)
        if column == _BLOCK - 1 or position == length - 1:
            shift += _shift(alpha, window)
            slide_left(window)
            _slide_sums(window, sums)
        if keep:
            messages.forward[position + 1] = shift
            copy_row(alpha, messages.alpha[position])
    for c in range(num_labels):
        alpha[c] += model.last[c]
    value = _sum_of_few(alpha)
    messages.total[0] = shift if value > -math.inf else 0.0
    messages.total[1] = value


@owning
def _highest_of_many(row):
    """Maximum of a row, several lanes at a time."""
    lanes = np.full(TILE, FLOOR)
    max_tile(np.zeros(1), 0, 0, row, 0, TILE, row.shape[0] // TILE, lanes, 0)
    return highest(lanes)


@helper
def _depart(eta, model, weights, row, small, sums, beta):
    """beta (C,) from eta, a row; `row`, `small` and `sums` are workspace.

    Without weights nothing is done.
    """
    if weights is None:
        return
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
    multiply_row(row, 0, 1, weights.backward, 0, padded, size, sums, 0)
    log_row(sums, 0, small, 0, padded)
    for c in range(beta.shape[0]):
        if sums[c] >= CERTAIN:
            beta[c] = top + weights.source_peak[c] + small[c]
        elif weights.source_peak[c] > -math.inf:
            beta[c] = exact_departure(eta, model.scores, c)


@owning
def backward_pass(sequence, model, weights, messages):
    """Fill the messages of the backward pass, and `rest` and `further`."""
    scores, start, end, has_boundary, length, attached = sequence
    num_labels, size, longest = model.last.shape[0], model.bias.shape[0], model.max_duration
    window = make_window(num_labels, longest, _BLOCK)
    work = make_work(attached, model)
    eta, row = np.full(size, -math.inf), np.zeros(size)
    small, sums = np.zeros((2, -(-num_labels // LANES) * LANES))
    beta, further = model.last.copy(), np.zeros(num_labels)
    shift = 0.0
    for step in range(length):
        position = length - 1 - step
        column = _BLOCK - 1 - step % _BLOCK
        copy_row(beta, messages.beta[position])
        messages.backward[step] = shift
        take_end(window, column, scores, end, has_boundary, position, beta, 0.0)
        extend_ends(model.tail, window, column, further, messages.further, position)
        keep_ends(model.tail, window, column, messages.rest, position)
        if position == 0:
            break
        start_segments(window, column, model.bias, start, has_boundary, position, eta)
        add_spans(attached, position, length, longest, eta)
        _depart(eta, model, weights, row, small, sums, beta)
        depart_to(attached, position, eta, model, work, beta)
        if column == 0:
            shift += _shift(beta, window)
            slide_right(window)

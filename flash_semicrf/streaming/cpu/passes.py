"""One pass of messages over one sequence, forwards or backwards, for static transitions.

Forwards the kernel computes, with the window sum as multiply-adds (DESIGN: ``docs/performance.md``),

    H_s(c)     = gamma_s(c) + open_s(c) - L_s(c),       E_s(c) = exp(H_s(c))
    alpha_t(c) = L_t(c) + peak(c) + log sum_{k=1..K} E_{t-k}(c) W_k(c) + close_t(c)
    gamma_t(c) = LSE_{c'} [alpha_t(c') + A[c', c]]

where L_t(c) is the label's *frame*: the running sum of its scores plus whatever keeps E within range.
Read from the end, with starts and ends exchanged and A transposed, the same recurrence gives
eta (for alpha) and beta (for gamma): one kernel serves both directions.

Blocks of `TILE` outputs share one sweep over the sources before the block (the far window); sources
inside the block are pushed onto the later outputs as they appear. Every `TILE` steps the messages are
shifted by a whole number, kept apart, so that they stay small and their offsets add exactly.

Flushed terms are never lost in silence: E and W drop what is below e^-650 of their frame, so a sum of
at least `CERTAIN` cannot have lost anything within float64's precision. A smaller sum, while a source
lives, is redone as a log-sum-exp from H. Cost T(KC + C²); workspace O(KC).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.potentials import NEG_INF
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.simd import (
    LANES,
    TILE,
    exp_row,
    log_row,
    multiply_tile,
    multiply_tile8,
)

__all__ = ["CERTAIN", "message_pass"]

CERTAIN = 1e-175
"""A scaled sum at least this large has lost nothing that float64 could show."""

_HIGH = 200.0
"""H above this recentres the label's frame: E <= e^200 keeps CERTAIN a certificate."""

_LOW = -200.0
"""A window whose largest H is below this is recentred, so that its E count again."""


class _State(NamedTuple):
    """Workspace of a pass. Rows of `sources` and `logs` hold one label's E and H by time."""

    sources: np.ndarray  # (C * capacity + LANES,) E
    logs: np.ndarray  # (C * capacity + LANES,) H
    frame: np.ndarray  # (C,) L
    live_until: np.ndarray  # (C,) last step that a finite source can still reach
    sums: np.ndarray  # (C * TILE,) window sums of the block's outputs


@kernel
def exact_window(logs, first, bias, longest):
    """(max over k of H, LSE_k [H_{t-k} + D_k]) of the `longest` sources that start at `first`."""
    top = -math.inf
    highest = -math.inf
    for i in range(longest):
        h = logs[first + i]
        highest = max(highest, h)
        top = max(top, h + bias[longest - i])
    if top == -math.inf:
        return highest, top
    total = 0.0
    for i in range(longest):
        x = logs[first + i] + bias[longest - i] - top
        if x > -45.0:
            total += math.exp(x)
    return highest, top + math.log(total)


@kernel
def exact_product(alpha, scores, label):
    """LSE over c' of alpha(c') + A[c', label]."""
    top = -math.inf
    for c in range(alpha.shape[0]):
        top = max(top, alpha[c] + scores[c, label])
    if top == -math.inf:
        return top
    total = 0.0
    for c in range(alpha.shape[0]):
        total += math.exp(alpha[c] + scores[c, label] - top)
    return top + math.log(total)


@kernel
def product_row(values, weights, padded, num_labels, out):
    """out = values (C,) @ weights (C, padded)."""
    out[:] = 0.0
    column = 0
    while column + TILE <= padded:
        multiply_tile(values, 0, 1, weights, column, padded, num_labels, out, column)
        column += TILE
    if column < padded:
        multiply_tile8(values, 0, 1, weights, column, padded, num_labels, out, column)


@kernel
def _recentre(state, label, shift, first, count):
    """Move a label's frame up by `shift`, over the `count` buffered sources from `first`."""
    state.frame[label] += shift
    for i in range(first, first + count):
        state.logs[i] -= shift
    exp_row(state.logs, first, state.sources, first, -(-count // LANES) * LANES)


@kernel
def _forget(state, label, first, count, done):
    """Drop a label's sources, and what they gave to the outputs from `done` of the block on."""
    for i in range(first, first + count):
        state.logs[i] = -math.inf
        state.sources[i] = 0.0
    state.sums[label * TILE + done : (label + 1) * TILE] = 0.0
    state.live_until[label] = -1


@kernel
def _far_window(state, window, capacity, step, base, max_duration):
    """Sums of the block after `step` over the sources up to `step`."""
    row = max_duration + 3 * TILE
    state.sums[:] = 0.0
    for c in range(state.frame.shape[0]):
        if state.live_until[c] > step:
            oldest = c * capacity + step + 1 - max_duration - base
            far = c * row + TILE + max_duration
            multiply_tile(
                state.sources, oldest, 1, window.weights, far, -1, max_duration, state.sums, c * TILE
            )


@kernel
def _rescue(state, window, label, capacity, step, base, max_duration, done):
    """Window sum of one output by its logarithms; recentre the frame if its sources are all tiny."""
    longest = min(step, max_duration)
    oldest = label * capacity + step - longest - base
    highest, value = exact_window(state.logs, oldest, window.bias[label], longest)
    value += state.frame[label]
    if -math.inf < highest < _LOW:
        _recentre(state, label, np.rint(highest), oldest, longest)
        sums = state.sums[label * TILE : (label + 1) * TILE]
        sums[:] = 0.0
        # The output `done` is this step: source i of the window is `longest - i` before it.
        near = label * (max_duration + 3 * TILE) + TILE + longest - done
        multiply_tile(state.sources, oldest, 1, window.weights, near, -1, longest, sums, 0)
    return value


@kernel
def _shift_left(buffer, num_labels, capacity, drop, keep):
    for c in range(num_labels):
        row = buffer[c * capacity : (c + 1) * capacity]
        for i in range(keep):
            row[i] = row[i + drop]


@kernel
def message_pass(
    scores, opening, closing, has_boundary, length, backward, first, last, window, transition,
    keep, out_rows, source_rows, offsets,
):  # fmt: skip
    """Run one pass.

    Parameters
    ----------
    scores, opening, closing : arrays of shape (T, C)
        `opening` is added where a source is taken up, `closing` where an output is made: start and
        end scores, exchanged for the backward pass. Read only if `has_boundary`.
    length : int
    backward : bool
    first : array of shape (C,)
        Source 0: the initial term, or the final scores backwards.
    last : array of shape (C,)
        Added to the last output before summing it up.
    window : Window
    transition : Transition
        In the direction of the pass.
    keep : bool
        Write the messages.
    out_rows, source_rows : float64 arrays of shape (T, C)
        Row p: alpha_{p+1} and gamma_p; backwards eta_p and beta_{p+1}; less their offset.
    offsets : float64 array of shape (T + 1,)
        Whole numbers to add to the messages of step 0..length.

    Returns
    -------
    offset, value : float
        log Z = offset + value.
    """
    num_labels = first.shape[0]
    padded = -(-num_labels // LANES) * LANES
    max_duration = window.bias.shape[1] - 1
    weight_row = max_duration + 3 * TILE
    capacity = max_duration + TILE * max(4, -(-max_duration // TILE))
    state = _State(
        np.zeros(num_labels * capacity + LANES),
        np.full(num_labels * capacity + LANES, -math.inf),
        np.zeros(num_labels),
        np.full(num_labels, -1),
        np.zeros(num_labels * TILE),
    )
    alpha = np.zeros(num_labels)
    row = np.zeros(padded)
    value_row = np.zeros(padded)
    shift = 0.0
    base = 1 - max_duration  # step of the buffer's first column

    for c in range(num_labels):
        position = length - 1 if backward else 0
        h = first[c]
        if keep:
            source_rows[position, c] = h
        if has_boundary:
            h += opening[position, c]
        if h > NEG_INF:
            state.frame[c] = h
            state.logs[c * capacity - base] = 0.0
            state.sources[c * capacity - base] = 1.0
            state.live_until[c] = max_duration
    if keep:
        offsets[0] = 0.0

    for block in range(0, length, TILE):
        if block + TILE - base >= capacity:
            drop = block + 1 - max_duration - base
            _shift_left(state.sources, num_labels, capacity, drop, max_duration)
            _shift_left(state.logs, num_labels, capacity, drop, max_duration)
            base += drop
        _far_window(state, window, capacity, block, base, max_duration)
        steps = min(TILE, length - block)
        for i in range(steps):
            step = block + 1 + i
            position = length - step if backward else step - 1
            longest = min(step, max_duration)
            for c in range(num_labels):
                x = scores[position, c]
                if x > NEG_INF:
                    state.frame[c] += x
                elif state.live_until[c] >= step:
                    _forget(state, c, c * capacity + step - longest - base, longest, i)
                row[c] = state.sums[c * TILE + i]
            log_row(row, 0, value_row, 0, padded)
            top = -math.inf
            for c in range(num_labels):
                if row[c] >= CERTAIN:
                    x = state.frame[c] + window.peak[c] + value_row[c]
                elif state.live_until[c] < step:
                    x = -math.inf
                else:
                    x = _rescue(state, window, c, capacity, step, base, max_duration, i)
                if has_boundary:
                    x += closing[position, c]
                alpha[c] = x if x > NEG_INF else -math.inf
                top = max(top, x)
            if i == steps - 1 and top > NEG_INF:
                delta = np.rint(top)
                shift += delta
                top -= delta
                for c in range(num_labels):
                    alpha[c] -= delta
                    state.frame[c] -= delta
            if keep:
                offsets[step] = shift
                for c in range(num_labels):
                    out_rows[position, c] = alpha[c]
            if step == length:
                break

            # The next source: gamma from alpha.
            position = position - 1 if backward else position + 1
            if not top > NEG_INF:
                if keep:
                    source_rows[position, :] = -math.inf
                for c in range(num_labels):
                    state.logs[c * capacity + step - base] = -math.inf
                    state.sources[c * capacity + step - base] = 0.0
                continue
            for c in range(num_labels):
                row[c] = alpha[c] - top
            exp_row(row, 0, row, 0, padded)
            product_row(row, transition.weights, padded, num_labels, value_row)
            for c in range(num_labels):
                row[c] = value_row[c]
            log_row(value_row, 0, value_row, 0, padded)
            for c in range(num_labels):
                if row[c] >= CERTAIN:
                    gamma = top + transition.peak[c] + value_row[c]
                else:
                    gamma = exact_product(alpha, transition.scores, c)
                if keep:
                    source_rows[position, c] = gamma
                if has_boundary:
                    gamma += opening[position, c]
                if gamma > NEG_INF:
                    if state.live_until[c] < step:
                        state.frame[c] = gamma  # no live source: the frame is free
                    h = gamma - state.frame[c]
                    if h > _HIGH:
                        delta = np.rint(h)
                        oldest = c * capacity + step - longest - base
                        _recentre(state, c, delta, oldest, longest)
                        state.sums[c * TILE : (c + 1) * TILE] *= math.exp(-delta)
                        h -= delta
                    state.live_until[c] = step + max_duration
                    row[c] = h
                else:
                    row[c] = -math.inf
                state.logs[c * capacity + step - base] = row[c]
            exp_row(row, 0, row, 0, padded)
            for c in range(num_labels):
                state.sources[c * capacity + step - base] = row[c]
                near = c * weight_row + TILE - i
                multiply_tile(row, c, 1, window.weights, near, 0, 1, state.sums, c * TILE)

    for c in range(num_labels):
        alpha[c] += last[c]
    top = alpha.max()
    if not top > NEG_INF:
        return 0.0, -math.inf
    total = 0.0
    for c in range(num_labels):
        total += math.exp(alpha[c] - top)
    return shift, top + math.log(total)

"""One pass of messages over one sequence, forwards or backwards, for static transitions.

Forwards the kernel computes, with the window sum as multiply-adds (``docs/performance.md``),

    H_s(c)     = gamma_s(c) + open_s(c) - L_s(c),       E_s(c) = exp(H_s(c))
    alpha_t(c) = L_t(c) + peak(c) + log sum_{k=1..K} E_{t-k}(c) W_k(c) + close_t(c)
    gamma_t(c) = LSE_{c'} [alpha_t(c') + A[c', c]]

where L_t(c) is the label's *frame*: the running sum of its scores plus whatever keeps E within
range. Read from the end, with starts and ends exchanged and A transposed, the same recurrence gives
eta (for alpha) and beta (for gamma): one kernel serves both directions.

Blocks of `TILE` outputs share one sweep over the sources before the block (the far window); sources
inside the block are pushed onto the later outputs as they appear. Every `TILE` steps the messages
are shifted by a whole number, kept apart, so that they stay small and their offsets add exactly.

Flushed terms are never lost in silence: E and W drop what is below e^-650 of their frame, so a sum
of at least `CERTAIN` cannot have lost anything within float64's precision. A smaller sum, while a
source lives, is redone as a log-sum-exp from H. Cost T(KC + C²); workspace O(KC).
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import CERTAIN
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.static.frames import (
    MASK,
    first_sources,
    forget,
    highest_live,
    move_down,
    move_up,
    new_frames,
    recentre_block,
    settle_lives,
    shift_left,
)
from flash_semicrf.streaming.cpu.static.tail import add_longer
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    difference_row,
    exp_shifted_row,
    exp_sum,
    fill,
    log_scaled_row,
    log_sum_row,
    max_row,
    max_sum,
    multiply_row,
    multiply_tile,
    push_rows,
)

__all__ = ["message_pass"]

_HIGH = 200.0
"""H above this recentres the label's frame: E <= e^200 keeps CERTAIN a certificate."""

_LOW = -200.0
"""A window whose largest H is below this is recentred, so that its E count again."""


@helper
def _exact_window(logs, end, descending, row_end, count):
    """(max over k of H, LSE_k [H_{t-k} + D_k]) of the `count` sources before index `end`.

    `row_end` is the end of the label's row of `Window.descending`.
    """
    rounded = -(-count // LANES) * LANES  # those too early have a duration score of -inf, or no H
    top = max_sum(logs, end - rounded, descending, row_end - rounded, rounded)
    if top == -math.inf:
        return top, top
    total = exp_sum(logs, end - rounded, descending, row_end - rounded, top, rounded)
    highest = max_row(logs, end - rounded, 0, 0, 0.0, 0, rounded)
    return highest, top + math.log(total)


@helper
def _exact_product(work, alpha, transition, label, padded):
    """LSE over c' of alpha(c') + A[c', label], alpha being a row of work."""
    into, row = transition.into, label * padded
    top = max_sum(work, alpha, into, row, padded)
    if top == -math.inf:
        return top
    return top + math.log(exp_sum(work, alpha, into, row, top, padded))


@helper
def _far_window(state, window, step, base, longest):
    """Sums of the block after `step` over the sources up to `step`."""
    num_labels = window.peak.shape[0]
    row = longest + 3 * TILE
    padded, capacity = state.padded, state.capacity
    live_until, tile, buffer, work = state.live_until, state.tile, state.window, state.work
    weights = window.weights
    all_live = live_until[num_labels] > step
    fill(tile, 0, num_labels * TILE, 0.0)
    for c in range(num_labels):
        if all_live or live_until[c] > step:
            oldest = c * capacity + step + 1 - longest - base
            far = c * row + TILE + longest
            multiply_tile(buffer, oldest, 1, weights, far, -1, longest, tile, c * TILE)
    for j in range(TILE):
        for c in range(num_labels):
            work[j * padded + c] = tile[c * TILE + j]


@helper
def _cut_off(state, scores, position, step, base, longest, done):
    """Drop the sources of the labels that a position forbids."""
    settle_lives(state)
    count = min(step, longest)
    for c in range(scores.shape[1]):
        if not scores[position, c] > NEG_INF and state.live_until[c] >= step:
            forget(state, c, c * state.capacity + step - count - base, count, done)


@helper
def _rescue(state, rows, window, label, step, base, done):
    """Window sum of one output by its logarithms; recentre a frame whose sources are all tiny."""
    num_labels = window.peak.shape[0]
    if max(state.live_until[label], state.live_until[num_labels]) < step:
        return -math.inf
    longest = window.bias.shape[1] - 1
    count = min(step, longest)
    oldest = label * state.capacity + step - count - base
    row_end = (label + 1) * (longest + LANES)
    highest, value = _exact_window(
        state.window, state.logs + oldest + count, window.descending, row_end, count
    )
    highest -= state.work[rows.drift + label]
    value += state.work[rows.frame + label] - state.work[rows.drift + label]
    if -math.inf < highest < _LOW:
        move_down(
            state.work, state.window, state.logs, rows, label, np.rint(highest), oldest, count
        )
        fill(state.tile, label * TILE, TILE, 0.0)
        # The output `done` is this step's: source i of the window is `count - i` before it.
        near = label * (longest + 3 * TILE) + TILE + count - done
        multiply_tile(
            state.window, oldest, 1, window.weights, near, -1, count, state.tile, label * TILE
        )
        for j in range(done, TILE):
            state.work[j * state.padded + label] = state.tile[label * TILE + j]
    return value


@helper
def _make_sources(state, rows, window, transition, sequence, position, step, base, done, certain):
    """Turn the row gamma into sources, label by label: the careful form of the common case.

    Redoes sums that are not `certain`, lets dead labels start in a fresh frame, and recentres
    frames that a source would leave.
    """
    num_labels = transition.scores.shape[0]
    longest = window.bias.shape[1] - 1
    settle_lives(state)
    work, live_until, buffer = state.work, state.live_until, state.window
    scores, opening, has_boundary = sequence.scores, sequence.opening, sequence.has_boundary
    for c in range(num_labels):
        if not certain and not work[rows.scratch + c] >= CERTAIN:
            work[rows.gamma + c] = _exact_product(work, rows.alpha, transition, c, state.padded)
        gamma = work[rows.gamma + c]
        if has_boundary:
            gamma += opening[position, c]
        if not (gamma > NEG_INF and scores[position, c] > NEG_INF):
            work[rows.log_source + c] = -math.inf  # `_cut_off` would drop it at the next step
            continue
        if live_until[c] < step:
            work[rows.frame + c] = gamma  # no live source: the frame is free
        h = gamma - work[rows.frame + c]
        if h > _HIGH:
            delta = np.rint(h)
            count = min(step, longest)
            first = c * state.capacity + step - count - base
            move_up(work, buffer, state.logs, rows, c, delta, first, count)
            for j in range(done + 1, TILE):
                work[j * state.padded + c] *= math.exp(-delta)
            h = gamma - work[rows.frame + c]  # not h - delta: either may be huge
        live_until[c] = step + longest
        work[rows.log_source + c] = h


@owning
def message_pass(sequence, first, last, window, transition, output):
    """Run one pass.

    Parameters
    ----------
    sequence : Sequence
    first : array of shape (C,)
        Source 0: the initial term, or the final scores backwards.
    last : array of shape (C,)
        Added to the last output before summing it up.
    window : Window
    transition : Transition
        In the direction of the pass.
    output : Output

    Returns
    -------
    offset, value : float
        log Z = offset + value.
    """
    num_labels = first.shape[0]
    padded = -(-num_labels // LANES) * LANES
    longest = window.bias.shape[1] - 1
    span = longest + LANES  # columns kept: the longest window, and room to round it up
    capacity = span + TILE * max(4, -(-longest // TILE))
    base = 1 - span  # step of the buffer's first column
    state, rows = new_frames(num_labels, capacity, window, transition)
    # Taking an array out of a NamedTuple counts a reference, atomically: once, not per position.
    work, buffer, logs, live_until = state.work, state.window, state.logs, state.live_until
    near, weights = window.near, transition.weights
    scores, closing, length = sequence.scores, sequence.closing, sequence.length
    has_boundary, keep = sequence.has_boundary, output.keep
    out_rows, source_rows, offsets = output.outputs, output.sources, output.offsets
    longer = np.full(num_labels + 1, -math.inf)
    longer[num_labels] = 0.0
    shift = 0.0
    position = length - 1 if sequence.backward else 0
    ahead = -1 if sequence.backward else 1
    first_sources(state, rows, first, sequence, position, base, longest)
    if keep:
        offsets[0] = 0.0
        for c in range(num_labels):
            source_rows[position, c] = first[c]

    for block in range(0, length, TILE):
        if block + TILE - base >= capacity:
            drop = block + 1 - span - base
            shift_left(state, rows, drop, span)
            base += drop
        recentre_block(state, rows, block, base, longest)
        _far_window(state, window, block, base, longest)
        steps = min(TILE, length - block)
        for i in range(steps):
            step = block + 1 + i
            forbidden = False
            for c in range(num_labels):
                x = scores[position, c]
                if x > NEG_INF:
                    work[rows.frame + c] += x
                else:
                    forbidden = True
            if forbidden:
                _cut_off(state, scores, position, step, base, longest, i)
            lowest = log_sum_row(
                work, rows.frame, rows.window_peak, i * padded, 0.0, rows.alpha, padded
            )
            if not lowest >= CERTAIN:
                everywhere = live_until[num_labels]
                for c in range(num_labels):
                    if not work[i * padded + c] >= CERTAIN:
                        if everywhere < step and live_until[c] < step:
                            work[rows.alpha + c] = -math.inf
                            continue
                        work[rows.alpha + c] = _rescue(state, rows, window, c, step, base, i)
            oldest = logs + step - longest - base if step >= longest else -1
            add_longer(
                window.tail,
                window.bias,
                longer,
                shift,
                scores,
                position,
                state,
                rows,
                oldest,
                output.longer,
            )
            if has_boundary:
                for c in range(num_labels):
                    x = work[rows.alpha + c] + closing[position, c]
                    work[rows.alpha + c] = x if x > NEG_INF else -math.inf
            top = max_row(work, rows.alpha, 0, 0, 0.0, 0, padded)
            alive = top > -math.inf
            if i == steps - 1 and alive:
                level = top
                if level < -MASK:
                    level = highest_live(state, rows, window, longer, top, shift, step, base)
                delta = np.rint(level)
                shift += delta
                top -= delta
                for c in range(num_labels):
                    work[rows.alpha + c] -= delta
                    work[rows.frame + c] -= delta
            if keep:
                offsets[step] = shift
                for c in range(num_labels):
                    out_rows[position, c] = work[rows.alpha + c]
            if step == length:
                break

            # The next source: gamma from alpha.
            position += ahead
            lowest = 0.0
            if alive:
                exp_shifted_row(work, rows.alpha, 0, 0, top, rows.gamma, padded)
                fill(work, rows.scratch, padded, 0.0)
                multiply_row(
                    work, rows.gamma, 1, weights, 0, padded, num_labels, work, rows.scratch
                )
                lowest = log_scaled_row(
                    work, rows.transition_peak, 0, rows.scratch, top, rows.gamma, padded
                )
            else:
                for c in range(num_labels):
                    work[rows.gamma + c] = -math.inf
            certain = lowest >= CERTAIN
            usual = certain and not has_boundary and live_until[num_labels] >= step
            if usual:
                high = difference_row(work, rows.gamma, rows.frame, 0, 0.0, rows.log_source, padded)
                usual = high <= _HIGH
            if usual:
                live_until[num_labels] = step + longest
            else:
                certain = certain or not alive
                _make_sources(
                    state, rows, window, transition, sequence, position, step, base, i, certain
                )
                live_until[num_labels] = step + longest
                for c in range(num_labels):
                    live_until[num_labels] = min(live_until[num_labels], live_until[c])
            if keep:
                for c in range(num_labels):
                    source_rows[position, c] = work[rows.gamma + c]
            exp_shifted_row(work, rows.log_source, 0, 0, 0.0, rows.source, padded)
            for c in range(num_labels):
                column = c * capacity + step - base
                buffer[column] = work[rows.source + c]
                buffer[logs + column] = work[rows.log_source + c] + work[rows.drift + c]
            push_rows(work, rows.source, near, padded, (i + 1) * padded, padded, TILE - 1 - i)

    top = -math.inf
    for c in range(num_labels):
        work[rows.alpha + c] += last[c]
        top = max(top, work[rows.alpha + c])
    if not top > NEG_INF:
        return 0.0, -math.inf
    total = 0.0
    for c in range(num_labels):
        total += math.exp(work[rows.alpha + c] - top)
    return shift, top + math.log(total)

"""Workspace of a pass for static transitions: each label's sources in a frame of its own.

E_s(c) = exp(H_s(c)) stands in the label's frame L (`flash_semicrf.streaming.cpu.static.passes`),
which follows the running sum of its scores and moves where E would leave its range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.vector import TILE, add_to, exp_shifted_row, fill, scale_row

__all__ = [
    "MASK",
    "State",
    "first_sources",
    "forget",
    "highest_live",
    "move_up",
    "new_frames",
    "move_down",
    "recentre_block",
    "settle_lives",
    "shift_left",
]

_GROWN = 50.0
"""H above this recentres a frame between blocks, where that is cheaper."""

MASK = 1e4
"""Scores beyond this, as masks are, must not take the precision of those after them."""


class State(NamedTuple):
    """Workspace of a pass.

    `window` holds each label's E by time, a row of `capacity` per label, and behind all of them,
    `logs` elements further, their logarithms H plus the label's drift: recentring a frame scales E
    and moves the drift, not the logarithms. Rows of `work` have one element per label, padded to
    whole vectors: those of the sums first, then those that `Places` names. Padding is such that
    every row operation stays harmless: peaks of -inf, sums of 1.
    """

    window: np.ndarray  # (2 * (C * capacity + LANES),)
    logs: int
    work: np.ndarray  # ((TILE + 13) * padded,)
    live_until: np.ndarray  # (C + 1,) last step that a live source reaches; [C]: that all do
    tile: np.ndarray  # (C * TILE,) far sums, before they are transposed into `work`
    padded: int  # elements of a row of `work`
    capacity: int  # and of a row of `window`


class Places(NamedTuple):
    """Offsets of the named rows of `State.work`."""

    frame: int  # L
    window_peak: int
    alpha: int
    transition_peak: int
    gamma: int
    log_source: int
    source: int
    scratch: int
    drift: int
    spare: int  # and three more


@owning
def new_frames(num_labels, capacity, window, transition):
    """Fresh workspace and its rows."""
    padded = -(-num_labels // LANES) * LANES
    first = TILE * padded
    rows = Places(
        first,
        first + padded,
        first + 2 * padded,
        first + 3 * padded,
        first + 4 * padded,
        first + 5 * padded,
        first + 6 * padded,
        first + 7 * padded,
        first + 8 * padded,
        first + 9 * padded,
    )
    half = num_labels * capacity + LANES
    state = State(
        np.zeros(2 * half),
        half,
        np.zeros((TILE + 13) * padded),
        np.full(num_labels + 1, -1),
        np.zeros(num_labels * TILE),
        padded,
        capacity,
    )
    fill(state.window, half, half, -math.inf)
    fill(state.work, 0, TILE * padded, 1.0)
    fill(state.work, rows.log_source, padded, -math.inf)
    for c in range(padded):
        inside = c < num_labels
        state.work[rows.window_peak + c] = window.peak[c] if inside else -math.inf
        state.work[rows.transition_peak + c] = transition.peak[c] if inside else -math.inf
    return state, rows


@inlined
def _drift(work, window, logs, rows, label, shift, first, count):
    """Let the logarithms follow a frame: at once where their drift would cost them precision."""
    if abs(shift) < MASK:
        work[rows.drift + label] += shift
    else:
        add_to(window, logs + first, count, -shift)


@inlined
def move_up(work, window, logs, rows, label, shift, first, count):
    """Move a label's frame up by `shift` > 0, over the `count` buffered sources from `first`."""
    work[rows.frame + label] += shift
    _drift(work, window, logs, rows, label, shift, first, count)
    rounded = -(-count // LANES) * LANES  # the row has room for it before the window
    begin = first + count - rounded
    scale_row(window, begin, 0, 0, math.exp(-shift), begin, rounded)


@helper
def move_down(work, window, logs, rows, label, shift, first, count):
    """Move a label's frame down by -`shift` > 0: what had been flushed comes back."""
    work[rows.frame + label] += shift
    _drift(work, window, logs, rows, label, shift, first, count)
    drift = work[rows.drift + label]
    rounded = -(-count // LANES) * LANES
    begin = first + count - rounded
    exp_shifted_row(window, logs + begin, 0, 0, drift, begin, rounded)


@helper
def settle_lives(state):
    """Make `live_until` true label by label."""
    last = state.live_until.shape[0] - 1
    for c in range(last):
        state.live_until[c] = max(state.live_until[c], state.live_until[last])
    state.live_until[last] = -1


@helper
def forget(state, label, first, count, done):
    """Drop a label's sources, and what they gave to the outputs from `done` of the block on."""
    fill(state.window, first, count, 0.0)
    fill(state.window, state.logs + first, count, -math.inf)
    for j in range(done, TILE):
        state.work[j * state.padded + label] = 0.0
    state.live_until[label] = -1


@helper
def shift_left(state, rows, drop, keep):
    """Drop the oldest columns of the buffer, and the whole part of the drifts."""
    for c in range(state.live_until.shape[0] - 1):
        drift = np.rint(state.work[rows.drift + c])
        state.work[rows.drift + c] -= drift
        row = c * state.capacity
        for i in range(row, row + keep):
            state.window[i] = state.window[i + drop]
            state.window[state.logs + i] = state.window[state.logs + i + drop] - drift


@helper
def recentre_block(state, rows, step, base, longest):
    """Lower the frames whose newest source has grown, while no sums hang on them."""
    count = min(step + 1, longest)
    rounded = -(-count // LANES) * LANES
    work, window = state.work, state.window
    for c in range(state.live_until.shape[0] - 1):
        h = work[rows.log_source + c]
        if h > _GROWN:
            shift = np.rint(h)
            work[rows.frame + c] += shift
            work[rows.drift + c] += shift
            begin = c * state.capacity + step + 1 - base - rounded
            scale_row(window, begin, 0, 0, math.exp(-shift), begin, rounded)


@helper
def highest_live(state, rows, window, longer, top, shift, step, base):
    """Level of a step's messages whose largest is `top`, and of the sources still to be used.

    Where all segments that end at a step are masked, the messages are far below the sources of
    those that go on, which must not be shifted by as much.
    """
    num_labels = window.peak.shape[0]
    longest = window.bias.shape[1] - 1
    count = min(step, longest)
    for c in range(num_labels):
        first = state.logs + c * state.capacity + step - count - base
        offset = state.work[rows.frame + c] - state.work[rows.drift + c] + window.peak[c]
        for i in range(first, first + count):
            top = max(top, state.window[i] + offset)
        top = max(top, longer[c] + longer[num_labels] - shift)
    return top


@helper
def first_sources(state, rows, first, sequence, position, base, longest):
    """Put source 0 of every label into the buffer, each in a frame of its own."""
    for c in range(first.shape[0]):
        h = first[c]
        if sequence.has_boundary:
            h += sequence.opening[position, c]
        if h > NEG_INF:
            state.work[rows.frame + c] = h
            state.window[c * state.capacity - base] = 1.0
            state.window[state.logs + c * state.capacity - base] = 0.0
            state.live_until[c] = longest

"""The sliding window of kernels for transitions by duration.

For each label it holds a value for each of K positions at which a segment can end: forwards, what
has arrived there; backwards, what can follow. Scores of positions are added to a label's frame,
which all of its values share, and settled into them when the window slides, by `block` columns at a
time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.parts import helper, owning

__all__ = [
    "FLOOR",
    "Window",
    "absorb",
    "copy_row",
    "highest",
    "make_window",
    "slide_left",
    "slide_right",
    "start_segments",
    "take_end",
    "whole_level",
]

FLOOR = -1e300
"""A forbidden value: finite, so that the difference of two is not NaN."""

_MASKED = -1e4  # levels below it are those of finite masks

_JUMP = 1e4  # a score beyond it would cost the frame its precision: it is settled at once


class Window(NamedTuple):
    """Values of C labels, a row each."""

    values: np.ndarray  # (C * capacity,) less their frame
    frame: np.ndarray  # (C,)
    max_duration: int
    block: int  # columns that a slide frees
    capacity: int  # max_duration + block


@owning
def make_window(num_labels, max_duration, block):
    """A window where everything is forbidden."""
    capacity = max_duration + block
    values = np.full(num_labels * capacity, FLOOR)
    return Window(values, np.zeros(num_labels), max_duration, block, capacity)


@helper
def copy_row(source, target):
    """target = source, for the length of source; compiled faster than numba's assignment."""
    for i in range(source.shape[0]):
        target[i] = source[i]


@helper
def highest(row):
    """Maximum of a short row."""
    top = -math.inf
    for value in row:
        top = max(top, value)
    return top


@helper
def whole_level(top, window):
    """Whole number near the level of a message whose largest entry is `top`; 0 without any.

    Where that is masked, with all segments that end here, it is the level of the segments that go
    on: a shift by as much as a mask would cost them their digits.
    """
    if top == -math.inf:
        return 0.0
    if top < _MASKED:
        for c in range(window.frame.shape[0]):
            row = window.values[c * window.capacity : (c + 1) * window.capacity]
            top = max(top, highest(row) + window.frame[c])
    return np.rint(top)


@helper
def absorb(window, label, score):
    """Add the score of a position to all values of its label."""
    if abs(score) < _JUMP:
        window.frame[label] += score
        return
    added = window.frame[label] + score if score > NEG_INF else FLOOR
    row = window.values[label * window.capacity : (label + 1) * window.capacity]
    for i in range(row.shape[0]):
        row[i] = max(row[i] + added, FLOOR)
    window.frame[label] = 0.0


@helper
def slide_left(window):
    """Drop the first `block` columns; those gained are forbidden."""
    for c in range(window.frame.shape[0]):
        row = window.values[c * window.capacity : (c + 1) * window.capacity]
        for i in range(window.max_duration):
            row[i] = max(row[i + window.block] + window.frame[c], FLOOR)
        for i in range(window.max_duration, window.capacity):
            row[i] = FLOOR
        window.frame[c] = 0.0


@helper
def slide_right(window):
    """Make room for `block` columns on the left."""
    for c in range(window.frame.shape[0]):
        row = window.values[c * window.capacity : (c + 1) * window.capacity]
        for i in range(window.max_duration - 1, -1, -1):
            row[i + window.block] = max(row[i] + window.frame[c], FLOOR)
        window.frame[c] = 0.0


@helper
def take_end(window, column, scores, end, has_boundary, position, beta, offset):
    """Put in beta + offset for the segments that end at `position`; then its scores cover all."""
    for c in range(window.frame.shape[0]):
        u = beta[c] + offset
        if has_boundary:
            u += end[position, c]
        window.values[c * window.capacity + column] = max(u - window.frame[c], FLOOR)
        absorb(window, c, scores[position, c])


@helper
def start_segments(window, column, bias, start, has_boundary, position, row):
    """row = eta: the segments that start at `position`, and all that can follow them.

    `column` is that of the segments of one position; longer ones are to its right.
    """
    longest = window.max_duration
    for c in range(window.frame.shape[0]):
        shift = window.frame[c]
        if has_boundary:
            shift += start[position, c]
        first = c * window.capacity + column
        ends = window.values[first : first + longest]
        scores = bias[c * longest : (c + 1) * longest]
        out = row[c * longest : (c + 1) * longest]
        for k in range(longest):
            out[k] = scores[k] + ends[k] + shift

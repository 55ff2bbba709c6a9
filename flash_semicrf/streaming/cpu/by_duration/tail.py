"""Durations beyond K in the passes for transitions by duration, at O(C) a position.

A longer segment uses row K of the transitions, as one of K positions does. The two are one *class*
of segments, whose value takes the place of that of duration K: then gradients by row K, and the
marginals of starts, count both. Q_t(c), the log-sum of what may follow K positions of c before t,

    Q_t(c) = LSE [end_{t-1}(c) + beta_t(c), scores[t, c] + tail(c) + Q_{t+1}(c)],

takes the place of end_{t-1} + beta_t in the backward pass; in the forward pass, where the output at
t starts as what the class has brought there, the output at t + 1 starts as that with one position
more. In a window (`flash_semicrf.streaming.cpu.by_duration.window`), all of whose values get the
scores of positions, both are steps to a neighbouring column. The expected number of positions
beyond the K-th of a segment of the class that starts at s is

    further_s(c) = P(it goes on beyond s + K) (1 + further_{s+1}(c)).

For problems without a tail, whose first argument is None, these functions are compiled to nothing.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.by_duration.window import FLOOR
from flash_semicrf.streaming.cpu.parts import helper, owning

__all__ = [
    "add_further",
    "best_longer",
    "extend_best",
    "extend_ends",
    "extend_outputs",
    "keep_ends",
    "make_origins",
    "note_beaten",
    "reach",
    "resume_ends",
]


@helper
def extend_outputs(tail, window, sums, column):
    """Start the next output with what the class has brought to the one K - 1 after `column`.

    Called when the sources of K positions and more are all that the latter has: `values` and `sums`
    are the pairs of `flash_semicrf.streaming.cpu.by_duration.passes`.
    """
    if tail is None:
        return
    values = window.values
    for c in range(tail.shape[0]):
        i = c * window.capacity + column + window.max_duration
        values[i] = max(values[i - 1] + tail[c], FLOOR)
        sums[i] = sums[i - 1]


@helper
def extend_ends(tail, window, column, further, further_rows, row):
    """Replace the ends of K positions after the start in `column` by those of the class.

    The window has the class of the start after this one behind its end, in the next column, and
    `further` (C,) is that of the same start. It becomes that of this one, copied to a row of
    `further_rows` (N * C,).
    """
    if tail is None:
        return
    num_labels, values = tail.shape[0], window.values
    for c in range(num_labels):
        i = c * window.capacity + column + window.max_duration
        exact, longer = values[i - 1], max(values[i] + tail[c], FLOOR)
        high = max(exact, longer)
        small = math.exp(min(exact, longer) - high)
        values[i - 1] = high + math.log1p(small)
        goes_on = (1.0 if longer > exact else small) / (1.0 + small)
        further[c] = goes_on * (1.0 + further[c])
        further_rows[row * num_labels + c] = further[c]


@helper
def keep_ends(tail, window, column, rest_rows, row):
    """Write the value of the class of the start in `column`, without D_K, to a row (of N * C)."""
    if tail is None:
        return
    num_labels = tail.shape[0]
    for c in range(num_labels):
        end = c * window.capacity + column + window.max_duration - 1
        x = window.values[end] + window.frame[c]
        rest_rows[row * num_labels + c] = x if x > NEG_INF else -math.inf


@helper
def resume_ends(tail, window, column, scores, stop, messages, moved, further):
    """Go on with the class from a start at `stop`, at the start before it, in `column`.

    `moved` is its offset less that of the window; `further` (C,) becomes that of `stop`.
    """
    if tail is None:
        return
    num_labels = tail.shape[0]
    for c in range(num_labels):
        score = scores[stop - 1, c]
        x = messages.rest[stop * num_labels + c] + moved + score - window.frame[c]
        allowed = x > NEG_INF and score > NEG_INF
        window.values[c * window.capacity + column + window.max_duration] = x if allowed else FLOOR
        further[c] = messages.further[stop * num_labels + c]


@helper
def add_further(tail, beyond, label, probability, further, row):
    """Add the positions beyond the K-th of a class of this probability, from a row of further."""
    if tail is None:
        return
    beyond[label] += probability * further[row * tail.shape[0] + label]


@owning
def make_origins(tail, window):
    """For each value of a window of the max pass: where its segment starts, if that is beyond K.

    -1 where one of at most K positions is as good.
    """
    if tail is None:
        return np.empty(0, np.int64)
    return np.full(window.values.shape[0], -1)


@helper
def note_beaten(tail, origins, values, first, source, at, shift, longest):
    """Note the longer segments that K sources at `at` are to replace in values from `first` on."""
    if tail is None:
        return
    for k in range(longest):
        if source[at + k] + shift >= values[first + k]:
            origins[first + k] = -1


@helper
def extend_best(tail, window, origins, column, position, origin_rows):
    """`extend_outputs` of the max pass; also writes row `position` of `origin_rows` (T, C)."""
    if tail is None:
        return
    values, longest, capacity = window.values, window.max_duration, window.capacity
    for c in range(tail.shape[0]):
        first = c * capacity
        origin_rows[position, c] = origins[first + column]
        i = first + column + longest
        values[i] = max(values[i - 1] + tail[c], FLOOR)
        origins[i] = origins[i - 1] if origins[i - 1] >= 0 else position
        if column + 1 == window.block:
            for j in range(first, first + longest):
                origins[j] = origins[j + window.block]
            for j in range(first + longest, first + capacity):
                origins[j] = -1


@helper
def best_longer(tail, origin_rows, stop, label):
    """Duration of the best segment of `label` that ends before `stop`, if above K, else 0."""
    if tail is None:
        return 0
    origin = origin_rows[stop - 1, label]
    return stop - origin if origin >= 0 else 0


@helper
def reach(tail, label, longest, stop):
    """Longest duration of a segment of `label` before `stop`; what a position beyond K adds."""
    if tail is None:
        return min(longest, stop), 0.0
    if tail[label] > NEG_INF:
        return stop, tail[label]
    return min(longest, stop), 0.0

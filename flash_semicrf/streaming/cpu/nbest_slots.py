"""The slots of a node of the N best search: its best predecessors, in order.

See `flash_semicrf.streaming.cpu.nbest`. A slot is a row of two plain arrays, of integers and of
floats; a node has a range of rows.

With a duration tail the predecessors go back to the start. Those beyond K are looked at as long as
one of them may be among the best: with

    longer_t(c) = scores[t-1, c] + tail(c) + max [longer_{t-1}(c), the term of duration K at t-1],

the best score of the segments longer than K that end at t, less end scores, that of the segments of
at least k > K positions is longer_u(c), u = t - k + K + 1, and what the positions from u on add.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.jit import helper, inlined

__all__ = [
    "CONTENT",
    "DURATION",
    "INTO",
    "RANK",
    "SOURCE",
    "VALUE",
    "Model",
    "best_arrivals",
    "best_duration",
    "best_longer",
    "find_last_labels",
    "find_slots",
    "keep_slots",
]

DURATION, SOURCE, RANK = range(3)
"""Columns of the integers: duration of the last segment and the label before it, -1 for the first
segment; rank of the path before it that is to be taken next."""

VALUE, INTO, CONTENT = range(3)
"""Columns of the floats: score of that path with the last segment, -inf if there is none; the
transition and the rest of the last segment's score. They are added in this order wherever a sum may
tie."""


class Model(NamedTuple):
    """Scores of one sequence and its messages.

    Attributes
    ----------
    scores, start, end : arrays of shape (T, C)
    has_boundary : bool
    length : int
    bias, first : float64 arrays of shape (K, C)
        D_k(c), and what the first segment gets in place of a transition.
    tail : float64 array of shape (C,)
        -inf without one.
    transition : float64 array of shape (K or 1, C, C)
    alpha : float64 array of shape (T + 1, C)
    gamma : float64 array of shape (T + 1, C)
        max over c' of alpha_s(c') + A[c', c], by duration with the last A; (1, 1) where that serves
        nothing, for transitions by duration without a tail.
    longer : float64 array of shape (T + 1, C), or (1, 1) without a tail
    durations : int32 array of shape (T + 1, C)
        Of the last segment of the best path, as far as it has been asked for, else 0.
    """

    scores: np.ndarray
    start: np.ndarray
    end: np.ndarray
    has_boundary: bool
    length: int
    bias: np.ndarray
    first: np.ndarray
    tail: np.ndarray
    transition: np.ndarray
    alpha: np.ndarray
    gamma: np.ndarray
    longer: np.ndarray
    durations: np.ndarray


@helper
def best_arrivals(alpha, transition, length, gamma):
    """Fill gamma_1..gamma_{length - 1}."""
    num_labels = alpha.shape[1]
    matrix = transition.shape[0] - 1
    for s in range(1, length):
        for c in range(num_labels):
            gamma[s, c] = -math.inf
        for source in range(num_labels):
            value = alpha[s, source]
            for c in range(num_labels):
                x = value + transition[matrix, source, c]
                gamma[s, c] = x if x > gamma[s, c] else gamma[s, c]


@helper
def best_longer(scores, start, has_boundary, length, bias, first, tail, gamma, longer):
    """Fill longer_0..longer_length."""
    longest, num_labels = bias.shape
    # The last K scores are the end of a block of K and the beginning of the next one: sums of the
    # former from each of its positions on, and of what has come of the latter.
    before, since = np.zeros((longest + 1, num_labels)), np.zeros(num_labels)
    for t in range(length + 1):
        for c in range(num_labels):
            longer[t, c] = -math.inf
    for t in range(longest, length):
        s = t - longest
        if t % longest == 0:
            for i in range(longest - 1, -1, -1):
                for c in range(num_labels):
                    before[i, c] = scores[s + i, c] + before[i + 1, c]
            for c in range(num_labels):
                since[c] = 0.0
        for c in range(num_labels):
            x = first[longest - 1, c] if s == 0 else gamma[s, c]
            x += bias[longest - 1, c] + (before[t % longest, c] + since[c])
            if has_boundary:
                x += start[s, c]
            longer[t + 1, c] = max(longer[t, c], x) + (scores[t, c] + tail[c])
            since[c] += scores[t, c]


@inlined
def _last_duration(bias, tail, t, label):
    """Longest duration of a segment that ends before t."""
    return t if tail[label] > NEG_INF else min(bias.shape[0], t)


@inlined
def _content(bias, tail, start, end, has_boundary, s, t, label, inside):
    """Score of the segment [s, t) but for its transition; `inside` is the sum of its scores."""
    k, longest = t - s, bias.shape[0]
    x = inside + bias[min(k, longest) - 1, label]
    if k > longest:
        x += (k - longest) * tail[label]
    if has_boundary:
        x += start[s, label] + end[t - 1, label]
    return x


@inlined
def _best_arrival(first, transition, alpha, gamma, s, k, label):
    """Best score before a segment of duration k that starts at s, its transition included."""
    row = min(k, first.shape[0]) - 1
    if s == 0:
        return first[row, label]
    if transition.shape[0] == 1 or k > row + 1:
        return gamma[s, label]
    best = -math.inf
    for source in range(alpha.shape[1]):
        best = max(best, alpha[s, source] + transition[row, source, label])
    return best


@inlined
def _bound(longer, end, has_boundary, u, t, label, beyond):
    """Best score of the segments that end before t and last beyond K from u on at least."""
    x = longer[u, label] + beyond
    return x + end[t - 1, label] if has_boundary else x


@helper
def best_duration(model, t, label):
    """Duration of the last segment of the best path of a node; the shortest of equals."""
    durations = model.durations
    if durations[t, label] > 0:
        return durations[t, label]
    scores, bias, start, end = model.scores, model.bias, model.start, model.end
    tail, longer, longest = model.tail, model.longer, model.bias.shape[0]
    best = -math.inf
    inside, beyond = 0.0, 0.0
    for k in range(1, _last_duration(bias, tail, t, label) + 1):
        s = t - k
        inside += scores[s, label]
        if not inside > NEG_INF:
            break
        if k > longest:
            u = s + longest + 1
            beyond += scores[u, label] + tail[label] if u < t else 0.0
            if not _bound(longer, end, model.has_boundary, u, t, label, beyond) > best:
                break
        content = _content(bias, tail, start, end, model.has_boundary, s, t, label, inside)
        before = _best_arrival(model.first, model.transition, model.alpha, model.gamma, s, k, label)
        if before + content > best:
            best = before + content
            durations[t, label] = k
    return durations[t, label]


@helper
def _comes_first(model, t, source, other):
    """Whether the best path of (t, source) comes before that of (t, other) if they tie."""
    mine, others = best_duration(model, t, source), best_duration(model, t, other)
    return mine < others or (mine == others and source < other)


@inlined
def _insert(model, ints, floats, first, number, space, value, into, content, t, duration, source):
    """Put a predecessor among the `number` slots of the node, if it is one of the best; count them.

    Predecessors come by duration, then by source.
    """
    position = number
    while position > 0:
        other = first + position - 1
        if value < floats[other, VALUE]:
            break
        if value == floats[other, VALUE]:
            if duration != ints[other, DURATION]:
                break
            if not _comes_first(model, t - duration, source, ints[other, SOURCE]):
                break
        position -= 1
    if position == space:
        return number
    number = min(number + 1, space)
    for i in range(first + number - 1, first + position, -1):
        for column in range(3):
            ints[i, column] = ints[i - 1, column]
            floats[i, column] = floats[i - 1, column]
    i = first + position
    ints[i, DURATION] = duration
    ints[i, SOURCE] = source
    ints[i, RANK] = 0
    floats[i, VALUE] = value
    floats[i, INTO] = into
    floats[i, CONTENT] = content
    return number


@helper
def find_slots(model, ints, floats, first, space, t, label):
    """Fill the slots of the node (t, label) with its best predecessors; return their number."""
    scores, bias, start, end = model.scores, model.bias, model.start, model.end
    transition, alpha, gamma = model.transition, model.alpha, model.gamma
    tail, longer, longest = model.tail, model.longer, model.bias.shape[0]
    static = transition.shape[0] == 1
    number = 0
    inside, beyond = 0.0, 0.0
    for k in range(1, _last_duration(bias, tail, t, label) + 1):
        s = t - k
        inside += scores[s, label]
        if not inside > NEG_INF:
            break
        if k > longest:
            u = s + longest + 1
            beyond += scores[u, label] + tail[label] if u < t else 0.0
            bound = _bound(longer, end, model.has_boundary, u, t, label, beyond)
            # A longer one of the same score would come after those that there are.
            worst = floats[first + number - 1, VALUE] if number == space else -math.inf
            if not (bound > NEG_INF and bound > worst):
                break
        row = min(k, longest) - 1
        content = _content(bias, tail, start, end, model.has_boundary, s, t, label, inside)
        if s == 0:
            x = model.first[row, label] + content
            if x > NEG_INF:
                number = _insert(
                    model, ints, floats, first, number, space, x, 0.0, content, t, k, -1
                )
            continue
        if static or k > longest:
            bound = gamma[s, label] + content
            if not bound > NEG_INF:
                continue
            if number == space and bound < floats[first + number - 1, VALUE]:
                continue
        matrix = 0 if static else row
        for source in range(alpha.shape[1]):
            into = transition[matrix, source, label]
            x = (alpha[s, source] + into) + content
            if x > NEG_INF and not (number == space and x < floats[first + number - 1, VALUE]):
                number = _insert(
                    model, ints, floats, first, number, space, x, into, content, t, k, source
                )
    return number


@helper
def find_last_labels(model, last, ints, floats):
    """Fill the slots of the root, one for every label that can be the last; return their number."""
    number = 0
    for c in range(last.shape[0]):
        x = model.alpha[model.length, c] + last[c]
        if x > NEG_INF:
            number = _insert(
                model, ints, floats, 0, number, last.shape[0], x, last[c], 0.0, model.length, 0, c
            )
    return number


@helper
def keep_slots(ints, floats, old, count, first, number, space):
    """Put the `count` slots that a node had before the others of its `number` new ones; count them.

    There they mostly are: with a tail, where a search ends hangs on the rounding of its bounds.
    """
    for j in range(count):
        i = j
        while i < number and (
            ints[first + i, DURATION] != ints[old + j, DURATION]
            or ints[first + i, SOURCE] != ints[old + j, SOURCE]
        ):
            i += 1
        if i == number:
            number = min(number + 1, space)
            i = number - 1
        for row in range(first + i, first + j, -1):
            for column in range(3):
                ints[row, column] = ints[row - 1, column]
                floats[row, column] = floats[row - 1, column]
        for column in range(3):
            ints[first + j, column] = ints[old + j, column]
            floats[first + j, column] = floats[old + j, column]
    return number

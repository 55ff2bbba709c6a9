"""The slots of a node of the N best search: its best predecessors, in order.

See `flash_semicrf.streaming.cpu.nbest`. A slot is a row of two plain arrays, of integers and of
floats; a node has a range of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.potentials import NEG_INF
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
    "find_last_labels",
    "find_slots",
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
    transition : float64 array of shape (K or 1, C, C)
    alpha : float64 array of shape (T + 1, C)
    gamma : float64 array of shape (T + 1, C), or (1, 1) for transitions by duration
        max over c' of alpha_s(c') + A[c', c].
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
    transition: np.ndarray
    alpha: np.ndarray
    gamma: np.ndarray
    durations: np.ndarray


@helper
def best_arrivals(alpha, transition, length, gamma):
    """Fill gamma_1..gamma_{length - 1} for static transitions."""
    num_labels = alpha.shape[1]
    for s in range(1, length):
        for c in range(num_labels):
            gamma[s, c] = -math.inf
        for source in range(num_labels):
            value = alpha[s, source]
            for c in range(num_labels):
                x = value + transition[0, source, c]
                gamma[s, c] = x if x > gamma[s, c] else gamma[s, c]


@inlined
def _content(bias, start, end, has_boundary, s, t, label, inside):
    """Score of the segment [s, t) but for its transition; `inside` is the sum of its scores."""
    x = inside + bias[t - s - 1, label]
    if has_boundary:
        x += start[s, label] + end[t - 1, label]
    return x


@inlined
def _best_arrival(first, transition, alpha, gamma, s, k, label):
    """Best score before a segment of duration k that starts at s, its transition included."""
    if s == 0:
        return first[k - 1, label]
    if transition.shape[0] == 1:
        return gamma[s, label]
    best = -math.inf
    for source in range(alpha.shape[1]):
        best = max(best, alpha[s, source] + transition[k - 1, source, label])
    return best


@helper
def best_duration(model, t, label):
    """Duration of the last segment of the best path of a node; the shortest of equals."""
    durations = model.durations
    if durations[t, label] > 0:
        return durations[t, label]
    scores, bias, start, end = model.scores, model.bias, model.start, model.end
    best = -math.inf
    inside = 0.0
    for k in range(1, min(bias.shape[0], t) + 1):
        s = t - k
        inside += scores[s, label]
        if not inside > NEG_INF:
            break
        content = _content(bias, start, end, model.has_boundary, s, t, label, inside)
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
    static = transition.shape[0] == 1
    number = 0
    inside = 0.0
    for k in range(1, min(bias.shape[0], t) + 1):
        s = t - k
        inside += scores[s, label]
        if not inside > NEG_INF:
            break
        content = _content(bias, start, end, model.has_boundary, s, t, label, inside)
        if s == 0:
            x = model.first[k - 1, label] + content
            if x > NEG_INF:
                number = _insert(
                    model, ints, floats, first, number, space, x, 0.0, content, t, k, -1
                )
            continue
        if static:
            bound = gamma[s, label] + content
            if not bound > NEG_INF:
                continue
            if number == space and bound < floats[first + number - 1, VALUE]:
                continue
        matrix = 0 if static else k - 1
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

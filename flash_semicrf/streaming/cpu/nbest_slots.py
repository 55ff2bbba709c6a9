"""The slots of a node of the n-best search: its best predecessors, in order.

See `flash_semicrf.streaming.cpu.nbest`. A slot is a row of a plain array of records; a node has a
range of rows.

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
from flash_semicrf.streaming.cpu.by_duration.attached import Attached, moved, spanned
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning

__all__ = [
    "SLOT",
    "Model",
    "Shared",
    "best_arrivals",
    "best_duration",
    "best_longer",
    "find_last_labels",
    "find_slots",
    "keep_slots",
]

SLOT = np.dtype(
    [(name, np.int64) for name in ("duration", "source", "rank")]
    + [(name, np.float64) for name in ("value", "into", "content")]
)
"""Duration of the last segment and the label before it, -1 for the first segment; rank of the path
before it that is to be taken next; score of that path with the last segment, -inf if there is none;
the transition and the rest of the last segment's score. Scores are added in this order wherever a
sum may tie."""


class Shared(NamedTuple):
    """Parameters that all sequences share.

    Attributes
    ----------
    bias, first : float64 arrays of shape (K, C)
        D_k(c), and the first segment's term in place of a transition.
    tail : float64 array of shape (C,)
        -inf without one.
    transition : float64 array of shape (K or 1, C, C)
    last : float64 array of shape (C,)
        Final scores.
    has_tail, has_boundary : bool
    """

    bias: np.ndarray
    first: np.ndarray
    tail: np.ndarray
    transition: np.ndarray
    last: np.ndarray
    has_tail: bool
    has_boundary: bool


class Model(NamedTuple):
    """Scores of one sequence and its messages.

    Attributes
    ----------
    shared : Shared
    scores, start, end : arrays of shape (T, C)
    length : int
    alpha : float64 array of shape (T + 1, C)
    gamma : float64 array of shape (T + 1, C)
        max over c' of alpha_s(c') + A[c', c], by duration with the last A; (1, 1) where that serves
        nothing, for transitions by duration without a tail.
    longer : float64 array of shape (T + 1, C), or (1, 1) without a tail
    durations : int32 array of shape (T + 1, C)
        Of the last segment of the best path, as far as it has been needed, else 0.
    attached : Attached or None
        Scores of segments and of transitions by position.
    """

    shared: Shared
    scores: np.ndarray
    start: np.ndarray
    end: np.ndarray
    length: int
    alpha: np.ndarray
    gamma: np.ndarray
    longer: np.ndarray
    durations: np.ndarray
    attached: Attached | None


@helper
def best_arrivals(model):
    """Fill gamma_1..gamma_{length - 1}."""
    alpha, gamma, transition = model.alpha, model.gamma, model.shared.transition
    num_labels = alpha.shape[1]
    matrix = transition.shape[0] - 1
    for s in range(1, model.length):
        for c in range(num_labels):
            gamma[s, c] = -math.inf
        for source in range(num_labels):
            value = alpha[s, source]
            for c in range(num_labels):
                into = moved(model.attached, s, source, c, transition[matrix, source, c])
                x = value + into
                gamma[s, c] = x if x > gamma[s, c] else gamma[s, c]


@owning
def best_longer(model):
    """Fill longer_0..longer_length."""
    scores, start, gamma, longer = model.scores, model.start, model.gamma, model.longer
    shared, length = model.shared, model.length
    bias, first, tail, has_boundary = shared.bias, shared.first, shared.tail, shared.has_boundary
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
            x = spanned(model.attached, s, longest, c, x)
            longer[t + 1, c] = max(longer[t, c], x) + (scores[t, c] + tail[c])
            since[c] += scores[t, c]


# Functions for every duration take arrays, not a record: each array that is taken from a record is
# counted, atomically.


@inlined
def _last_duration(bias, tail, t, label):
    """Longest duration of a segment that ends before t."""
    return t if tail[label] > NEG_INF else min(bias.shape[0], t)


@inlined
def _content(bias, tail, start, end, has_boundary, attached, t, label, k, inside):
    """Score of the segment [t - k, t) but for its transition; `inside` is the sum of its scores."""
    longest = bias.shape[0]
    x = inside + bias[min(k, longest) - 1, label]
    if k > longest:
        x += (k - longest) * tail[label]
    if has_boundary:
        x += start[t - k, label] + end[t - 1, label]
    return spanned(attached, t - k, min(k, longest), label, x)


@inlined
def _best_arrival(attached, first, transition, alpha, gamma, s, k, label):
    """Best score before a segment of duration k that starts at s, its transition included."""
    row = min(k, first.shape[0]) - 1
    if s == 0:
        return first[row, label]
    if transition.shape[0] == 1 or k > row + 1:
        return gamma[s, label]
    best = -math.inf
    for source in range(alpha.shape[1]):
        into = moved(attached, s, source, label, transition[row, source, label])
        best = max(best, alpha[s, source] + into)
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
    scores, start, end, longer = model.scores, model.start, model.end, model.longer
    alpha, gamma, shared = model.alpha, model.gamma, model.shared
    bias, tail, first, transition = shared.bias, shared.tail, shared.first, shared.transition
    has_boundary, longest, attached = shared.has_boundary, bias.shape[0], model.attached
    best = -math.inf
    inside, beyond = 0.0, 0.0
    for k in range(1, _last_duration(bias, tail, t, label) + 1):
        inside += scores[t - k, label]
        if not inside > NEG_INF:
            break
        if k > longest:
            u = t - k + longest + 1
            beyond += scores[u, label] + tail[label] if u < t else 0.0
            if not _bound(longer, end, has_boundary, u, t, label, beyond) > best:
                break
        content = _content(bias, tail, start, end, has_boundary, attached, t, label, k, inside)
        given = attached, first, transition, alpha, gamma
        x = _best_arrival(*given, t - k, k, label) + content
        if x > best:
            best = x
            durations[t, label] = k
    return durations[t, label]


@helper
def _comes_first(model, t, source, other):
    """Whether the best path of (t, source) comes before that of (t, other) if they tie."""
    mine, others = best_duration(model, t, source), best_duration(model, t, other)
    return mine < others or (mine == others and source < other)


@inlined
def _insert(model, slots, first, number, space, t, duration, source, scores):
    """Put a predecessor among the `number` slots of the node, if it is one of the best; count them.

    Predecessors come by duration, then by source. Their scores are (value, into, content).
    """
    value, into, content = scores
    i = first + number
    while i > first:
        other = slots[i - 1]
        if value < other.value:
            break
        if value == other.value:
            if duration != other.duration:
                break
            if not _comes_first(model, t - duration, source, other.source):
                break
        i -= 1
    if i == first + space:
        return number
    number = min(number + 1, space)
    for j in range(first + number - 1, i, -1):
        slots[j] = slots[j - 1]
    new = slots[i]
    new.duration, new.source, new.rank = duration, source, 0
    new.value, new.into, new.content = value, into, content
    return number


@helper
def find_slots(model, slots, first_slot, space, t, label):
    """Fill the slots of the node (t, label) with its best predecessors; return their number."""
    scores, start, end, longer = model.scores, model.start, model.end, model.longer
    alpha, gamma, shared = model.alpha, model.gamma, model.shared
    bias, tail, first, transition = shared.bias, shared.tail, shared.first, shared.transition
    has_boundary, longest, attached = shared.has_boundary, bias.shape[0], model.attached
    static = transition.shape[0] == 1
    number = 0
    inside, beyond = 0.0, 0.0
    for k in range(1, _last_duration(bias, tail, t, label) + 1):
        s = t - k
        inside += scores[s, label]
        if not inside > NEG_INF:
            break
        # A longer one of the same score would come after those that there are.
        worst = slots[first_slot + number - 1].value if number == space else -math.inf
        if k > longest:
            u = s + longest + 1
            beyond += scores[u, label] + tail[label] if u < t else 0.0
            bound = _bound(longer, end, has_boundary, u, t, label, beyond)
            if not (bound > NEG_INF and bound > worst):
                break
        row = min(k, longest) - 1
        content = _content(bias, tail, start, end, has_boundary, attached, t, label, k, inside)
        if s == 0:
            x = first[row, label] + content
            if x > NEG_INF:
                found = (x, 0.0, content)
                number = _insert(model, slots, first_slot, number, space, t, k, -1, found)
            continue
        if static or k > longest:
            bound = gamma[s, label] + content
            if not bound > NEG_INF or bound < worst:
                continue
        matrix = 0 if static else row
        for source in range(alpha.shape[1]):
            into = moved(attached, s, source, label, transition[matrix, source, label])
            x = (alpha[s, source] + into) + content
            worst = slots[first_slot + number - 1].value if number == space else -math.inf
            if x > NEG_INF and not x < worst:
                found = (x, into, content)
                number = _insert(model, slots, first_slot, number, space, t, k, source, found)
    return number


@helper
def find_last_labels(model, slots):
    """Fill the slots of the root, one for every label that can be the last; return their number."""
    last, alpha, t = model.shared.last, model.alpha, model.length
    number = 0
    for c in range(last.shape[0]):
        x = alpha[t, c] + last[c]
        if x > NEG_INF:
            scores = (x, last[c], 0.0)
            number = _insert(model, slots, 0, number, last.shape[0], t, 0, c, scores)
    return number


@helper
def keep_slots(slots, old, count, first, number, space):
    """Put the `count` slots that a node had before the others of its `number` new ones; count them.

    They are mostly there: with a tail, the end of a search depends on the rounding of its bounds.
    """
    for j in range(count):
        kept = slots[old + j]
        i = first + j
        while i < first + number and (
            slots[i].duration != kept.duration or slots[i].source != kept.source
        ):
            i += 1
        if i == first + number:
            number = min(number + 1, space)
            i = first + number - 1
        for row in range(i, first + j, -1):
            slots[row] = slots[row - 1]
        slots[first + j] = kept
    return number

"""The n best segmentations by recursive enumeration, over the messages of the max pass.

A node is an end and a label (t, c); its paths are the segmentations of [0, t) that end in c. The
best path of every node is known from the max pass. The next best path of a node differs from its
last one either in the last segment or by the next best path of the node before it, which is asked
for in turn (Jiménez and Marzal 1999, "Computing the K shortest paths: a new algorithm and an
experimental comparison", WAE). Only nodes on paths that are asked for look at their K·C
predecessors, of which the n best are kept; each further path costs n per segment.

Ties: the shortest last segment, then the lowest label, and so on towards the start, at every rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.potentials import NEG_INF, Potentials
from flash_semicrf.segments import SegmentTable
from flash_semicrf.streaming.cpu import pool as threads
from flash_semicrf.streaming.cpu.jit import helper, kernel
from flash_semicrf.streaming.cpu.model import array_of, end_term, forbid, start_term
from flash_semicrf.streaming.cpu.static import boundary_arrays
from flash_semicrf.streaming.cpu.walks import gather

__all__ = ["n_best"]

_ROOT = 0  # the node after the last segment


class _Model(NamedTuple):
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


class _Nodes(NamedTuple):
    """Nodes that have been looked at, M of them, with slots and paths.

    Attributes
    ----------
    index : int32 array of shape (T + 1, C)
        Node of (t, c), or -1.
    end : int32 array of shape (M,)
        t.
    slots, paths : int32 arrays of shape (M,)
        Numbers of slots and of paths found.
    exhausted : bool array of shape (M,)
    duration, source : int32 arrays of shape (M, n)
        By slot: the last segment's duration, and the label before it, -1 for the first segment.
    rank : int32 array of shape (M, n)
        By slot: rank of the path before the last segment that is to be taken next.
    value : float64 array of shape (M, n)
        By slot: score of that path with the last segment; -inf if there is none.
    into, content : float64 arrays of shape (M, n)
        By slot: the last segment's transition and the rest of its score. Added one after the
        other wherever a sum may tie with another.
    path_slot, path_rank : int32 arrays of shape (M, n)
    path_value : float64 array of shape (M, n)
    """

    index: np.ndarray
    end: np.ndarray
    slots: np.ndarray
    paths: np.ndarray
    exhausted: np.ndarray
    duration: np.ndarray
    source: np.ndarray
    rank: np.ndarray
    value: np.ndarray
    into: np.ndarray
    content: np.ndarray
    path_slot: np.ndarray
    path_rank: np.ndarray
    path_value: np.ndarray


@helper
def _gamma(alpha, transition, length, gamma):
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


@helper
def _content(model, s, t, label, inside):
    """Score of the segment [s, t) but for its transition; `inside` is the sum of its scores."""
    x = inside + model.bias[t - s - 1, label]
    if model.has_boundary:
        x += model.start[s, label] + model.end[t - 1, label]
    return x


@helper
def _best_arrival(model, s, k, label):
    """Best score before a segment of duration k that starts at s, its transition included."""
    if s == 0:
        return model.first[k - 1, label]
    if model.transition.shape[0] == 1:
        return model.gamma[s, label]
    best = -math.inf
    for source in range(model.alpha.shape[1]):
        best = max(best, model.alpha[s, source] + model.transition[k - 1, source, label])
    return best


@helper
def _best_duration(model, t, label):
    """Duration of the last segment of the best path of a node; the shortest of equals."""
    if model.durations[t, label] > 0:
        return model.durations[t, label]
    best = -math.inf
    inside = 0.0
    for k in range(1, min(model.bias.shape[0], t) + 1):
        s = t - k
        inside += model.scores[s, label]
        if not inside > NEG_INF:
            break
        # Added up as slots are, so that rounding breaks no tie one way here and another there.
        x = _best_arrival(model, s, k, label) + _content(model, s, t, label, inside)
        if x > best:
            best = x
            model.durations[t, label] = k
    return model.durations[t, label]


@helper
def _insert(model, nodes, node, value, into, content, duration, source):
    """Put a predecessor among the slots of a node, if it is one of the n best."""
    number = nodes.slots[node]
    position = number
    while position > 0:
        other = position - 1
        if value < nodes.value[node, other]:
            break
        if value == nodes.value[node, other]:
            # Predecessors come by duration, then by source: only the segment before is open.
            if duration != nodes.duration[node, other] or duration == nodes.end[node]:
                break
            s = nodes.end[node] - duration
            before = _best_duration(model, s, source)
            if before >= _best_duration(model, s, nodes.source[node, other]):
                break
        position -= 1
    capacity = nodes.value.shape[1]
    if position == capacity:
        return
    number = min(number + 1, capacity)
    for i in range(number - 1, position, -1):
        nodes.value[node, i] = nodes.value[node, i - 1]
        nodes.into[node, i] = nodes.into[node, i - 1]
        nodes.content[node, i] = nodes.content[node, i - 1]
        nodes.duration[node, i] = nodes.duration[node, i - 1]
        nodes.source[node, i] = nodes.source[node, i - 1]
    nodes.value[node, position] = value
    nodes.into[node, position] = into
    nodes.content[node, position] = content
    nodes.duration[node, position] = duration
    nodes.source[node, position] = source
    nodes.slots[node] = number


@helper
def _look_at(model, nodes, node, t, label):
    """Make the node of (t, label): its slots, and its best path."""
    nodes.index[t, label] = node
    nodes.end[node] = t
    nodes.slots[node] = 0
    num_labels = model.alpha.shape[1]
    capacity = nodes.value.shape[1]
    inside = 0.0
    for k in range(1, min(model.bias.shape[0], t) + 1):
        s = t - k
        inside += model.scores[s, label]
        if not inside > NEG_INF:
            break
        content = _content(model, s, t, label, inside)
        best = _best_arrival(model, s, k, label) + content
        full = nodes.slots[node] == capacity
        if not best > NEG_INF or (full and best < nodes.value[node, capacity - 1]):
            continue
        if s == 0:
            _insert(model, nodes, node, best, 0.0, content, k, -1)
            continue
        matrix = min(k, model.transition.shape[0]) - 1
        for source in range(num_labels):
            into = model.transition[matrix, source, label]
            x = (model.alpha[s, source] + into) + content
            if x > NEG_INF:
                _insert(model, nodes, node, x, into, content, k, source)
    _begin(nodes, node)


@helper
def _begin(nodes, node):
    """Take the first slot as the best path of a node."""
    for i in range(nodes.slots[node]):
        nodes.rank[node, i] = 0
    nodes.path_slot[node, 0] = 0
    nodes.path_rank[node, 0] = 0
    nodes.path_value[node, 0] = nodes.value[node, 0]
    nodes.paths[node] = min(nodes.slots[node], 1)
    nodes.exhausted[node] = nodes.slots[node] == 0


@helper
def _duration_before(model, nodes, node, slot):
    """Duration of the segment before the last one, on the path that a slot stands for."""
    source, rank = nodes.source[node, slot], nodes.rank[node, slot]
    if source < 0:
        return 0
    t = nodes.end[node] - nodes.duration[node, slot]
    if rank == 0:
        return _best_duration(model, t, source)
    before = nodes.index[t, source]
    return nodes.duration[before, nodes.path_slot[before, rank]]


@helper
def _precedes(model, nodes, node, a, b):
    """Whether slot a comes before slot b."""
    if nodes.value[node, a] != nodes.value[node, b]:
        return nodes.value[node, a] > nodes.value[node, b]
    if nodes.duration[node, a] != nodes.duration[node, b]:
        return nodes.duration[node, a] < nodes.duration[node, b]
    first = _duration_before(model, nodes, node, a)
    second = _duration_before(model, nodes, node, b)
    if first != second:
        return first < second
    return nodes.source[node, a] < nodes.source[node, b]


@helper
def _advance(model, nodes, node):
    """Add the next best path of a node, the next one of the node before its last being known."""
    number = nodes.paths[node]
    slot, rank = nodes.path_slot[node, number - 1], nodes.path_rank[node, number - 1]
    source = nodes.source[node, slot]
    nodes.value[node, slot] = -math.inf
    if source >= 0:
        before = nodes.index[nodes.end[node] - nodes.duration[node, slot], source]
        if nodes.paths[before] > rank + 1:
            nodes.rank[node, slot] = rank + 1
            x = nodes.path_value[before, rank + 1] + nodes.into[node, slot]
            nodes.value[node, slot] = x + nodes.content[node, slot]
    best = 0
    for i in range(1, nodes.slots[node]):
        if nodes.value[node, i] > NEG_INF and _precedes(model, nodes, node, i, best):
            best = i
    if not nodes.value[node, best] > NEG_INF:
        nodes.exhausted[node] = True
        return
    nodes.path_slot[node, number] = best
    nodes.path_rank[node, number] = nodes.rank[node, best]
    # Of equal scores, rounding may put the later one above.
    nodes.path_value[node, number] = min(
        nodes.value[node, best], nodes.path_value[node, number - 1]
    )
    nodes.paths[node] = number + 1


@helper
def _longer(rows, capacity):
    """Copy of an array with room for `capacity` rows."""
    longer = np.zeros((capacity,) + rows.shape[1:], dtype=rows.dtype)
    longer[: rows.shape[0]] = rows
    return longer


@helper
def _grown(nodes):
    """The same nodes with room for twice as many."""
    capacity = 2 * nodes.end.shape[0]
    return _Nodes(
        nodes.index, _longer(nodes.end, capacity), _longer(nodes.slots, capacity),
        _longer(nodes.paths, capacity), _longer(nodes.exhausted, capacity),
        _longer(nodes.duration, capacity), _longer(nodes.source, capacity),
        _longer(nodes.rank, capacity), _longer(nodes.value, capacity),
        _longer(nodes.into, capacity), _longer(nodes.content, capacity), _longer(nodes.path_slot, capacity),
        _longer(nodes.path_rank, capacity), _longer(nodes.path_value, capacity),
    )  # fmt: skip


@helper
def _make_root(model, nodes, last):
    """The node after the last segment: a slot for every last label."""
    nodes.end[_ROOT] = model.length
    nodes.slots[_ROOT] = 0
    for c in range(last.shape[0]):
        x = model.alpha[model.length, c] + last[c]
        if x > NEG_INF:
            _insert(model, nodes, _ROOT, x, last[c], 0.0, 0, c)
    _begin(nodes, _ROOT)


@helper
def _search(model, nodes, last, number, scores, starts, labels, counts):
    """Write the scores and the segments of the best `number` segmentations."""
    capacity = starts.shape[1]
    stack = np.empty(model.length + 2, dtype=np.int64)
    _make_root(model, nodes, last)
    used = 1
    for rank in range(number):
        if rank > 0:
            depth = 0
            node = _ROOT
            while True:
                stack[depth] = node
                depth += 1
                path = nodes.paths[node] - 1
                slot, taken = nodes.path_slot[node, path], nodes.path_rank[node, path]
                source = nodes.source[node, slot]
                if source < 0:
                    break
                t = nodes.end[node] - nodes.duration[node, slot]
                node = nodes.index[t, source]
                if node < 0:
                    if used == nodes.end.shape[0]:
                        nodes = _grown(nodes)
                    node = used
                    used += 1
                    _look_at(model, nodes, node, t, source)
                if nodes.paths[node] > taken + 1 or nodes.exhausted[node]:
                    break
            for i in range(depth - 1, -1, -1):
                _advance(model, nodes, stack[i])
        if nodes.paths[_ROOT] <= rank:
            break
        scores[rank] = nodes.path_value[_ROOT, rank]
        node, path, t = _ROOT, rank, model.length
        label = -1
        while t > 0:
            slot, before = nodes.path_slot[node, path], nodes.path_rank[node, path]
            if node != _ROOT:
                t -= nodes.duration[node, slot]
                counts[rank] += 1
                starts[rank, capacity - counts[rank]] = t
                labels[rank, capacity - counts[rank]] = label
            label = nodes.source[node, slot]
            if t > 0:
                node, path = nodes.index[t, label], before
                if node < 0:
                    if used == nodes.end.shape[0]:
                        nodes = _grown(nodes)
                    node = used
                    used += 1
                    _look_at(model, nodes, node, t, label)


@kernel
def _run(
    tasks, number, scores, start, end, has_boundary, lengths, bias, first, transition, last, alpha,
    best, starts, labels, counts,
):  # fmt: skip
    num_labels = scores.shape[2]
    width = min(number, max(bias.shape[0], 1) * num_labels)
    for b in tasks:
        length = lengths[b]
        static = transition.shape[0] == 1
        gamma = np.empty((length + 1, num_labels) if static else (1, 1))
        if static:
            _gamma(alpha[b], transition, length, gamma)
        model = _Model(
            scores[b], start[b], end[b], has_boundary, length, bias, first, transition, alpha[b],
            gamma, np.zeros((length + 1, num_labels), dtype=np.int32),
        )  # fmt: skip
        room = 64
        nodes = _Nodes(
            np.full((length + 1, num_labels), -1, dtype=np.int32),
            np.zeros(room, dtype=np.int32), np.zeros(room, dtype=np.int32),
            np.zeros(room, dtype=np.int32), np.zeros(room, dtype=np.bool_),
            np.zeros((room, width), dtype=np.int32), np.zeros((room, width), dtype=np.int32),
            np.zeros((room, width), dtype=np.int32), np.zeros((room, width)),
            np.zeros((room, width)), np.zeros((room, width)),
            np.zeros((room, number), dtype=np.int32), np.zeros((room, number), dtype=np.int32),
            np.zeros((room, number)),
        )  # fmt: skip
        _search(model, nodes, last, number, best[b], starts[b], labels[b], counts[b])


def n_best(potentials: Potentials, alpha: Tensor, number: int) -> tuple[Tensor, SegmentTable]:
    """Search the best segmentations of a problem on the CPU.

    Parameters
    ----------
    potentials : Potentials
    alpha : float64 Tensor of shape (B, T + 1, C)
        Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend.max_messages`.
    number : int
        n.

    Returns
    -------
    scores : float64 Tensor of shape (B, n)
        In falling order; -inf where there are fewer.
    table : SegmentTable
        `sequence` is rank * B + b.
    """
    p = potentials.to(torch.float64)
    scores = forbid(array_of(p.scores))
    has_boundary, start, end = boundary_arrays(p, scores)
    if has_boundary:
        start, end = forbid(start), forbid(end)
    bias, last = forbid(array_of(p.duration_bias)), end_term(p)
    transition = forbid(array_of(p.transition)).reshape(-1, p.num_labels, p.num_labels)
    first = np.ascontiguousarray(np.broadcast_to(start_term(p, "max"), bias.shape))
    lengths = array_of(p.lengths)
    best = np.full((p.batch_size, number), -np.inf)
    counts = np.zeros((p.batch_size, number), dtype=np.int64)
    starts, labels = np.empty((2, p.batch_size, number, p.num_positions), dtype=np.int32)
    threads.run(
        lambda tasks: _run(
            tasks, number, scores, start, end, has_boundary, lengths, bias, first, transition, last,
            array_of(alpha), best, starts, labels, counts,
        ),
        threads.balance(lengths),
    )  # fmt: skip
    shares = np.array([(b, 0, number) for b in range(p.batch_size)], dtype=np.int64)
    return torch.from_numpy(best), gather(lengths, shares, counts, starts, labels)

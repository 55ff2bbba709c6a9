"""The n best segmentations by recursive enumeration, over the messages of the max pass.

A node is an end and a label (t, c); its paths are the segmentations of [0, t) that end in c. The
best path of every node is known from the max pass. The next best path of a node differs from its
last one either in the last segment or by the next best path of the node before it, which is asked
for in turn (Jiménez and Marzal 1999, "Computing the K shortest paths: a new algorithm and an
experimental comparison", WAE). Only nodes on paths that are asked for look at their K·C
predecessors - with a duration tail, at those beyond K too, as far back as the best of them are -
and keep a few of the best, more when these have all been used; each further path costs a handful of
comparisons per segment.

Ties: the shortest last segment, then the lowest label, and so on towards the start, at every rank.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu import pool as threads
from flash_semicrf.streaming.cpu.jit import helper, inlined, kernel
from flash_semicrf.streaming.cpu.nbest_slots import (
    CONTENT,
    DURATION,
    INTO,
    RANK,
    SOURCE,
    VALUE,
    Model,
    best_arrivals,
    best_duration,
    best_longer,
    find_last_labels,
    find_slots,
    keep_slots,
)
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    cost_of,
    end_term,
    forbid,
    start_term,
    tail_term,
)
from flash_semicrf.streaming.cpu.static.batch import boundary_arrays
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.walks import gather

__all__ = ["n_best"]

_ROOT = 0  # the node after the last segment
_ROOM = 4  # slots of a node to begin with

# Columns of the arrays of `_search`, which are few and plain because passing an array to a function
# costs as much as a step. Nodes: their place (t, c); their slots, the predecessors in order, as a
# range of the rows of slots with room for more; how many slots have been used for some path; how
# many paths have been found; whether there are no more.
_END, _LABEL, _FIRST, _SLOTS, _SPACE, _USED, _PATHS, _EXHAUSTED = range(8)


@inlined
def _begin(nodes, floats, path_ints, path_values, node, t, label, first, space, number):
    """Enter a node whose slots have been found, and take the first one as its best path."""
    nodes[node, _END] = t
    nodes[node, _LABEL] = label
    nodes[node, _FIRST] = first
    nodes[node, _SLOTS] = number
    nodes[node, _SPACE] = space
    nodes[node, _USED] = nodes[node, _PATHS] = min(number, 1)
    nodes[node, _EXHAUSTED] = number == 0
    path_ints[node, 0] = path_ints[node, 1] = 0
    path_values[node, 0] = floats[first, VALUE]


@helper
def _precedes(model, index, nodes, ints, path_ints, node, a, b):
    """Whether slot a of a node comes before slot b, of the same score."""
    first = nodes[node, _FIRST]
    k, other = ints[first + a, DURATION], ints[first + b, DURATION]
    if k != other:
        return k < other
    t = nodes[node, _END] - k
    if ints[first + a, SOURCE] < 0:
        return a < b
    before = _duration_before(model, index, nodes, ints, path_ints, t, first + a)
    other = _duration_before(model, index, nodes, ints, path_ints, t, first + b)
    if before != other:
        return before < other
    return ints[first + a, SOURCE] < ints[first + b, SOURCE]


@helper
def _duration_before(model, index, nodes, ints, path_ints, t, slot):
    """Duration of the segment that ends before t, on the path that a slot stands for."""
    source, rank = ints[slot, SOURCE], ints[slot, RANK]
    if rank == 0:
        return best_duration(model, t, source)
    before = index[t, source]
    return ints[nodes[before, _FIRST] + path_ints[before, 2 * rank], DURATION]


@inlined
def _follow_last(index, nodes, ints, floats, path_ints, path_values, node):
    """Let the slot of a node's last path stand for the next path before the last segment."""
    path = nodes[node, _PATHS] - 1
    slot = nodes[node, _FIRST] + path_ints[node, 2 * path]
    rank = path_ints[node, 2 * path + 1] + 1
    source = ints[slot, SOURCE]
    floats[slot, VALUE] = -math.inf
    if source >= 0:
        before = index[nodes[node, _END] - ints[slot, DURATION], source]
        if nodes[before, _PATHS] > rank:
            ints[slot, RANK] = rank
            floats[slot, VALUE] = (path_values[before, rank] + floats[slot, INTO]) + floats[
                slot, CONTENT
            ]


@inlined
def _add_path(model, index, nodes, ints, floats, path_ints, path_values, node):
    """Take the best slot as the next path of a node."""
    first, used = nodes[node, _FIRST], nodes[node, _USED]
    best = -1
    # Of the slots that have not been used, the first is the best.
    for i in range(min(used + 1, nodes[node, _SLOTS])):
        value = floats[first + i, VALUE]
        if not value > NEG_INF:
            continue
        if best >= 0:
            highest = floats[first + best, VALUE]
            if value < highest:
                continue
            if value == highest and not _precedes(
                model, index, nodes, ints, path_ints, node, i, best
            ):
                continue
        best = i
    if best < 0:
        nodes[node, _EXHAUSTED] = 1
    else:
        path = nodes[node, _PATHS]
        path_ints[node, 2 * path] = best
        path_ints[node, 2 * path + 1] = ints[first + best, RANK]
        # Of equal scores, rounding may put the later one above.
        path_values[node, path] = min(floats[first + best, VALUE], path_values[node, path - 1])
        nodes[node, _PATHS] = path + 1
        nodes[node, _USED] = max(used, best + 1)


@helper
def _longer(rows, needed):
    """An array with at least `needed` rows: the same, or a copy with twice as many."""
    if rows.shape[0] >= needed:
        return rows
    longer = np.empty((max(2 * rows.shape[0], needed), rows.shape[1]), dtype=rows.dtype)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            longer[i, j] = rows[i, j]
    return longer


@helper
def _search(model, last, number, scores, starts, labels, counts):
    """Write the scores and the segments of the best `number` segmentations."""
    num_labels = last.shape[0]
    longest = model.length if model.longer.shape[0] > 1 else model.bias.shape[0]
    limit = min(number, longest * num_labels)
    index = np.full((model.length + 1, num_labels), -1)
    nodes = np.empty((64, 8), dtype=np.int64)
    path_ints, path_values = np.empty((64, 2 * number), dtype=np.int64), np.empty((64, number))
    ints, floats = np.empty((512 + num_labels, 3), dtype=np.int64), np.empty((512 + num_labels, 3))
    stack = np.empty(model.length + 2, dtype=np.int64)
    found = find_last_labels(model, last, ints, floats)
    _begin(nodes, floats, path_ints, path_values, _ROOT, model.length, -1, 0, num_labels, found)
    num_nodes, num_slots = 1, num_labels
    for rank in range(number):
        if nodes[_ROOT, _PATHS] <= rank:
            break
        # Down: along the last path of every node as far as its next path is not known, so that all
        # nodes of this path are there.
        depth = 0
        node = _ROOT
        while nodes[node, _EXHAUSTED] == 0:
            stack[depth] = node
            depth += 1
            path = nodes[node, _PATHS] - 1
            slot = nodes[node, _FIRST] + path_ints[node, 2 * path]
            taken = path_ints[node, 2 * path + 1]
            source = ints[slot, SOURCE]
            if source < 0:
                break
            t = nodes[node, _END] - ints[slot, DURATION]
            node = index[t, source]
            if node < 0:
                nodes = _longer(nodes, num_nodes + 1)
                path_ints = _longer(path_ints, num_nodes + 1)
                path_values = _longer(path_values, num_nodes + 1)
                space = min(_ROOM, limit)
                ints = _longer(ints, num_slots + space)
                floats = _longer(floats, num_slots + space)
                node = index[t, source] = num_nodes
                found = find_slots(model, ints, floats, num_slots, space, t, source)
                _begin(
                    nodes, floats, path_ints, path_values, node, t, source, num_slots, space, found
                )
                num_nodes += 1
                num_slots += space
            if nodes[node, _PATHS] > taken + 1:
                break
        scores[rank] = path_values[_ROOT, rank]
        counts[rank] = _read(index, nodes, ints, path_ints, rank, starts[rank], labels[rank])
        # Up again: each node's next path, the one before its last segment being known.
        for i in range(depth - 1 if rank + 1 < number else -1, -1, -1):
            node = stack[i]
            _follow_last(index, nodes, ints, floats, path_ints, path_values, node)
            space = nodes[node, _SPACE]
            full = nodes[node, _USED] == space and nodes[node, _SLOTS] == space
            if full and space < limit and node != _ROOT:
                wider = min(2 * space, limit)
                ints = _longer(ints, num_slots + wider)
                floats = _longer(floats, num_slots + wider)
                t, label = nodes[node, _END], nodes[node, _LABEL]
                found = find_slots(model, ints, floats, num_slots, wider, t, label)
                old = nodes[node, _FIRST]
                found = keep_slots(ints, floats, old, space, num_slots, found, wider)
                nodes[node, _FIRST], nodes[node, _SLOTS] = num_slots, found
                nodes[node, _SPACE] = wider
                num_slots += wider
            _add_path(model, index, nodes, ints, floats, path_ints, path_values, node)


@helper
def _read(index, nodes, ints, path_ints, rank, starts, labels):
    """Write a path of the root into the end of `starts` and `labels`; return its length."""
    count = 0
    slot, path = path_ints[_ROOT, 2 * rank], path_ints[_ROOT, 2 * rank + 1]
    t, label = nodes[_ROOT, _END], ints[slot, SOURCE]
    while t > 0:
        node = index[t, label]
        slot = nodes[node, _FIRST] + path_ints[node, 2 * path]
        t -= ints[slot, DURATION]
        count += 1
        starts[starts.shape[0] - count] = t
        labels[starts.shape[0] - count] = label
        label, path = ints[slot, SOURCE], path_ints[node, 2 * path + 1]
    return count


@kernel
def _run(
    queue, number, scores, start, end, has_boundary, lengths, bias, first, tail, has_tail,
    transition, last, alpha, best, starts, labels, counts,
):  # fmt: skip
    num_labels = scores.shape[2]
    summed = has_tail or transition.shape[0] == 1
    b = take(queue)
    while b >= 0:
        length = lengths[b]
        gamma = np.empty((length + 1, num_labels) if summed else (1, 1))
        longer = np.empty((length + 1, num_labels) if has_tail else (1, 1))
        if summed:
            best_arrivals(alpha[b], transition, length, gamma)
        if has_tail:
            best_longer(scores[b], start[b], has_boundary, length, bias, first, tail, gamma, longer)
        model = Model(
            scores[b], start[b], end[b], has_boundary, length, bias, first, tail, transition,
            alpha[b], gamma, longer, np.zeros((length + 1, num_labels), dtype=np.int32),
        )  # fmt: skip
        _search(model, last, number, best[b], starts[b], labels[b], counts[b])
        b = take(queue)


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
    bias, last, tail = forbid(array_of(p.duration_bias)), end_term(p), tail_term(p)
    has_tail = tail is not None
    tail = tail if has_tail else np.full(p.num_labels, -np.inf)
    transition = forbid(array_of(p.transition)).reshape(-1, p.num_labels, p.num_labels)
    first = np.ascontiguousarray(np.broadcast_to(start_term(p), bias.shape))
    lengths = array_of(p.lengths)
    best = np.full((p.batch_size, number), -np.inf)
    counts = np.zeros((p.batch_size, number), dtype=np.int64)
    starts, labels = np.empty((2, p.batch_size, number, p.num_positions), dtype=np.int32)
    given = (number, scores, start, end, has_boundary, lengths, bias, first, tail, has_tail)
    found = (best, starts, labels, counts)
    threads.run(
        _run,
        np.arange(p.batch_size),
        lengths * cost_of(p),
        (*given, transition, last, array_of(alpha), *found),
    )
    shares = np.array([(b, 0, number) for b in range(p.batch_size)], dtype=np.int64)
    return torch.from_numpy(best), gather(lengths, shares, counts, starts, labels)

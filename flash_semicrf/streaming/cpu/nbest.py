"""The n best segmentations by recursive enumeration, over the messages of the max pass.

A node is an end and a label (t, c); its paths are the segmentations of [0, t) that end in c. The
best path of every node is known from the max pass. The next best path of a node differs from its
last one either in the last segment or by the next best path of the node before it, which is found
in turn (Jiménez and Marzal 1999, "Computing the K shortest paths: a new algorithm and an
experimental comparison", WAE). Only the predecessors of nodes on such paths are searched, K·C of
them - with a duration tail, those beyond K too, as far back as the best of them are - and a few of
the best are kept, more when these have all been used; each further path costs a handful of
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
from flash_semicrf.streaming.assembly import in_float64
from flash_semicrf.streaming.cpu import threads as threads
from flash_semicrf.streaming.cpu.by_duration.attached import attached_of, attached_to
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.nbest_slots import (
    SLOT,
    Model,
    Shared,
    best_arrivals,
    best_duration,
    best_longer,
    find_last_labels,
    find_slots,
    keep_slots,
)
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    boundary_arrays,
    cost_of,
    end_term,
    forbid,
    start_term,
    tail_term,
)
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.walks import gather

__all__ = ["n_best"]

_ROOT = 0  # the node after the last segment
_ROOM = 4  # slots of a node to begin with

_FIELDS = ("end", "label", "first", "slots", "space", "used", "path", "paths", "exhausted")
_NODE = np.dtype([(name, np.int64) for name in _FIELDS])
"""Place (t, c) of a node; its slots, the predecessors in order, as a range of the rows of slots
with room for more; how many slots have been used for some path; its paths that have been found, as
a range of the rows of paths; whether there are no more."""

_PATH = np.dtype([("slot", np.int64), ("rank", np.int64), ("value", np.float64)])
"""Slot of the last segment, rank of the path before it, and score."""


@inlined
def _begin(node, place, slots, first, space, number, paths):
    """Enter a node whose slots have been found, and take the first one as its best path."""
    node.end, node.label, node.path = place
    node.first, node.slots, node.space = first, number, space
    node.used = node.paths = min(number, 1)
    node.exhausted = number == 0
    path = paths[node.path]
    path.slot = path.rank = 0
    path.value = slots[first].value


@helper
def _precedes(model, index, nodes, slots, paths, node, a, b):
    """Whether slot a of a node comes before slot b, of the same score."""
    mine, other = slots[node.first + a], slots[node.first + b]
    if mine.duration != other.duration:
        return mine.duration < other.duration
    if mine.source < 0:
        return a < b
    t = node.end - mine.duration
    before = _duration_before(model, index, nodes, slots, paths, t, mine)
    before_other = _duration_before(model, index, nodes, slots, paths, t, other)
    if before != before_other:
        return before < before_other
    return mine.source < other.source


@helper
def _duration_before(model, index, nodes, slots, paths, t, slot):
    """Duration of the segment that ends before t, on the path that a slot stands for."""
    if slot.rank == 0:
        return best_duration(model, t, slot.source)
    before = index[t, slot.source]
    return slots[nodes[before].first + paths[nodes[before].path + slot.rank].slot].duration


@inlined
def _follow_last(index, nodes, slots, paths, node):
    """Let the slot of a node's last path stand for the next path before the last segment."""
    path = paths[node.path + node.paths - 1]
    slot = slots[node.first + path.slot]
    rank = path.rank + 1
    slot.value = -math.inf
    if slot.source >= 0:
        before = nodes[index[node.end - slot.duration, slot.source]]
        if before.paths > rank:
            slot.rank = rank
            slot.value = (paths[before.path + rank].value + slot.into) + slot.content


@inlined
def _add_path(model, index, nodes, slots, paths, node):
    """Take the best slot as the next path of a node."""
    best = -1
    highest = -math.inf
    # Of the slots that have not been used, the first is the best.
    for j in range(min(node.used + 1, node.slots)):
        value = slots[node.first + j].value
        if not value > NEG_INF or value < highest:
            continue
        if value > highest or _precedes(model, index, nodes, slots, paths, node, j, best):
            best, highest = j, value
    if best < 0:
        node.exhausted = 1
        return
    last, path = paths[node.path + node.paths - 1], paths[node.path + node.paths]
    path.slot, path.rank = best, slots[node.first + best].rank
    # Of equal scores, rounding may put the later one above.
    path.value = min(highest, last.value)
    node.paths += 1
    node.used = max(node.used, best + 1)


@owning
def _longer(rows, needed):
    """An array with at least `needed` rows: the same, or a copy with twice as many."""
    if rows.shape[0] >= needed:
        return rows
    longer = np.empty(max(2 * rows.shape[0], needed), dtype=rows.dtype)
    for i in range(rows.shape[0]):
        longer[i] = rows[i]
    return longer


@owning
def _search(model, number, scores, starts, labels, counts):
    """Write the scores and the segments of the best `number` segmentations."""
    longest, num_labels = model.shared.bias.shape
    limit = min(number, (model.length if model.shared.has_tail else longest) * num_labels)
    index = np.full((model.length + 1, num_labels), -1)
    nodes, paths = np.empty(64, dtype=_NODE), np.empty(64 * number, dtype=_PATH)
    slots = np.empty(512 + num_labels, dtype=SLOT)
    stack = np.empty(model.length + 2, dtype=np.int64)
    found = find_last_labels(model, slots)
    _begin(nodes[_ROOT], (model.length, -1, 0), slots, 0, num_labels, found, paths)
    num_nodes, num_slots = 1, num_labels
    for rank in range(number):
        if nodes[_ROOT].paths <= rank:
            break
        # Down: along the last path of every node as far as its next path is not known, so that all
        # nodes of this path are there.
        depth = 0
        i = _ROOT
        while nodes[i].exhausted == 0:
            stack[depth] = i
            depth += 1
            path = paths[nodes[i].path + nodes[i].paths - 1]
            slot = slots[nodes[i].first + path.slot]
            taken, source = path.rank, slot.source
            if source < 0:
                break
            t = nodes[i].end - slot.duration
            i = index[t, source]
            if i < 0:
                i = index[t, source] = num_nodes
                num_nodes += 1
                nodes, paths = _longer(nodes, num_nodes), _longer(paths, num_nodes * number)
                space = min(_ROOM, limit)
                slots = _longer(slots, num_slots + space)
                found = find_slots(model, slots, num_slots, space, t, source)
                place = (t, source, i * number)
                _begin(nodes[i], place, slots, num_slots, space, found, paths)
                num_slots += space
            if nodes[i].paths > taken + 1:
                break
        scores[rank] = paths[rank].value
        counts[rank] = _read(index, nodes, slots, paths, rank, starts[rank], labels[rank])
        # Up again: each node's next path, the one before its last segment being known.
        for j in range(depth - 1 if rank + 1 < number else -1, -1, -1):
            node = nodes[stack[j]]
            _follow_last(index, nodes, slots, paths, node)
            full = node.used == node.space and node.slots == node.space
            if full and node.space < limit and stack[j] != _ROOT:
                wider = min(2 * node.space, limit)
                slots = _longer(slots, num_slots + wider)
                found = find_slots(model, slots, num_slots, wider, node.end, node.label)
                found = keep_slots(slots, node.first, node.space, num_slots, found, wider)
                node.first, node.slots, node.space = num_slots, found, wider
                num_slots += wider
            _add_path(model, index, nodes, slots, paths, node)


@helper
def _read(index, nodes, slots, paths, rank, starts, labels):
    """Write a path of the root into the end of `starts` and `labels`; return its length."""
    count = 0
    path = paths[rank]  # of the root
    t, slot = nodes[_ROOT].end, slots[path.slot]
    while t > 0:
        label = slot.source
        node = nodes[index[t, label]]
        path = paths[node.path + path.rank]
        slot = slots[node.first + path.slot]
        t -= slot.duration
        count += 1
        starts[starts.shape[0] - count] = t
        labels[starts.shape[0] - count] = label
    return count


@kernel
def _run(queue, number, shared, scores, start, end, attached, lengths, alpha, found):
    best, starts, labels, counts = found
    num_labels = scores.shape[2]
    summed = shared.has_tail or shared.transition.shape[0] == 1
    b = take(queue)
    while b >= 0:
        shape = (lengths[b] + 1, num_labels)
        gamma = np.empty(shape if summed else (1, 1))
        longer = np.empty(shape if shared.has_tail else (1, 1))
        durations = np.zeros(shape, dtype=np.int32)
        given = (scores[b], start[b], end[b])
        filled = gamma, longer, durations
        own = attached_of(attached, b)
        model = Model(shared, *given, lengths[b], alpha[b], *filled, own)
        if summed:
            best_arrivals(model)
        if shared.has_tail:
            best_longer(model)
        _search(model, number, best[b], starts[b], labels[b], counts[b])
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
    p = in_float64(potentials)
    scores = forbid(array_of(p.scores))
    has_boundary, start, end = boundary_arrays(p, scores)
    if has_boundary:
        start, end = forbid(start), forbid(end)
    bias, tail = forbid(array_of(p.duration_bias)), tail_term(p)
    has_tail = tail is not None
    tail = tail if has_tail else np.full(p.num_labels, -np.inf)
    transition = forbid(array_of(p.transition)).reshape(-1, p.num_labels, p.num_labels)
    first = np.broadcast_to(start_term(p), bias.shape).copy()
    shared = Shared(bias, first, tail, transition, end_term(p), has_tail, has_boundary)
    lengths = array_of(p.lengths)
    best = np.full((p.batch_size, number), -np.inf)
    counts = np.zeros((p.batch_size, number), dtype=np.int64)
    starts, labels = np.empty((2, p.batch_size, number, p.num_positions), dtype=np.int32)
    found = (best, starts, labels, counts)
    rows = (scores, start, end, attached_to(p))
    given = (number, shared, *rows, lengths, array_of(alpha), found)
    threads.run(_run, np.arange(p.batch_size), lengths * cost_of(p), given)
    shares = np.array([(b, 0, number) for b in range(p.batch_size)], dtype=np.int64)
    return torch.from_numpy(best), gather(lengths, shares, counts, starts, labels)

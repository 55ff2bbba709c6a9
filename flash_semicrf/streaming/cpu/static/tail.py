"""Durations beyond K in the passes for static transitions, at O(C) a position.

    G_t(c) = scores[t-1, c] + tail(c) + LSE [G_{t-1}(c), w_{t-1}(c)]

sums the segments longer than K that end at t (before end scores), w_t(c) being the term of duration
K at t; read backwards, those that start there. Everything is in logarithms.

The gradient needs one recursion more, backwards and of probabilities: that a longer segment ends at
t, and that the position before t is beyond the K-th of its segment,

    A_t(c) = exp(G_t(c) + end_{t-1}(c) + beta_t(c) - log Z)
    B_t(c) = A_t(c) + B_{t+1}(c) exp(G_t(c) + scores[t, c] + tail(c) - G_{t+1}(c))

whose sums over t are the expected segments longer than K and positions beyond the K-th.

Passes call `add_longer` and `add_longer_max` at every position; for problems without a tail, whose
first argument is None, they are compiled to nothing.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.vector import TILE, exp_row, log_row

__all__ = ["add_longer", "add_longer_max", "share_going_on", "tail_gradient"]

MASK = 1e4
"""Scores beyond it are kept out of the frames of the max pass."""


@inlined
def add_longer(tail, bias, longer, shift, scores, position, state, rows, oldest, longer_rows):
    """Take one step of a pass: add the segments longer than K to a row of outputs.

    Parameters
    ----------
    tail : float64 array of shape (C,) or None
        None compiles to nothing.
    bias : float64 array of shape (C, K + 1)
    longer : float64 array of shape (C + 1,)
        What may go on after the step before, LSE [G, w], and the offset that it is less of.
    shift : float
        Offset of this step's messages.
    scores : array of shape (T, C)
    position : int
    state, rows
        Workspace of `message_pass`.
    oldest : int
        The logarithm of label c's source K steps ago is at ``oldest + c * capacity`` of its
        buffer; -1 if there is none.
    longer_rows : float64 array of shape (T, C)
        Row `position` gets G; empty (0, 0) where it is not wanted.
    """
    if tail is None:
        return
    work, buffer, capacity = state.work, state.window, state.capacity
    alpha, spare, padded = rows.alpha, rows.spare, state.padded
    keep = longer_rows.shape[0] > 0
    num_labels = tail.shape[0]
    longest = bias.shape[1] - 1
    moved = longer[num_labels] - shift
    longer[num_labels] = shift
    # log(exp(x) + exp(y)) = max + log(1 + exp(-|x - y|)): rows of the second part of both sums, and
    # rows of the maxima. -inf less -inf is NaN, and counts as nothing.
    highest = spare + 2 * padded
    for c in range(num_labels):
        x = scores[position, c]
        g = longer[c] + moved + x + tail[c] if x > NEG_INF else -math.inf
        if keep:
            longer_rows[position, c] = g
        y = work[alpha + c]
        work[spare + c] = -abs(y - g)
        work[highest + c] = max(y, g)
        y = -math.inf
        if oldest >= 0:
            source = buffer[oldest + c * capacity] - work[rows.drift + c]
            y = work[rows.frame + c] + source + bias[c, longest]
        work[spare + padded + c] = -abs(y - g)
        work[highest + padded + c] = max(y, g)
    exp_row(work, spare, work, spare, 2 * padded)
    for i in range(spare, highest):
        work[i] += 1.0
    log_row(work, spare, work, spare, 2 * padded)
    for c in range(num_labels):
        work[alpha + c] = work[highest + c] + work[spare + c]
        longer[c] = work[highest + padded + c] + work[spare + padded + c]


@inlined
def share_going_on(longer, forward, scores, tail, position, length, label):
    """Log of the share of G that G of the position before has in it; at the end, -inf."""
    following = position + 1
    if following == length or not longer[following, label] > NEG_INF:
        return -math.inf
    total = longer[following, label] - scores[following, label] - tail[label]
    total += forward[following] - forward[position]
    return min(longer[position, label] - total, 0.0)


@owning
def tail_gradient(messages, longer, sequence, tail, counted, segments, beyond):
    """Expected segments longer than K, and positions beyond the K-th of their segment.

    Positions are counted one by one, not with the segment that covers them, which may be longer
    than all that is counted.

    Parameters
    ----------
    messages : Messages
    longer : float64 array of shape (T, C)
        Row p: G_{p+1} of the forward pass, less its offset of step p.
    sequence : Sequence
        Read forwards.
    tail : float64 array of shape (C,)
    counted : tuple of two int
        Positions in which segments end, and which lie beyond, that are counted.
    segments, beyond : float64 arrays of shape (C,)
        Zeros; get the expectations.
    """
    beta, forward, backward = messages.beta, messages.forward, messages.backward
    length, offset, value = messages.length, messages.offset, messages.value
    scores, closing, has_boundary = sequence.scores, sequence.closing, sequence.has_boundary
    num_labels = tail.shape[0]
    padded = -(-num_labels // LANES) * LANES
    logs, shares = np.full(2 * padded, -math.inf), np.zeros(2 * padded)
    after = np.zeros(num_labels)
    for p in range(length - 1, -1, -1):
        level = forward[p] + backward[length - p - 1] - offset - value
        is_counted = p >= counted[0] and p < counted[1]
        for c in range(num_labels):
            ends = longer[p, c] + beta[p, c] + level
            if has_boundary:
                ends += closing[p, c]
            logs[c] = min(ends, 0.0) if ends > NEG_INF else -math.inf
            logs[padded + c] = share_going_on(longer, forward, scores, tail, p, length, c)
        exp_row(logs, 0, shares, 0, 2 * padded)
        for c in range(num_labels):
            after[c] = shares[c] + shares[padded + c] * after[c]
            if is_counted:
                segments[c] += shares[c]
                beyond[c] += after[c]


@helper
def add_longer_max(tail, top, held, sequence, step, rows, frame, window, oldest, bias):
    """Take one step of the max pass; return the largest of the step's messages.

    Parameters
    ----------
    tail : float64 array of shape (C,) or None
        None compiles to nothing.
    top : float
        The largest message so far.
    held : tuple of float64 array and bool array, of shape (C,)
        The larger of g and the exact term of the step before; whether it is g.
    sequence : Sequence
    step : int
        Position that the outputs end with.
    rows : MaxRows
        Messages of this step are raised where a longer segment is better; gets g, and whether it
        comes from the g before it.
    frame : float64 array of shape (C,)
    window : float64 array of shape (C * capacity,)
    oldest : int
        The source K steps ago of label c is at ``oldest + c * capacity``; -1 if there is none.
    bias : float64 array of shape (C * (K + 3 * TILE),)
    """
    if tail is None:
        return top
    rest, own = held
    scores, end, has_boundary = sequence.scores, sequence.closing, sequence.has_boundary
    alpha, longer, went_on = rows.alpha, rows.longer, rows.went_on
    capacity = window.shape[0] // tail.shape[0]
    num_labels = tail.shape[0]
    row = bias.shape[0] // num_labels
    longest = row - 2 * TILE
    for c in range(num_labels):
        x = scores[step, c]
        g = rest[c] + tail[c]
        if not abs(x) < MASK:  # the others are in the frame
            g += x if x > NEG_INF else -math.inf
        longer[step, c] = g
        went_on[step, c] = own[c]
        exact = -math.inf
        if oldest >= 0:
            exact = window[oldest + c * capacity] + bias[c * row + longest]
        own[c] = g > exact
        rest[c] = max(g, exact)
        x = frame[c] + g
        if has_boundary:
            x += end[step, c]
        if x > NEG_INF and x > alpha[step, c]:
            alpha[step, c] = x
            top = max(top, x)
    return top

"""Durations beyond K in the derivatives of messages and of expected counts, static transitions.

With G of `flash_semicrf.streaming.cpu.static.tail` and w, the term of duration K, all read in
either direction,

    dG_t(c) = d scores[t-1, c] + d tail(c) + P(longer | c) dG_{t-1}(c) + P(K | c) dw_{t-1}(c)

where the two probabilities are those of a segment that goes on at t: exp(G_{t-1}) and exp(w_{t-1})
over their sum. In the window sums of an output, exp(G) counts as one source more.

The derivatives of the expected counts are those of the recursion that sums them up. Cost O(C) a
position.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.static.tail import share_going_on
from flash_semicrf.streaming.cpu.static.tangent_blocks import position_of
from flash_semicrf.streaming.cpu.vector import exp_row

__all__ = ["exact_term", "longer_shares", "tail_tangent"]

_HIGHEST = 600.0  # logarithm of a longer segment in the frame of the window: above, only it counts


@inlined
def longer_shares(terms, score, tail, level, work, label, first, padded):
    """Write the logarithms that a step takes of a label: three rows of `padded`, from `first` on.

    Parameters
    ----------
    terms : tuple of three float
        G of this step; G and w of the step before; all less the same offset.
    score, tail : float
    level : float
        What takes g into the frame of the window sums.
    work : float64 array
    label, first, padded : int
    """
    g, goes_on, enters = terms
    before, exact, own = -math.inf, -math.inf, -math.inf
    if g > NEG_INF:
        total = g - score - tail
        before, exact = min(goes_on - total, 0.0), min(enters - total, 0.0)
        own = min(g + level, _HIGHEST)
    work[first + label] = before
    work[first + padded + label] = exact
    work[first + 2 * padded + label] = own


@helper
def exact_term(sweep, bias, d_bias, step, label):
    """The term of duration K that ends at `step`, less that step's offset, and its derivative."""
    longest = bias.shape[1] - 1
    length, backward = sweep.length, sweep.backward
    total, d_total = bias[label, longest], d_bias[label, longest]
    for s in range(step - 1, step - longest - 1, -1):
        p = position_of(s, length, backward)
        if not sweep.scores[p, label] > NEG_INF:
            return -math.inf, 0.0
        total += sweep.scores[p, label]
        d_total += sweep.d_scores[p, label]
    s = step - longest
    p = position_of(s, length, backward)
    total += sweep.source[p, label] + (sweep.own[s] - sweep.own[step])
    d_total += sweep.d_source[p, label]
    if sweep.has_boundary:
        total += sweep.opening[p, label]
    if sweep.has_d_boundary:
        d_total += sweep.d_opening[p, label]
    return (total if total > NEG_INF else -math.inf), d_total


@owning
def tail_tangent(sweep, tails, mean, segments, beyond):
    """Derivatives of the expected segments longer than K and of the positions beyond the K-th.

    Parameters
    ----------
    sweep : Sweep
        Of the forward pass, its derivatives complete.
    tails : tuple of float64 arrays
        G and its derivative, of shape (T, C), row p being G_{p+1} less its offset of step p; the
        rates and their derivative, of shape (C,).
    mean : float
        d log Z.
    segments, beyond : float64 arrays of shape (C,)
        Get the derivatives.
    """
    longer, d_longer, tail, d_tail = tails
    num_labels = tail.shape[0]
    padded = -(-num_labels // LANES) * LANES
    logs, shares = np.full(2 * padded, -math.inf), np.zeros(2 * padded)
    after, d_after = np.zeros(num_labels), np.zeros(num_labels)
    scores, closing, d_scores = sweep.scores, sweep.closing, sweep.d_scores
    d_closing, sink, d_sink = sweep.d_closing, sweep.sink, sweep.d_sink
    own, other, length = sweep.own, sweep.other, sweep.length
    for p in range(length - 1, -1, -1):
        level = own[p] + other[length - p - 1] - sweep.offset - sweep.value
        for c in range(num_labels):
            x = longer[p, c] + sink[p, c] + level
            if sweep.has_boundary:
                x += closing[p, c]
            logs[c] = x if x > NEG_INF else -math.inf
            logs[padded + c] = share_going_on(longer, own, scores, tail, p, length, c)
        exp_row(logs, 0, shares, 0, 2 * padded)
        for c in range(num_labels):
            ends, goes_on = shares[c], shares[padded + c]
            d = d_longer[p, c] + d_sink[p, c] - mean
            if sweep.has_d_boundary:
                d += d_closing[p, c]
            d_ends = ends * d
            d_after[c] *= goes_on
            if goes_on > 0.0:
                step = d_longer[p, c] - d_longer[p + 1, c] + d_scores[p + 1, c] + d_tail[c]
                d_after[c] += goes_on * after[c] * step
            d_after[c] += d_ends
            after[c] = ends + goes_on * after[c]
            segments[c] += d_ends
            beyond[c] += d_after[c]

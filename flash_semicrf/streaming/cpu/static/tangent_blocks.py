"""Blocks of segments by their two ends, for derivatives of the gradient with static transitions.

With both messages known, the posterior probability of a segment factors,

    P(segment [s, t) of c) = E_s(c) W_{t-s}(c) U_t(c),     W_k(c) = exp(D_k(c) - peak(c)),
    log E_s = gamma_s + open_s - L_s - shift,   log U_t = beta_t + close_t + L_t + peak + shift
                                                          - log Z,

L being the running sum of scores from the block's first step. The shift halves the exponents
between both, so that what is flushed (below e^-650) belongs to probabilities below e^-300. Where no
shift keeps both within e^300, and where a score inside the block forbids or masks, the label's
block is *slow*: its segments are taken one by one. Read from the end, with eta and beta exchanged
for alpha and gamma, the same holds for the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_shifted_row,
    fill,
    max_row,
)

__all__ = [
    "BLOCK",
    "Block",
    "Sweep",
    "fill_block",
    "new_block",
    "position_of",
    "settle",
    "slow_sums",
]

BLOCK = 64
"""Outputs of a block."""

_HIGH = 300.0  # exponents of both factors stay below it
_MASK = 1e4  # scores beyond it would take the precision of running sums
_NOTHING = -700.0  # log of a probability that counts as 0


class Sweep(NamedTuple):
    """One sequence as a pass reads it, step 0 being at its end for the backward pass.

    Attributes
    ----------
    scores, opening, closing : arrays of shape (T, C)
        The latter two read only if `has_boundary`.
    has_boundary : bool
    d_scores, d_opening, d_closing : arrays of shape (T, C)
        Direction of the derivative, finite; the latter two read only if `has_d_boundary`.
    has_d_boundary : bool
    source, sink : arrays of shape (T, C)
        Row p: gamma_p and beta_{p+1}; backwards beta_{p+1} and gamma_p; less their offsets.
    d_source, d_sink : arrays of shape (T, C)
        Their derivatives.
    own, other : arrays of shape (T + 1,)
        Offsets of the messages of this pass and of the other one, by their steps.
    length : int
    backward : bool
    offset, value : float
        log Z = offset + value.
    """

    scores: np.ndarray
    opening: np.ndarray
    closing: np.ndarray
    has_boundary: bool
    d_scores: np.ndarray
    d_opening: np.ndarray
    d_closing: np.ndarray
    has_d_boundary: bool
    source: np.ndarray
    sink: np.ndarray
    d_source: np.ndarray
    d_sink: np.ndarray
    own: np.ndarray
    other: np.ndarray
    length: int
    backward: bool
    offset: float
    value: float


class Block(NamedTuple):
    """Factors of a block. Column i of a label's row is the source of step ``begin + 1 - K + i``.

    Attributes
    ----------
    sources : array of shape (4 * size,)
        log E, E, dh (the derivative of the logarithm) and E dh, each a row of `capacity` per label.
    sinks : array of shape (4 * C * BLOCK,)
        log U, U, du and U du by output, a row per label.
    capacity, size : int
    slow : bool array of shape (C,)
    running, d_running : arrays of shape (C,)
    """

    sources: np.ndarray
    sinks: np.ndarray
    capacity: int
    size: int
    slow: np.ndarray
    running: np.ndarray
    d_running: np.ndarray


@owning
def new_block(num_labels, longest):
    """Workspace for windows of `longest` sources."""
    capacity = -(-longest // TILE) * TILE + BLOCK + LANES
    size = num_labels * capacity
    sources, sinks = np.zeros(4 * size), np.zeros(4 * num_labels * BLOCK)
    slow, running = np.zeros(num_labels, np.bool_), np.zeros(num_labels)
    return Block(sources, sinks, capacity, size, slow, running, np.zeros(num_labels))


@inlined
def position_of(step, length, backward):
    """Position that step `step` to `step + 1` covers."""
    return length - 1 - step if backward else step


@helper
def fill_block(sweep, block, peak, begin, steps, longest, complete):
    """Write logarithms and derivatives of the block of outputs ``begin + 1 .. begin + steps``.

    With `complete`, those of sources inside the block and of sinks too; a pass knows only the
    derivatives of the sources up to `begin`.
    """
    num_labels = peak.shape[0]
    sources, sinks, capacity, size = block.sources, block.sinks, block.capacity, block.size
    slow, running, d_running = block.slow, block.running, block.d_running
    scores, opening, closing = sweep.scores, sweep.opening, sweep.closing
    d_scores, d_opening, d_closing = sweep.d_scores, sweep.d_opening, sweep.d_closing
    source, sink, d_source, d_sink = sweep.source, sweep.sink, sweep.d_source, sweep.d_sink
    own, other, length, backward = sweep.own, sweep.other, sweep.length, sweep.backward
    has_boundary, has_d_boundary = sweep.has_boundary, sweep.has_d_boundary
    fill(sources, 0, size, -math.inf)
    fill(sources, 2 * size, size, 0.0)
    fill(sinks, 0, num_labels * BLOCK, -math.inf)
    fill(slow, 0, num_labels, False)
    fill(running, 0, num_labels, 0.0)
    fill(d_running, 0, num_labels, 0.0)
    for s in range(begin, max(-1, begin - longest), -1):
        p = position_of(s, length, backward)
        level = own[s] - own[begin]
        column = s - begin - 1 + longest
        for c in range(num_labels):
            if s < begin:
                x = scores[p, c]
                if x > NEG_INF:
                    slow[c] |= abs(x) >= _MASK
                    running[c] += x
                    d_running[c] += d_scores[p, c]
                else:
                    running[c] = -math.inf
            x = source[p, c] + running[c] + level
            d = d_source[p, c] + d_running[c]
            if has_boundary:
                x += opening[p, c] if opening[p, c] > NEG_INF else -math.inf
            if has_d_boundary:
                d += d_opening[p, c]
            sources[c * capacity + column] = x
            sources[2 * size + c * capacity + column] = d

    fill(running, 0, num_labels, 0.0)
    fill(d_running, 0, num_labels, 0.0)
    outputs = num_labels * BLOCK
    for j in range(steps):
        s = begin + j
        p = position_of(s, length, backward)
        level = own[s] - own[begin]
        sink_level = own[begin] + other[length - s - 1] - sweep.offset - sweep.value
        for c in range(num_labels):
            if j > 0:
                x = source[p, c] - running[c] + level
                if has_boundary:
                    x += opening[p, c] if opening[p, c] > NEG_INF else -math.inf
                at = c * capacity + j - 1 + longest
                sources[at] = x
                if complete:
                    d = d_source[p, c] - d_running[c]
                    sources[2 * size + at] = d + d_opening[p, c] if has_d_boundary else d
            x = scores[p, c]
            if not abs(x) < _MASK:
                slow[c] = True
                x = 0.0
            running[c] += x
            d_running[c] += d_scores[p, c]
            x = sink[p, c] + running[c] + sink_level + peak[c]
            if has_boundary:
                x += closing[p, c] if closing[p, c] > NEG_INF else -math.inf
            sinks[c * BLOCK + j] = x
            if complete:
                d = d_sink[p, c] + d_running[c]
                d = d + d_closing[p, c] if has_d_boundary else d
                sinks[2 * outputs + c * BLOCK + j] = d


@helper
def settle(block, label):
    """Exponentiate a label's factors; False if it has none, or is slow; reference and shift.

    The derivatives get a common reference, so that what they have in common costs no digits: it has
    been taken off the sources' and added to the sinks'.
    """
    sources, sinks, capacity, size = block.sources, block.sinks, block.capacity, block.size
    first, first_sink, outputs = label * capacity, label * BLOCK, sinks.shape[0] // 4
    if block.slow[label]:
        return False, 0.0, 0.0
    top = max_row(sources, first, 0, 0, 0.0, 0, capacity)
    top_sink = max_row(sinks, first_sink, 0, 0, 0.0, 0, BLOCK)
    if top == -math.inf or top_sink == -math.inf:
        fill(sources, size + first, capacity, 0.0)
        fill(sources, 3 * size + first, capacity, 0.0)
        return False, 0.0, 0.0
    if top + top_sink > 2 * _HIGH:
        block.slow[label] = True
        return False, 0.0, 0.0
    shift = (top - top_sink) / 2
    exp_shifted_row(sources, first, 0, 0, shift, size + first, capacity)
    exp_shifted_row(sinks, first_sink, 0, 0, -shift, outputs + first_sink, BLOCK)
    total, weighted = 0.0, 0.0
    longest = capacity - BLOCK - LANES  # or a little beyond: any reference is right
    for i in range(first, first + longest):
        total += sources[size + i]
        weighted += sources[size + i] * sources[2 * size + i]
    reference = weighted / total if total > 0.0 else 0.0
    for i in range(first, first + capacity):
        sources[2 * size + i] -= reference
        sources[3 * size + i] = sources[size + i] * sources[2 * size + i]
    for i in range(2 * outputs + first_sink, 2 * outputs + first_sink + BLOCK):
        sinks[i] += reference
        sinks[outputs + i] = sinks[i - outputs] * sinks[i]
    return True, reference, shift


@helper
def slow_sums(sweep, bias, d_bias, step, label, mean, gradient, longer, d_longer):
    """Take the segments that end at `step` one by one: mean derivative up to their end.

    The sink's own derivative is left out of what is returned; with `gradient` (shape (K, C), or
    empty) the derivative of each segment's probability is added to it, D's own part left out.
    `longer` is the logarithm of the sum of those beyond K, `d_longer` its derivative.
    """
    length, backward = sweep.length, sweep.backward
    end = position_of(step - 1, length, backward)
    tail = sweep.sink[end, label] + sweep.other[length - step] - sweep.offset - sweep.value
    d_tail = -mean
    if sweep.has_boundary:
        tail += sweep.closing[end, label]
    if sweep.has_d_boundary:
        d_tail += sweep.d_closing[end, label]
    if gradient.shape[0] > 0:
        d_tail += sweep.d_sink[end, label]
    if not tail > NEG_INF:
        return 0.0
    content, d_content = 0.0, 0.0
    total = math.exp(longer + tail)
    weighted = total * d_longer
    for k in range(1, min(bias.shape[1] - 1, step) + 1):
        s = step - k
        p = position_of(s, length, backward)
        if not sweep.scores[p, label] > NEG_INF:
            break
        content += sweep.scores[p, label]
        d_content += sweep.d_scores[p, label]
        x = sweep.source[p, label] + sweep.own[s] + content + bias[label, k] + tail
        d = sweep.d_source[p, label] + d_content
        if sweep.has_boundary:
            x += sweep.opening[p, label]
        if sweep.has_d_boundary:
            d += sweep.d_opening[p, label]
        if x > _NOTHING:
            probability = math.exp(x)
            total += probability
            weighted += probability * (d + d_bias[label, k])
            if gradient.shape[0] > 0:
                gradient[k - 1, label] += probability * (d + d_tail)
    return weighted / total if total > 0.0 else 0.0

"""Derivatives of the messages of one pass along a direction, for static transitions.

A message's derivative is the posterior mean of the direction's score of what it summarises
(the first-order expectation semiring): with weights that sum to 1 over what they range over,

    d gamma_s(c) = sum_{c'} P(c' | c starts at s) (d alpha_s(c') + dA[c', c])
    d alpha_t(c) = sum_k P(k | c ends at t) (d gamma_{t-k}(c) + d start_{t-k}(c) + dD_k(c)
                   + dS_t(c) - dS_{t-k}(c)) + d end_{t-1}(c)

and the same read from the end. The weights come from the messages, as in
`flash_semicrf.streaming.cpu.static.tangent_blocks`; what has no posterior probability at all gets
0. (For durations beyond K see `flash_semicrf.streaming.cpu.static.tangent_tail`.) Three window sums
where log Z takes one: cost 3 T(KC + C²), workspace O(KC), all in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import CERTAIN
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.static.tangent_blocks import (
    BLOCK,
    fill_block,
    new_block,
    position_of,
    settle,
    slow_sums,
)
from flash_semicrf.streaming.cpu.static.tangent_tail import exact_term, longer_shares
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_row,
    exp_shifted_row,
    fill,
    max_row,
    multiply_row,
    multiply_tile,
)

__all__ = ["Change", "Output", "tangent_pass"]

_MASK = 1e4  # as in `flash_semicrf.streaming.cpu.static.tangent_blocks`


class Change(NamedTuple):
    """Derivative of durations or of transitions in one direction.

    Attributes
    ----------
    scores : array
        In the form of ``Window.bias``, 0 in place of -inf, or of ``Transition.scores``.
    weights : array
        The same times the weights, in their form.
    """

    scores: np.ndarray
    weights: np.ndarray


class Output(NamedTuple):
    """Messages of a pass, and where their derivatives go.

    Attributes
    ----------
    messages, d_messages : float64 arrays of shape (T, C)
        Row p: alpha_{p+1}, or eta_p backwards, less their offsets; the latter gets the derivatives.
    longer, d_longer : float64 arrays of shape (T, C)
        With a tail, G as `message_pass` writes it; the latter gets its derivatives, unless it is
        empty (0, 0).
    """

    messages: np.ndarray
    d_messages: np.ndarray
    longer: np.ndarray
    d_longer: np.ndarray


@helper
def _exact_arrival(work, alpha, d_alpha, scores, d_scores, label):
    """Mean derivative of one arrival, by its logarithms."""
    top = -math.inf
    for c in range(scores.shape[0]):
        top = max(top, work[alpha + c] + scores[c, label])
    if top == -math.inf:
        return 0.0
    total, weighted = 0.0, 0.0
    for c in range(scores.shape[0]):
        weight = math.exp(work[alpha + c] + scores[c, label] - top)
        total += weight
        weighted += weight * (work[d_alpha + c] + d_scores[c, label])
    return weighted / total


@helper
def _arrive(work, transition, d_transition, padded, d_source, position):
    """Write the derivative of the next source from those in row 1 of `work`, of the logs in 0."""
    num_labels = transition.scores.shape[0]
    alpha, d_alpha, factor = 0, padded, 2 * padded
    weighted, total, mean = 3 * padded, 4 * padded, 5 * padded
    top = max_row(work, alpha, 0, 0, 0.0, 0, padded)
    if top == -math.inf:
        fill(d_source[position], 0, num_labels, 0.0)
        return
    exp_shifted_row(work, alpha, 0, 0, top, factor, padded)
    reference = 0.0
    for c in range(num_labels):
        if work[alpha + c] == top:
            reference = work[d_alpha + c]
    for c in range(padded):
        work[weighted + c] = work[factor + c] * (work[d_alpha + c] - reference)
    fill(work, total, 2 * padded, 0.0)
    multiply_row(work, factor, 1, transition.weights, 0, padded, num_labels, work, total)
    multiply_row(work, weighted, 1, transition.weights, 0, padded, num_labels, work, mean)
    multiply_row(work, factor, 1, d_transition.weights, 0, padded, num_labels, work, mean)
    for c in range(num_labels):
        if work[total + c] >= CERTAIN:
            d_source[position, c] = reference + work[mean + c] / work[total + c]
        else:
            d_source[position, c] = _exact_arrival(
                work, alpha, d_alpha, transition.scores, d_transition.scores, c
            )


@helper
def _far_sums(block, window, d_weights, live, first, longest, sums):
    """Window sums of the outputs of a tile: weights, and derivatives of the sources before it."""
    half = sums.shape[0] // 2
    capacity, size = block.capacity, block.size
    fill(sums, 0, 2 * half, 0.0)
    for c in range(live.shape[0]):
        if live[c]:
            near = c * (longest + 3 * TILE) + TILE + longest
            x = size + c * capacity + first
            count = longest + TILE - 1
            multiply_tile(block.sources, x, 1, window.weights, near, -1, count, sums, c * TILE)
            out = half + c * TILE
            multiply_tile(block.sources, x, 1, d_weights, near, -1, count, sums, out)
            x += 2 * size
            multiply_tile(block.sources, x, 1, window.weights, near, -1, longest, sums, out)


@owning
def tangent_pass(sweep, window, d_window, transition, d_transition, tail, d_tail, output):
    """Run one pass.

    Parameters
    ----------
    sweep : Sweep
        Its `d_source` holds the derivative of source 0 and gets those of the others.
    window : Window
    d_window : Change
    transition : Transition
    d_transition : Change
        Both in the direction of the pass.
    tail, d_tail : float64 arrays of shape (C,), or None and anything
        None compiles to nothing.
    output : Output
    """
    messages, d_messages = output.messages, output.d_messages
    longer, d_longer, d_bias = output.longer, output.d_longer, d_window.scores
    num_labels = messages.shape[1]
    padded = -(-num_labels // LANES) * LANES
    longest = window.bias.shape[1] - 1
    block = new_block(num_labels, longest)
    logs, shares = 6 * padded, 9 * padded  # of what goes on, what enters, and G itself
    work = np.zeros(12 * padded)
    fill(work, 0, padded, -math.inf)
    fill(work, logs, 3 * padded, -math.inf)
    sums = np.zeros(2 * num_labels * TILE)
    half = num_labels * TILE
    live = np.zeros(num_labels, np.bool_)
    reference, shift = np.zeros(num_labels), np.zeros(num_labels)
    # G and w of the step before, less its offset, and their derivatives.
    goes_on, enters = np.full(num_labels, -math.inf), np.full(num_labels, -math.inf)
    d_goes_on, d_enters = np.zeros(num_labels), np.zeros(num_labels)
    running = np.zeros(num_labels)
    d_running = np.zeros(num_labels)
    unused = np.zeros((0, 0))
    sources, capacity, size = block.sources, block.capacity, block.size
    d_scores, d_opening, d_closing = sweep.d_scores, sweep.d_opening, sweep.d_closing
    d_source, length, backward = sweep.d_source, sweep.length, sweep.backward
    has_d_boundary, slow, weights = sweep.has_d_boundary, block.slow, window.weights
    scores, own, bias, peak = sweep.scores, sweep.own, window.bias, window.peak

    for begin in range(0, length, BLOCK):
        steps = min(BLOCK, length - begin)
        fill_block(sweep, block, window.peak, begin, steps, longest, False)
        for c in range(num_labels):
            live[c], reference[c], shift[c] = settle(block, c)
        fill(running, 0, num_labels, 0.0)
        fill(d_running, 0, num_labels, 0.0)
        for i in range(steps):
            row = i % TILE
            if row == 0:
                _far_sums(block, window, d_window.weights, live, i, longest, sums)
            step = begin + i + 1
            p = position_of(step - 1, length, backward)
            if tail is not None:
                for c in range(num_labels):
                    x = scores[p, c]
                    running[c] += x if abs(x) < _MASK else 0.0
                    level = own[step - 1] - own[begin] - running[c] - peak[c] - shift[c]
                    level = level if live[c] else -longer[p, c]  # the only source
                    terms = (longer[p, c], goes_on[c], enters[c])
                    longer_shares(terms, x, tail[c], level, work, c, logs, padded)
                exp_row(work, logs, work, shares, 3 * padded)
                for c in range(num_labels):
                    d = work[shares + c] * d_goes_on[c] + work[shares + padded + c] * d_enters[c]
                    d += d_scores[p, c] + d_tail[c]
                    goes_on[c] = longer[p, c] + (own[step - 1] - own[step])
                    d_goes_on[c] = d
                    if d_longer.shape[0] > 0:
                        d_longer[p, c] = d
                    factor = work[shares + 2 * padded + c]
                    sums[c * TILE + row] += factor
                    d -= reference[c] + (d_running[c] + d_scores[p, c])
                    sums[half + c * TILE + row] += factor * d
            for c in range(num_labels):
                d_running[c] += d_scores[p, c]
                d = 0.0
                if slow[c]:
                    beyond, d_beyond = goes_on[c] + own[step], d_goes_on[c]
                    d = slow_sums(sweep, bias, d_bias, step, c, 0.0, unused, beyond, d_beyond)
                elif sums[c * TILE + row] > 0.0:
                    mean = sums[half + c * TILE + row] / sums[c * TILE + row]
                    d = mean + reference[c] + d_running[c]
                if has_d_boundary:
                    d += d_closing[p, c]
                d_messages[p, c] = d
                work[c] = messages[p, c]
                work[padded + c] = d
            if tail is not None and step >= longest:
                for c in range(num_labels):
                    if slow[c]:
                        enters[c], d_enters[c] = exact_term(sweep, bias, d_bias, step, c)
                    else:
                        at = c * capacity + i
                        x = sources[at] + running[c] + bias[c, longest]
                        enters[c] = x + (own[begin] - own[step])
                        d = sources[2 * size + at] + reference[c] + d_running[c]
                        d_enters[c] = d + d_bias[c, longest]
            if step == length:
                break
            p = position_of(step, length, backward)
            _arrive(work, transition, d_transition, padded, d_source, p)
            for c in range(num_labels):
                at = size + c * capacity + i + longest
                d = d_source[p, c] - d_running[c] - reference[c]
                if has_d_boundary:
                    d += d_opening[p, c]
                if tail is not None:
                    sources[at + size] = d
                if live[c]:
                    sources[at + 2 * size] = sources[at] * d
                    near = c * (longest + 3 * TILE) + TILE - row
                    multiply_tile(
                        sources, at + 2 * size, 1, weights, near, 1, 1, sums, half + c * TILE
                    )

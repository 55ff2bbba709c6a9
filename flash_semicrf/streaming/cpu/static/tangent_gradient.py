"""Derivatives of the expected counts of durations and transitions, for static transitions.

    d E[count of D_k(c)]     = sum_s P([s, s+k) of c) (d h_s(c) + d D_k(c) + d u_{s+k}(c) - d log Z)
    d E[count of A[c', c]]   = sum_s P(c', c at s) (d alpha_s(c') + dA[c', c] + d eta_s(c)
                               - d log Z)

dD and dA times the expected counts are left to the caller. Both are correlations of the factors
that the gradient correlates, one of the two carrying the derivative: twice the cost of a gradient.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.static.gradient import transition_factors
from flash_semicrf.streaming.cpu.static.tangent_blocks import (
    BLOCK,
    fill_block,
    new_block,
    settle,
    slow_sums,
)
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    fill,
    multiply_row,
    multiply_tile,
)

__all__ = ["duration_tangent", "transition_tangent"]

_HIGH = 300.0  # as in `flash_semicrf.streaming.cpu.static.gradient`
_NEGLIGIBLE = -50.0


@owning
def duration_tangent(sweep, window, d_bias, mean, begin, stop, gradient):
    """Add the derivative of the counts of durations of segments that end in ``[begin, stop)``.

    Parameters
    ----------
    sweep : Sweep
        Of the forward pass, its derivatives complete.
    window : Window
    d_bias : array of shape (C, K + 1)
    mean : float
        d log Z.
    begin, stop : int
    gradient : float64 array of shape (K, C)
    """
    num_labels = window.peak.shape[0]
    longest = window.bias.shape[1] - 1
    tiled = -(-longest // TILE) * TILE
    block = new_block(num_labels, longest)
    total = np.zeros(num_labels * tiled)  # by k descending, without the factor W
    sources, sinks, capacity, size = block.sources, block.sinks, block.capacity, block.size
    outputs = num_labels * BLOCK
    for first in range(begin, stop, BLOCK):
        steps = min(BLOCK, stop - first)
        fill_block(sweep, block, window.peak, first, steps, longest, True)
        for c in range(num_labels):
            for i in range(2 * outputs + c * BLOCK, 2 * outputs + c * BLOCK + steps):
                sinks[i] -= mean
            live, _, _ = settle(block, c)
            if block.slow[c]:
                for step in range(first + 1, first + steps + 1):
                    slow_sums(sweep, window.bias, d_bias, step, c, mean, gradient, -math.inf, 0.0)
            elif live:
                x = outputs + c * BLOCK
                for q in range(0, longest, TILE):
                    y, out = size + c * capacity + q, c * tiled + q
                    multiply_tile(sinks, x, 1, sources, y + 2 * size, 1, steps, total, out)
                    multiply_tile(sinks, x + 2 * outputs, 1, sources, y, 1, steps, total, out)
    for c in range(num_labels):
        for k in range(1, longest + 1):
            term = total[c * tiled + longest - k]
            if term != 0.0:
                gradient[k - 1, c] += term * math.exp(window.bias[c, k] - window.peak[c])


@helper
def _one_boundary(messages, position, changes, level, transition, gradient):
    """Add one boundary by its logarithms."""
    d_alpha, d_eta, mean = changes
    for c_src in range(transition.shape[0]):
        for c in range(transition.shape[0]):
            x = messages.alpha[position - 1, c_src] + messages.eta[position, c]
            x += transition[c_src, c] + level
            if x > _NEGLIGIBLE:
                d = d_alpha[position - 1, c_src] + d_eta[position, c] - mean
                gradient[c_src, c] += math.exp(x) * d


@owning
def transition_tangent(messages, changes, begin, stop, transition, gradient):
    """Add the derivative of the counts of transitions at positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    changes : tuple of two arrays of shape (T, C) and a float
        Derivatives of alpha_{p+1} and eta_p, and of log Z.
    begin, stop : int
    transition : float64 array of shape (C, C)
    gradient : float64 array of shape (C, C)
    """
    d_alpha, d_eta, mean = changes
    num_labels = transition.shape[0]
    padded = -(-num_labels // LANES) * LANES
    peak = transition.max()
    if peak == -math.inf:
        return
    size = BLOCK * padded
    work = np.zeros(4 * size)  # rows of sources, of sinks, and of both times their derivatives
    total = np.zeros(num_labels * padded)
    alpha, eta = messages.alpha, messages.eta
    forward, backward = messages.forward, messages.backward
    for first in range(max(begin, 1), stop, BLOCK):
        steps = min(BLOCK, stop - first)
        for i in range(steps):
            p = first + i
            source, sink = i * padded, size + i * padded
            level = forward[p] + backward[messages.length - p] - messages.offset - messages.value
            highest = transition_factors(
                alpha, eta, p, False, level + peak, work, source, sink, padded
            )
            if highest > _HIGH:
                _one_boundary(messages, p, changes, level, transition, gradient)
                fill(work, source, padded, 0.0)
                fill(work, sink, padded, 0.0)
            reference = 0.0
            for c in range(num_labels):
                if work[source + c] == 1.0:  # the largest alpha
                    reference = d_alpha[p - 1, c]
            for c in range(num_labels):
                d_source = d_alpha[p - 1, c] - reference
                work[2 * size + source + c] = work[source + c] * d_source
                d_sink = d_eta[p, c] + (reference - mean)
                work[2 * size + sink + c] = work[sink + c] * d_sink
        for c_src in range(num_labels):
            x, row = c_src, c_src * padded
            multiply_row(work, x, padded, work, 3 * size, padded, steps, total, row)
            multiply_row(work, x + 2 * size, padded, work, size, padded, steps, total, row)
    for c_src in range(num_labels):
        for c in range(num_labels):
            value = total[c_src * padded + c]
            if value != 0.0:
                gradient[c_src, c] += value * math.exp(transition[c_src, c] - peak)

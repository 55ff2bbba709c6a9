"""Derivatives of messages and of expected counts along a direction, for transitions by duration.

With rows over (c, k) as in `flash_semicrf.streaming.cpu.by_duration.parameters`, backwards

    d eta_s(k, c) = dD_k(c) + d start_s(c) + dS_{s+k}(c) - dS_s(c) + d end_{s+k-1}(c)
                    + d beta_{s+k}(c)
    d beta_s(c')  = sum_{k,c} P(k, c | c' ends before s) (dA_k[c', c] + d eta_s(k, c)),

and then forwards, with P(s, k, c) the probability of a segment,

    d gamma_s(k, c) = sum_{c'} P(c' | s, k, c) (d alpha_s(c') + dA_k[c', c])
    d alpha_t(c)    = sum_k P(k | c ends before t) (d gamma_{t-k}(k, c) + d eta_{t-k}(k, c)
                      - d beta_t(c)),

each count's derivative being the sum over s of P (d gamma + d eta - d log Z). All sums over labels
are matrix products; their exponents as in `flash_semicrf.streaming.cpu.by_duration.gradient`. Cost
7 T·K·C², in float64. Durations beyond K are in
`flash_semicrf.streaming.cpu.by_duration.tangent_tail`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.by_duration.tangent_tail import (
    fill_class,
    new_class,
    pass_on,
    take_class,
)
from flash_semicrf.streaming.cpu.by_duration.window import copy_row, highest
from flash_semicrf.streaming.cpu.jit import helper
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.static.passes import CERTAIN
from flash_semicrf.streaming.cpu.static.tangent_passes import add_product
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    exp_row,
    fill,
    multiply_tile,
)

__all__ = ["backward_tangents", "forward_tangents"]

_HIGH = 300.0  # exponents of a transition's second factor stay below it
_NOTHING = -700.0  # log of a probability that counts as 0


@helper
def _fill_ends(q, arrivals, slopes, s, eta, d_eta, longer):
    """Write eta_s less log Z and its derivative for every segment that starts at s."""
    num_labels, longest = q.scores.shape[1], arrivals.max_duration
    fill(eta, 0, eta.shape[0], -math.inf)
    fill(d_eta, 0, eta.shape[0], 0.0)
    for c in range(num_labels):
        content = q.start[s, c] if q.has_boundary else 0.0
        d = q.d_start[s, c] if q.has_d_boundary else 0.0
        if not content > NEG_INF:
            continue
        content -= q.offset + q.value
        for k in range(1, min(longest, q.length - s) + 1):
            p = s + k - 1
            if not q.scores[p, c] > NEG_INF:
                break
            content += q.scores[p, c]
            d += q.d_scores[p, c]
            j = c * longest + k - 1
            x = q.beta[p, c] + q.backward[q.length - p - 1]
            closing = d + q.d_beta[p, c]
            if q.has_boundary:
                x += q.end[p, c] if q.end[p, c] > NEG_INF else -math.inf
            if q.has_d_boundary:
                closing += q.d_end[p, c]
            eta[j] = content + x + arrivals.bias[j]
            d_eta[j] = closing + slopes.bias[j]
    fill_class(arrivals.tail, q, arrivals, slopes, s, eta, d_eta, longer)


@helper
def _exact_source(eta, d_eta, scores, d_scores, row):
    """Mean derivative of what follows one source label, by its logarithms."""
    top = -math.inf
    for j in range(eta.shape[0]):
        top = max(top, eta[j] + scores[row + j])
    if top == -math.inf:
        return 0.0
    total, weighted = 0.0, 0.0
    for j in range(eta.shape[0]):
        x = eta[j] + scores[row + j] - top
        if x > _NOTHING:
            weight = math.exp(x)
            total += weight
            weighted += weight * (d_eta[j] + d_scores[row + j])
    return weighted / total


@helper
def backward_tangents(q, arrivals, weights, slopes):
    """Fill `q.d_beta` from its last row on.

    Parameters
    ----------
    q : Sequence
    arrivals : Arrivals
    weights : Weights
    slopes : Slopes
    """
    num_labels, size = q.scores.shape[1], arrivals.bias.shape[0]
    padded = -(-num_labels // LANES) * LANES
    eta, d_eta, sink = np.empty(size), np.empty(size), np.empty(size)
    longer = new_class(arrivals.tail)
    sums = np.zeros(2 * padded)
    for s in range(q.length - 1, 0, -1):
        _fill_ends(q, arrivals, slopes, s, eta, d_eta, longer)
        top = highest(eta)
        if top == -math.inf:
            fill(q.d_beta[s - 1], 0, num_labels, 0.0)
            continue
        reference = 0.0
        for j in range(size):
            sink[j] = eta[j] - top
            if eta[j] == top:
                reference = d_eta[j]
        exp_row(sink, 0, sink, 0, size)
        fill(sums, 0, 2 * padded, 0.0)
        add_product(sink, 0, size, weights.backward, padded, sums, 0)
        add_product(sink, 0, size, slopes.backward, padded, sums, padded)
        for j in range(size):
            sink[j] *= d_eta[j] - reference
        add_product(sink, 0, size, weights.backward, padded, sums, padded)
        for c in range(num_labels):
            if sums[c] >= CERTAIN:
                q.d_beta[s - 1, c] = reference + sums[padded + c] / sums[c]
            else:
                q.d_beta[s - 1, c] = _exact_source(
                    eta, d_eta, arrivals.scores, slopes.scores, c * size
                )


@helper
def _exact_arrival(source, d_source, scores, d_scores, size, j):
    """(log of the sum, mean derivative) of one arrival by its logarithms."""
    top = -math.inf
    for c in range(d_source.shape[0]):
        top = max(top, source[c] + scores[c * size + j])
    if top == -math.inf:
        return top, 0.0
    total, weighted = 0.0, 0.0
    for c in range(d_source.shape[0]):
        weight = math.exp(source[c] + scores[c * size + j] - top)
        total += weight
        weighted += weight * (d_source[c] + d_scores[c * size + j])
    return top + math.log(total), weighted / total


class _Tile(NamedTuple):
    """Factors of the transitions of `TILE` positions."""

    sources: np.ndarray  # (2 * TILE * padded,) exp(alpha - top), and times its derivative
    sinks: np.ndarray  # (2 * TILE * R,) exp(eta + top + peak - log Z), and times its derivative


@helper
def _flush(tile, count, num_labels, padded, size, transition):
    """Add the tile's transitions."""
    behind, sinks_behind = TILE * padded, TILE * size
    for c in range(num_labels):
        for j in range(0, size, TILE):
            out = c * size + j
            multiply_tile(
                tile.sources, behind + c, padded, tile.sinks, j, size, count, transition, out
            )
            multiply_tile(
                tile.sources, c, padded, tile.sinks, sinks_behind + j, size, count, transition, out
            )


@helper
def _fill_tile(tile, row, factors, source, d_alpha, top, reference, eta, d_eta, level, mean,
               arrivals, weights, padded, direct):  # fmt: skip
    """Write one position's factors; transitions out of range are added at once."""
    num_labels, size = d_alpha.shape[0], eta.shape[0]
    for c in range(padded):
        tile.sources[row * padded + c] = factors[c]
        tile.sources[(TILE + row) * padded + c] = factors[padded + c]
    at, behind = row * size, (TILE + row) * size
    for j in range(size):
        x = eta[j] + weights.peak[j] + (top + level)
        if x > _HIGH:
            for c in range(num_labels):
                y = source[c] + level + eta[j] + arrivals.scores[c * size + j]
                if y > _NOTHING:
                    d = d_alpha[c] + d_eta[j] - mean
                    direct[c * size + j] += math.exp(y) * d
            x = -math.inf
        tile.sinks[at + j] = x
    exp_row(tile.sinks, at, tile.sinks, at, size)
    for j in range(size):
        tile.sinks[behind + j] = tile.sinks[at + j] * (d_eta[j] + (reference - mean))


@helper
def _mean_at_start(eta, d_eta, level, arrivals, slopes):
    """Mean derivative of all segmentations, by their first segments."""
    total, weighted = 0.0, 0.0
    for j in range(eta.shape[0]):
        x = arrivals.first[j] - arrivals.bias[j] + eta[j] + level
        if x > _NOTHING:
            total += math.exp(x)
            weighted += math.exp(x) * (slopes.first[j] + d_eta[j])
    return weighted / total if total > 0.0 else 0.0


@helper
def forward_tangents(q, arrivals, weights, slopes, totals):
    """Fill `q.d_alpha` and add up the derivatives of the counts.

    Parameters
    ----------
    q : Sequence
        With `d_beta` complete.
    arrivals : Arrivals
    weights : Weights
    slopes : Slopes
    totals : Totals

    Returns
    -------
    mean : float
        d log Z.
    """
    num_labels, size, longest = q.scores.shape[1], arrivals.bias.shape[0], arrivals.max_duration
    padded = -(-num_labels // LANES) * LANES
    eta, d_eta, sums = np.empty(size), np.empty(size), np.zeros(2 * size)
    source, factors = np.full(padded, -math.inf), np.zeros(2 * padded)
    probability = np.zeros((q.length, num_labels))
    longer = new_class(arrivals.tail)
    tile = _Tile(np.zeros(2 * TILE * padded), np.zeros(2 * TILE * size))
    used = 0
    mean = 0.0
    for p in range(q.length):
        fill(q.d_alpha[p], 0, num_labels, 0.0)
    for s in range(q.length):
        _fill_ends(q, arrivals, slopes, s, eta, d_eta, longer)
        level = q.forward[s]
        if s == 0:
            mean = _mean_at_start(eta, d_eta, level, arrivals, slopes)
        top, reference = -math.inf, 0.0
        if s > 0:
            for c in range(num_labels):
                if probability[s - 1, c] > 0.0:
                    q.d_alpha[s - 1, c] /= probability[s - 1, c]
                if q.has_d_boundary:
                    q.d_alpha[s - 1, c] += q.d_end[s - 1, c]
            copy_row(q.alpha[s - 1], source)
            top = highest(source)
            if top == -math.inf:
                pass_on(arrivals.tail, q, slopes, s, longest, mean, longer, probability, totals)
                continue
            for c in range(padded):
                factors[c] = source[c] - top
                if source[c] == top:
                    reference = q.d_alpha[s - 1, c]
            exp_row(factors, 0, factors, 0, padded)
            for c in range(num_labels):
                factors[padded + c] = factors[c] * (q.d_alpha[s - 1, c] - reference)
            fill(sums, 0, 2 * size, 0.0)
            for j in range(0, size, TILE):
                multiply_tile(factors, 0, 1, weights.forward, j, size, num_labels, sums, j)
                out = size + j
                multiply_tile(factors, padded, 1, weights.forward, j, size, num_labels, sums, out)
                multiply_tile(factors, 0, 1, slopes.forward, j, size, num_labels, sums, out)
            if totals.want_transition:
                _fill_tile(
                    tile, used, factors, source, q.d_alpha[s - 1], top, reference, eta, d_eta,
                    level, mean, arrivals, weights, padded, totals.direct,
                )  # fmt: skip
                used += 1
                if used == TILE:
                    _flush(tile, used, num_labels, padded, size, totals.transition)
                    used = 0
        for j in range(num_labels * longest):
            if eta[j] == -math.inf:
                continue
            if s == 0:
                x, d = arrivals.first[j] - arrivals.bias[j], slopes.first[j]
            elif sums[j] >= CERTAIN:
                x = math.log(sums[j]) + weights.peak[j] + top
                d = reference + sums[size + j] / sums[j]
            else:
                x, d = _exact_arrival(
                    source, q.d_alpha[s - 1], arrivals.scores, slopes.scores, size, j
                )
            x += eta[j] + level
            if not x > _NOTHING:
                continue
            weight = math.exp(x)
            c = j // longest
            end = s + j - c * longest
            total = weight * (d + d_eta[j] - mean)
            totals.start[s, c] += total
            totals.duration[j] += total
            if s == 0:
                totals.first[j] += total
            if j == (c + 1) * longest - 1 and take_class(arrivals.tail, longer, c, weight, d):
                continue
            before = d + d_eta[j] - q.d_beta[end, c]
            if q.has_d_boundary:
                before -= q.d_end[end, c]
            q.d_alpha[end, c] += weight * before
            probability[end, c] += weight
        pass_on(arrivals.tail, q, slopes, s, longest, mean, longer, probability, totals)
    last = q.length - 1
    for c in range(num_labels):
        if probability[last, c] > 0.0:
            q.d_alpha[last, c] /= probability[last, c]
        if q.has_d_boundary:
            q.d_alpha[last, c] += q.d_end[last, c]
    if used > 0:
        _flush(tile, used, num_labels, padded, size, totals.transition)
    return mean

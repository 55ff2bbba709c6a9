"""Derivatives of messages and of expected counts along a direction, for transitions by duration.

With rows over (c, k) as in `flash_semicrf.streaming.cpu.by_duration.model`, backwards

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
`flash_semicrf.streaming.cpu.by_duration.tangent_tail`, what scores of segments and of transitions
by position change in `flash_semicrf.streaming.cpu.by_duration.attached_tangents`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.by_duration.attached import add_spans, make_work
from flash_semicrf.streaming.cpu.by_duration.attached_tangents import (
    add_moves,
    arrival_along,
    arrive_along,
    depart_along,
    keep_span,
    make_along,
)
from flash_semicrf.streaming.cpu.by_duration.products import NOTHING, exact_mean
from flash_semicrf.streaming.cpu.by_duration.tangent_tail import (
    fill_class,
    new_class,
    pass_on,
    take_class,
)
from flash_semicrf.streaming.cpu.by_duration.window import copy_row, highest
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import CERTAIN
from flash_semicrf.streaming.cpu.parts import helper, owning
from flash_semicrf.streaming.cpu.vector import TILE, exp_row, fill, multiply_row, multiply_tile

__all__ = ["backward_tangents", "forward_tangents"]

_HIGH = 300.0  # exponents of a transition's second factor stay below it


@helper
def _fill_ends(sequence, messages, tangent, model, slopes, s, row, longer):
    """Write eta_s less log Z and its derivative for every segment that starts at s to `row`."""
    length, longest = sequence.length, model.max_duration
    eta, d_eta = row
    fill(eta, 0, eta.shape[0], -math.inf)
    fill(d_eta, 0, eta.shape[0], 0.0)
    for c in range(model.last.shape[0]):
        content = sequence.start[s, c] if sequence.has_boundary else 0.0
        d = tangent.start[s, c] if tangent.has_boundary else 0.0
        if not content > NEG_INF:
            continue
        content -= messages.total[0] + messages.total[1]
        for k in range(1, min(longest, length - s) + 1):
            p = s + k - 1
            if not sequence.scores[p, c] > NEG_INF:
                break
            content += sequence.scores[p, c]
            d += tangent.scores[p, c]
            j = c * longest + k - 1
            x = messages.beta[p, c] + messages.backward[length - p - 1]
            closing = d + tangent.beta[p, c]
            if sequence.has_boundary:
                x += sequence.end[p, c] if sequence.end[p, c] > NEG_INF else -math.inf
            if tangent.has_boundary:
                closing += tangent.end[p, c]
            eta[j] = content + x + model.bias[j]
            d_eta[j] = closing + slopes.bias[j]
    add_spans(tangent.attached, s, length, longest, d_eta)
    fill_class(model.tail, sequence, messages, tangent, model, slopes, s, row, longer)
    add_spans(sequence.attached, s, length, longest, eta)


@helper
def _depart(tangent, s, row, sink, sums, model, weights, slopes):
    """Write the derivative of the message before s; `sink` and `sums` are workspace."""
    if weights is None:
        return
    eta, d_eta = row
    num_labels, size = model.last.shape[0], eta.shape[0]
    padded = sums.shape[0] // 2
    top = highest(eta)
    if top == -math.inf:
        fill(tangent.beta[s - 1], 0, num_labels, 0.0)
        return
    reference = 0.0
    for j in range(size):
        sink[j] = eta[j] - top
        if eta[j] == top:
            reference = d_eta[j]
    exp_row(sink, 0, sink, 0, size)
    fill(sums, 0, 2 * padded, 0.0)
    multiply_row(sink, 0, 1, weights.backward, 0, padded, size, sums, 0)
    multiply_row(sink, 0, 1, slopes.backward, 0, padded, size, sums, padded)
    for j in range(size):
        sink[j] *= d_eta[j] - reference
    multiply_row(sink, 0, 1, weights.backward, 0, padded, size, sums, padded)
    for c in range(num_labels):
        mean = reference + sums[padded + c] / sums[c]
        if not sums[c] >= CERTAIN:
            _, mean = exact_mean(eta, d_eta, model.scores, slopes.scores, c * size, 1)
        tangent.beta[s - 1, c] = mean


@owning
def backward_tangents(sequence, messages, tangent, model, weights, slopes):
    """Fill `tangent.beta` from its last row on, and `tangent.rest`."""
    num_labels, size = model.last.shape[0], model.bias.shape[0]
    padded = -(-num_labels // LANES) * LANES
    row = np.empty(size), np.empty(size)
    sink, longer = np.empty(size), new_class(model.tail)
    sums = np.zeros(2 * padded)
    attached = sequence.attached
    work, along = make_work(attached, model), make_along(attached, slopes, model)
    for s in range(sequence.length - 1, 0, -1):
        _fill_ends(sequence, messages, tangent, model, slopes, s, row, longer)
        _depart(tangent, s, row, sink, sums, model, weights, slopes)
        depart_along(attached, tangent, s, row, model, slopes, work, along)


class _Tile(NamedTuple):
    """Workspace: factors of the transitions of one position, and of `TILE` of them.

    The second half of each array of factors holds them times a derivative.
    """

    alpha: np.ndarray  # (padded,) of the source, less its offset
    factors: np.ndarray  # (2 * padded,) exp(alpha - top)
    sources: np.ndarray  # (2 * TILE * padded,) rows of factors
    sinks: np.ndarray  # (2 * TILE * R,) exp(eta + top + peak - log Z)


class _Level(NamedTuple):
    """Numbers of one position."""

    offset: float  # of alpha
    top: float  # max of alpha
    reference: float  # derivative of the label with that
    mean: float  # d log Z


@helper
def _flush(tile, count, size, transition):
    """Add the tile's transitions."""
    sources, sinks, padded = tile.sources, tile.sinks, tile.sources.shape[0] // (2 * TILE)
    for out in range(0, transition.shape[0], TILE):
        c, j = out // size, out % size
        d_c, d_j = TILE * padded + c, TILE * size + j
        multiply_tile(sources, d_c, padded, sinks, j, size, count, transition, out)
        multiply_tile(sources, c, padded, sinks, d_j, size, count, transition, out)


@helper
def _fill_tile(tile, count, level, d_alpha, row, model, weights, direct):
    """Write one position's factors; transitions out of range are added at once."""
    if weights is None:
        return
    eta, d_eta = row
    size, padded = eta.shape[0], tile.alpha.shape[0]
    for c in range(padded):
        tile.sources[count * padded + c] = tile.factors[c]
        tile.sources[(TILE + count) * padded + c] = tile.factors[padded + c]
    at, behind = count * size, (TILE + count) * size
    for j in range(size):
        x = eta[j] + weights.peak[j] + (level.top + level.offset)
        if x > _HIGH:
            for c in range(d_alpha.shape[0]):
                y = tile.alpha[c] + level.offset + eta[j] + model.scores[c * size + j]
                if y > NOTHING:
                    d = d_alpha[c] + d_eta[j] - level.mean
                    direct[c * size + j] += math.exp(y) * d
            x = -math.inf
        tile.sinks[at + j] = x
    exp_row(tile.sinks, at, tile.sinks, at, size)
    for j in range(size):
        tile.sinks[behind + j] = tile.sinks[at + j] * (d_eta[j] + (level.reference - level.mean))


@helper
def _mean_at_start(eta, d_eta, offset, model, slopes):
    """Mean derivative of all segmentations, by their first segments."""
    total, weighted = 0.0, 0.0
    for j in range(eta.shape[0]):
        x = model.first[j] - model.bias[j] + eta[j] + offset
        if x > NOTHING:
            total += math.exp(x)
            weighted += math.exp(x) * (slopes.first[j] + d_eta[j])
    return weighted / total if total > 0.0 else 0.0


@helper
def _finish(tangent, probability, p):
    """Turn the sum in row p of `tangent.alpha` into the derivative of that message."""
    for c in range(probability.shape[1]):
        if probability[p, c] > 0.0:
            tangent.alpha[p, c] /= probability[p, c]
        if tangent.has_boundary:
            tangent.alpha[p, c] += tangent.end[p, c]


@helper
def _arrive(tile, d_alpha, weights, slopes, sums):
    """Fill the factors, and `sums` with their products; max of alpha, and the derivative there.

    Without weights the maximum alone is found.
    """
    if weights is None:
        return highest(tile.alpha), 0.0
    alpha, factors, padded = tile.alpha, tile.factors, tile.alpha.shape[0]
    num_labels, size = d_alpha.shape[0], weights.peak.shape[0]
    top, reference = highest(alpha), 0.0
    if top == -math.inf:
        return top, reference
    for c in range(padded):
        factors[c] = alpha[c] - top
        if alpha[c] == top:
            reference = d_alpha[c]
    exp_row(factors, 0, factors, 0, padded)
    for c in range(num_labels):
        factors[padded + c] = factors[c] * (d_alpha[c] - reference)
    fill(sums, 0, 2 * size, 0.0)
    for j in range(0, size, TILE):
        out = size + j
        multiply_tile(factors, 0, 1, weights.forward, j, size, num_labels, sums, j)
        multiply_tile(factors, padded, 1, weights.forward, j, size, num_labels, sums, out)
        multiply_tile(factors, 0, 1, slopes.forward, j, size, num_labels, sums, out)
    return top, reference


@owning
def forward_tangents(sequence, messages, tangent, model, weights, slopes, totals):
    """Fill `tangent.alpha`, add up the derivatives of the counts, and return d log Z.

    The derivatives of the backward pass are complete.
    """
    num_labels, size, longest = model.last.shape[0], model.bias.shape[0], model.max_duration
    padded = -(-num_labels // LANES) * LANES
    row = eta, d_eta = np.empty(size), np.empty(size)
    alpha, factors, sums = np.full(padded, -math.inf), np.zeros(2 * padded), np.zeros(2 * size)
    tile = _Tile(alpha, factors, np.zeros(2 * TILE * padded), np.zeros(2 * TILE * size))
    probability = np.zeros((sequence.length, num_labels))
    longer = new_class(model.tail)
    attached = sequence.attached
    work, along = make_work(attached, model), make_along(attached, slopes, model)
    used = 0
    mean, top, reference = 0.0, 0.0, 0.0
    for p in range(sequence.length):
        fill(tangent.alpha[p], 0, num_labels, 0.0)
    for s in range(sequence.length):
        _fill_ends(sequence, messages, tangent, model, slopes, s, row, longer)
        offset, d_alpha = messages.forward[s], tangent.alpha[s - 1]
        if s == 0:
            mean = _mean_at_start(eta, d_eta, offset, model, slopes)
        else:
            _finish(tangent, probability, s - 1)
            copy_row(messages.alpha[s - 1], alpha)
            top, reference = _arrive(tile, d_alpha, weights, slopes, sums)
            given = alpha, d_alpha, s
            arrive_along(attached, tangent, *given, model, slopes, work, along)
            add_moves(attached, offset, mean, *given, row, model, work, along, totals)
            if weights is not None and top > -math.inf and totals.transition.shape[0] > 1:
                level = _Level(offset, top, reference, mean)
                _fill_tile(tile, used, level, d_alpha, row, model, weights, totals.direct)
                used += 1
                if used == TILE:
                    _flush(tile, used, size, totals.transition)
                    used = 0
        for j in range(num_labels * longest):
            if eta[j] == -math.inf or top == -math.inf:
                continue
            if s == 0:
                x, d = model.first[j] - model.bias[j], slopes.first[j]
            elif weights is None:
                x, d = arrival_along(work, along, model, j)
            elif sums[j] >= CERTAIN:
                x = math.log(sums[j]) + weights.peak[j] + top
                d = reference + sums[size + j] / sums[j]
            else:
                x, d = exact_mean(alpha, d_alpha, model.scores, slopes.scores, j, size)
            x += eta[j] + offset
            if not x > NOTHING:
                continue
            weight = math.exp(x)
            c = j // longest
            end = s + j - c * longest
            total = weight * (d + d_eta[j] - mean)
            totals.start[s, c] += total
            totals.duration[j] += total
            keep_span(totals.attached, s, j - c * longest + 1, c, total)
            if s == 0:
                totals.first[j] += total
            if j == (c + 1) * longest - 1 and take_class(model.tail, longer, c, weight, d):
                continue
            before = d + d_eta[j] - tangent.beta[end, c]
            if tangent.has_boundary:
                before -= tangent.end[end, c]
            tangent.alpha[end, c] += weight * before
            probability[end, c] += weight
        stop = s + longest
        pass_on(model.tail, tangent, slopes, stop, mean, longer, probability, totals.beyond)
    _finish(tangent, probability, sequence.length - 1)
    if used > 0:
        _flush(tile, used, size, totals.transition)
    return mean

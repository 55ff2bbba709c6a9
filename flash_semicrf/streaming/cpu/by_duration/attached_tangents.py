"""Derivatives along a direction at one position, with scores of segments or of transitions there.

As in `flash_semicrf.streaming.cpu.by_duration.tangent_passes`, with log-sum-exps in place of
products with exp(A): see `flash_semicrf.streaming.cpu.by_duration.attached`, whose `Work` holds the
sums, and the record here their derivatives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.by_duration.attached import fill_matrix, reduce_row
from flash_semicrf.streaming.cpu.by_duration.model import transition_place
from flash_semicrf.streaming.cpu.by_duration.products import NOTHING, exact_mean
from flash_semicrf.streaming.cpu.parts import helper, owning

__all__ = [
    "add_moves",
    "arrival_along",
    "arrive_along",
    "depart_along",
    "keep_span",
    "make_along",
]


class _Along(NamedTuple):
    """Derivatives of the arrays of the same names in `Work`."""

    matrix: np.ndarray
    arriving: np.ndarray
    onward: np.ndarray


@owning
def make_along(attached, slopes, model):
    """Workspace of the functions below."""
    if attached is None:
        return None
    width = model.scores.shape[0] // model.last.shape[0]
    return _Along(slopes.scores.copy(), np.zeros(width), np.zeros(width))


@helper
def _fill(attached, tangent, position, model, slopes, work, along):
    """Fill both matrices with the transitions at `position`."""
    fill_matrix(attached, position, model.scores, model.step, work.matrix)
    fill_matrix(tangent.attached, position, slopes.scores, model.step, along.matrix)


@helper
def _reduce(row, model, work, along):
    """Fill `onward`, from a row of the segments that may follow and their derivatives."""
    eta, d_eta = row
    longest = model.max_duration
    reduce_row(eta, model, work.terms, work.onward)
    if model.step == longest:
        for j in range(model.last.shape[0] * longest):
            along.onward[j] = d_eta[j]
        return
    for c in range(model.last.shape[0]):
        total, weighted = 0.0, 0.0
        if work.onward[c] > -math.inf:
            for j in range(c * longest, (c + 1) * longest):
                total += work.terms[j]
                weighted += work.terms[j] * d_eta[j]
        along.onward[c] = weighted / total if total > 0.0 else 0.0


@helper
def depart_along(attached, tangent, position, row, model, slopes, work, along):
    """Write the derivative of the message before `position` to `tangent.beta`."""
    if attached is None:
        return
    _fill(attached, tangent, position, model, slopes, work, along)
    _reduce(row, model, work, along)
    width = work.onward.shape[0]
    for c in range(model.last.shape[0]):
        given = work.onward, along.onward, work.matrix, along.matrix
        _, tangent.beta[position - 1, c] = exact_mean(*given, c * width, 1)


@helper
def arrive_along(attached, tangent, alpha, d_alpha, position, model, slopes, work, along):
    """Fill `arriving` from alpha (C,) and its derivative."""
    if attached is None:
        return
    _fill(attached, tangent, position, model, slopes, work, along)
    width = work.arriving.shape[0]
    for j in range(model.last.shape[0] * model.step):
        given = alpha, d_alpha, work.matrix, along.matrix
        work.arriving[j], along.arriving[j] = exact_mean(*given, j, width)


@helper
def arrival_along(work, along, model, j):
    """What arrives at entry j of a row by label and duration, and its derivative."""
    if work is None:
        return -math.inf, 0.0
    longest = model.max_duration
    place = transition_place(model, j // longest, j % longest + 1)
    return work.arriving[place], along.arriving[place]


@helper
def add_moves(attached, level, mean, alpha, d_alpha, position, row, model, work, along, totals):
    """Add the derivatives of the transitions at `position`, after `arrive_along`.

    `level` is the offset of alpha and `mean` the derivative of log Z, which eta is less.
    """
    if attached is None:
        return
    by_position = totals.attached.has_moves
    if not (by_position or totals.direct.shape[0] > 1):
        return
    _reduce(row, model, work, along)
    num_labels, step, width = model.last.shape[0], model.step, work.onward.shape[0]
    for source in range(num_labels):
        for label in range(num_labels):
            total = 0.0
            for j in range(label * step, (label + 1) * step):
                place = source * width + j
                x = alpha[source] + level + work.matrix[place] + work.onward[j]
                if not x > NOTHING:
                    continue
                d = d_alpha[source] + along.matrix[place] + along.onward[j] - mean
                count = math.exp(min(x, 0.0)) * d
                total += count
                if totals.direct.shape[0] > 1:
                    totals.direct[place] += count
            if by_position:
                totals.attached.moves[position, source, label] = total


@helper
def keep_span(attached, position, k, label, value):
    """Write the derivative of the probability of a segment."""
    if attached is None:
        return
    if attached.has_spans:
        attached.spans[position, k - 1, label] = value

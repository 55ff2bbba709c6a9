"""Gradients at one position, of problems with scores of segments or of transitions by position.

    P(segment [s, s+k) of label c)            = exp(gamma_s(k, c) + eta_s(k, c) - log Z)
    P(c' before it | segment [s, s+k) of c)   = exp(alpha_s(c') + A_s[k, c', c] - gamma_s(k, c)),

with A the transitions and their scores at s, gamma without the scores of segments, and eta with
them. Static transitions do not depend on k: the second is multiplied by the first's sum over k.
"""

from __future__ import annotations

import math

from flash_semicrf.streaming.cpu.by_duration.attached import fill_matrix, spread_row
from flash_semicrf.streaming.cpu.by_duration.products import exact_arrivals
from flash_semicrf.streaming.cpu.by_duration.tail import add_further
from flash_semicrf.streaming.cpu.by_duration.window import copy_row
from flash_semicrf.streaming.cpu.parts import helper
from flash_semicrf.streaming.cpu.vector import TILE, exp_row

__all__ = ["add_starts"]


@helper
def _arrive(attached, messages, position, model, work, terms):
    """terms = gamma, a row, and whether labels come before: not for the first segment's own scores.

    Fills the rows of `work` with what arrives and whence.
    """
    source, matrix = work.source, work.matrix
    if position > 0:
        copy_row(messages.alpha[position - 1], source)
        fill_matrix(attached, position, model.scores, model.step, matrix)
    elif model.free_start:
        for c in range(source.shape[0]):
            source[c] = 0.0
        copy_row(model.scores, matrix)
    else:
        for j in range(terms.shape[0]):
            allowed = model.bias[j] > -math.inf
            terms[j] = model.first[j] - model.bias[j] if allowed else -math.inf
        return False
    for column in range(0, work.arriving.shape[0], TILE):
        exact_arrivals(source, matrix, column, work.arriving, work.sums)
    spread_row(work.arriving, model, terms)
    return True


@helper
def _add_transitions(position, model, work, sums):
    """Add the transitions, by the shares of `work`."""
    num_labels, step = model.last.shape[0], model.step
    width = work.arriving.shape[0]
    terms, by_position = work.sums, sums.attached.has_moves and position > 0
    for source in range(num_labels):
        alpha = work.source[source]
        first = source * width
        for j in range(width):
            possible = alpha > -math.inf and work.shares[j] > 0.0
            x = alpha + work.matrix[first + j] - work.arriving[j]
            terms[j] = min(x, 0.0) if possible else -math.inf
        exp_row(terms, 0, terms, 0, width)
        for j in range(width):
            terms[j] *= work.shares[j]
        if sums.transition.shape[0] > 1:
            for j in range(width):
                sums.transition[first + j] += terms[j]
        if by_position:
            for label in range(num_labels):
                total = 0.0
                for j in range(label * step, (label + 1) * step):
                    total += terms[j]
                sums.attached.moves[position, source, label] = total


@helper
def add_starts(attached, messages, position, reference, model, work, eta, further, row, sums):
    """Add the segments that start at `position`, from eta less `reference`, a row.

    `row` is that of `further` which belongs to the position.
    """
    if attached is None:
        return
    num_labels, longest, step = model.last.shape[0], model.max_duration, model.step
    terms, shares = work.terms, work.shares
    level = messages.forward[position] + reference - messages.total[0] - messages.total[1]
    follows = _arrive(attached, messages, position, model, work, terms)
    for j in range(num_labels * longest):
        x = terms[j] + eta[j] + level
        terms[j] = min(x, 0.0) if x > -math.inf else -math.inf
    exp_row(terms, 0, terms, 0, terms.shape[0])
    for c in range(num_labels):
        started = 0.0
        for j in range(c * longest, (c + 1) * longest):
            started += terms[j]
            sums.duration[j] += terms[j]
            if step > 1:
                shares[j] = terms[j]
        sums.start[position, c] += started
        if step == 1:
            shares[c] = started
        add_further(model.tail, sums.beyond, c, terms[(c + 1) * longest - 1], further, row)
    if sums.attached.has_spans:
        spans = sums.attached.spans[position]
        for k in range(longest):
            for c in range(num_labels):
                spans[k, c] = terms[c * longest + k]
    if follows and (sums.transition.shape[0] > 1 or sums.attached.has_moves):
        _add_transitions(position, model, work, sums)

"""Log-sum-exps of messages and transitions: nothing is lost where products with exp(A) lose terms.

A row of transitions has an entry for each label and, if they depend on it, each duration.
"""

from __future__ import annotations

import math

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper
from flash_semicrf.streaming.cpu.vector import TILE, exp_sum, exp_sums, max_sum, max_tile

__all__ = ["NOTHING", "exact_arrivals", "exact_departure", "exact_mean"]

NOTHING = -700.0
"""Log of a probability that counts as 0."""


@helper
def exact_arrivals(alpha, scores, column, tops, sums):
    """LSE_{c'} [alpha(c') + scores[c', j]] of the `TILE` entries j from `column` on, in `tops`.

    `scores` has a row for each c', of the size of `tops`; `sums` is workspace of that size.
    """
    num_labels, size = alpha.shape[0], tops.shape[0]
    for j in range(column, column + TILE):
        tops[j] = -math.inf
    max_tile(alpha, 0, 1, scores, column, size, num_labels, tops, column)
    for j in range(column, column + TILE, LANES):
        exp_sums(alpha, 0, scores, j, size, num_labels, tops, sums, j)
    for j in range(column, column + TILE):
        tops[j] = tops[j] + math.log(sums[j]) if tops[j] > NEG_INF else -math.inf


@helper
def exact_departure(eta, scores, label):
    """LSE_j [scores[label, j] + eta(j)]."""
    size = eta.shape[0]
    top = max_sum(eta, 0, scores, label * size, size)
    if not top > NEG_INF:
        return -math.inf
    return top + math.log(exp_sum(eta, 0, scores, label * size, top, size))


@helper
def exact_mean(values, d_values, scores, d_scores, first, step):
    """Log-sum of values[i] + scores[first + i * step], and the mean derivative of its terms."""
    top = -math.inf
    for i in range(d_values.shape[0]):
        top = max(top, values[i] + scores[first + i * step])
    if top == -math.inf:
        return top, 0.0
    total, weighted = 0.0, 0.0
    for i in range(d_values.shape[0]):
        x = values[i] + scores[first + i * step] - top
        if x > NOTHING:
            weight = math.exp(x)
            total += weight
            weighted += weight * (d_values[i] + d_scores[first + i * step])
    return top + math.log(total), weighted / total

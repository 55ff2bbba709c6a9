"""Durations beyond K in the derivatives along a direction, for transitions by duration.

Segments of K positions and of more are one class, as in
`flash_semicrf.streaming.cpu.by_duration.tail`. With P(t) the probability that one which has at
least K positions before t goes on, what may follow them has the derivative

    dQ_t(c) = (1 - P(t)) (d end_{t-1}(c) + d beta_t(c))
              + P(t) (d scores[t, c] + d tail(c) + dQ_{t+1}(c)),

and forwards the probability that a segment of the class covers the K positions before t, and the
derivative of what leads there, go on from t to t + 1 in the same shares. Cost O(C) a position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.tails import nothing, with_tail

__all__ = ["fill_class", "new_class", "pass_on", "take_class"]


class _Class(NamedTuple):
    """Segments of the class at the end of K positions from the present start; arrays (C,)."""

    goes_on: np.ndarray  # share of them
    d_before: np.ndarray  # derivative of D_K, of the start score and of the scores of K positions
    d_beyond: np.ndarray  # of what follows those that go on
    probability: np.ndarray  # of a segment of the class there
    d_total: np.ndarray  # that times the derivative of all that leads there


@with_tail(nothing)
def new_class(tail):
    """Workspace of the functions below."""
    size = tail.shape[0]
    return _Class(np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size))


@with_tail(nothing)
def fill_class(tail, q, arrivals, slopes, s, eta, d_eta, longer):
    """Turn the segments of K positions from s into the class.

    Parameters
    ----------
    tail : float64 array of shape (C,) or None
    q : Sequence
        Of `d_rest` row s is filled, and row s + 1 is read.
    arrivals : Arrivals
    slopes : Slopes
    s : int
    eta, d_eta : float64 arrays of shape (R,)
    longer : _Class
        Gets all but its probability and its total.
    """
    num_labels, longest = tail.shape[0], arrivals.max_duration
    t = s + longest
    if t > q.length:
        return
    level = q.backward[q.length - s - 1] - (q.offset + q.value)
    for c in range(num_labels):
        row, j = s * num_labels + c, (c + 1) * longest - 1
        d_end = q.d_beta[t - 1, c]
        if q.has_d_boundary:
            d_end += q.d_end[t - 1, c]
        goes_on, d_beyond = 0.0, 0.0
        if t < q.length:
            goes_on = q.further[row] / (1.0 + q.further[row + num_labels])
            d_beyond = q.d_scores[t, c] + slopes.tail[c] + q.d_rest[row + num_labels]
        longer.goes_on[c], longer.d_beyond[c] = goes_on, d_beyond
        longer.d_before[c] = d_eta[j] - d_end
        q.d_rest[row] = d_end + goes_on * (d_beyond - d_end)
        d_eta[j] += q.d_rest[row] - d_end
        x = q.rest[row] + level + arrivals.bias[j]
        if q.has_boundary:
            x += q.start[s, c]
        eta[j] = x if x > NEG_INF else -math.inf


def _not_taken(tail, longer, label, probability, d_source):
    return False


@with_tail(_not_taken)
def take_class(tail, longer, label, probability, d_source):
    """Add the segments of the class that start here to it; whether there is such a class."""
    longer.probability[label] += probability
    longer.d_total[label] += probability * (d_source + longer.d_before[label])
    return True


@with_tail(nothing)
def pass_on(tail, q, slopes, s, longest, mean, longer, probability, totals):
    """End the segments of the class that have just K positions or more before s + K, or go on.

    Parameters
    ----------
    tail : float64 array of shape (C,) or None
    q : Sequence
        Those that end are added to `d_alpha`.
    slopes : Slopes
    s, longest : int
    mean : float
        d log Z.
    longer : _Class
        Those that go on remain.
    probability : float64 array of shape (T, C)
        Those that end are added.
    totals : Totals
        Positions beyond the K-th are added.
    """
    t = s + longest
    if t > q.length:
        return
    for c in range(tail.shape[0]):
        goes_on = longer.goes_on[c]
        ending = 1.0 - goes_on
        probability[t - 1, c] += ending * longer.probability[c]
        q.d_alpha[t - 1, c] += ending * longer.d_total[c]
        going, d_going = goes_on * longer.probability[c], goes_on * longer.d_total[c]
        if t < q.length:
            totals.beyond[c] += d_going + going * (longer.d_beyond[c] - mean)
            d_going += going * (q.d_scores[t, c] + slopes.tail[c])
        longer.probability[c], longer.d_total[c] = going, d_going

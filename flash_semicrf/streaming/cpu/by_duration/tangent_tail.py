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
from flash_semicrf.streaming.cpu.parts import helper, owning

__all__ = ["fill_class", "new_class", "pass_on", "take_class"]


class _Class(NamedTuple):
    """Segments of the class at the end of K positions from the present start; arrays (C,)."""

    goes_on: np.ndarray  # share of them
    d_before: np.ndarray  # derivative of D_K, of the start score and of the scores of K positions
    d_beyond: np.ndarray  # of what follows those that go on
    probability: np.ndarray  # of a segment of the class there
    d_total: np.ndarray  # that times the derivative of all that leads there


@owning
def new_class(tail):
    """Workspace of the functions below."""
    if tail is None:
        return None
    size = tail.shape[0]
    return _Class(np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size))


@helper
def fill_class(tail, sequence, messages, tangent, model, slopes, s, row, longer):
    """Turn the segments of K positions from s into the class.

    Fills row s of `tangent.rest`, after row s + 1; `row` is (eta, d_eta). `longer` gets all but its
    probability and its total.
    """
    if tail is None:
        return
    num_labels, longest = tail.shape[0], model.max_duration
    eta, d_eta = row
    t = s + longest
    if t > sequence.length:
        return
    level = messages.backward[sequence.length - s - 1] - (messages.total[0] + messages.total[1])
    for c in range(num_labels):
        i, j = s * num_labels + c, (c + 1) * longest - 1
        d_end = tangent.beta[t - 1, c]
        if tangent.has_boundary:
            d_end += tangent.end[t - 1, c]
        goes_on, d_beyond = 0.0, 0.0
        if t < sequence.length:
            goes_on = messages.further[i] / (1.0 + messages.further[i + num_labels])
            d_beyond = tangent.scores[t, c] + slopes.tail[c] + tangent.rest[i + num_labels]
        longer.goes_on[c], longer.d_beyond[c] = goes_on, d_beyond
        longer.d_before[c] = d_eta[j] - d_end
        tangent.rest[i] = d_end + goes_on * (d_beyond - d_end)
        d_eta[j] += tangent.rest[i] - d_end
        x = messages.rest[i] + level + model.bias[j]
        if sequence.has_boundary:
            x += sequence.start[s, c]
        eta[j] = x if x > NEG_INF else -math.inf


@helper
def take_class(tail, longer, label, probability, d_source):
    """Add the segments of the class that start here to it; whether there is such a class."""
    if tail is None:
        return False
    longer.probability[label] += probability
    longer.d_total[label] += probability * (d_source + longer.d_before[label])
    return True


@helper
def pass_on(tail, tangent, slopes, t, mean, longer, probability, beyond):
    """End the segments of the class that have just K positions or more before t, or go on.

    Those that end are added to `tangent.alpha` and `probability` (T, C), those that go on remain;
    `mean` is d log Z.
    """
    if tail is None:
        return
    length = probability.shape[0]
    if t > length:
        return
    for c in range(tail.shape[0]):
        goes_on = longer.goes_on[c]
        ending = 1.0 - goes_on
        probability[t - 1, c] += ending * longer.probability[c]
        tangent.alpha[t - 1, c] += ending * longer.d_total[c]
        going, d_going = goes_on * longer.probability[c], goes_on * longer.d_total[c]
        if t < length:
            beyond[c] += d_going + going * (longer.d_beyond[c] - mean)
            d_going += going * (tangent.scores[t, c] + slopes.tail[c])
        longer.probability[c], longer.d_total[c] = going, d_going

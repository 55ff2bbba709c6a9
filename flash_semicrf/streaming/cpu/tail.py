"""Durations beyond K in the passes for static transitions, at O(C) a position.

    G_t(c) = scores[t-1, c] + tail(c) + LSE [G_{t-1}(c), w_{t-1}(c)]

sums the segments longer than K that end at t (before end scores), w_t(c) being the term of duration
K at t; read backwards, those that start there. Everything is in logarithms.

The gradient needs one recursion more, over what may follow a position beyond the K-th:

    Q_t(c) = LSE [end_{t-1}(c) + beta_t(c), scores[t, c] + tail(c) + Q_{t+1}(c)]
    expected segments longer than K    = sum_t exp(G_t(c) + end_{t-1}(c) + beta_t(c) - log Z)
    expected positions beyond the K-th = sum_t exp(G_t(c) + Q_t(c) - log Z)
"""

from __future__ import annotations

import math

from flash_semicrf.potentials import NEG_INF
from flash_semicrf.streaming.cpu.jit import helper, inlined

__all__ = ["add_longer", "tail_gradient"]


@inlined
def _log_add(x, y):
    """log(exp(x) + exp(y))."""
    high, low = max(x, y), min(x, y)
    if not low - high > -40.0:  # nothing to add, or both -inf
        return high
    return high + math.log1p(math.exp(low - high))


@helper
def add_longer(
    longer, tail, scores, position, work, alpha, frame, drift, buffer, oldest, capacity, bias, full
):
    """Take one step: add the segments longer than K to a row of outputs.

    Parameters
    ----------
    longer : float64 array of shape (2C,)
        What may go on after the step before, LSE [G, w]; then, for this step, G.
    tail : float64 array of shape (C,)
    scores : array of shape (T, C)
    position : int
    work : float64 array
        Rows at `alpha` (outputs of durations 1..K), `frame` and `drift`: see `message_pass`.
    buffer : float64 array
    oldest, capacity : int
        The logarithm of label c's source K steps ago is at ``oldest + c * capacity``.
    bias : float64 array of shape (C, K + 1)
    full : bool
        There is a source K steps ago.
    """
    num_labels = tail.shape[0]
    longest = bias.shape[1] - 1
    for c in range(num_labels):
        x = scores[position, c]
        g = longer[c] + x + tail[c] if x > NEG_INF else -math.inf
        longer[num_labels + c] = g
        work[alpha + c] = _log_add(work[alpha + c], g)
        if full:
            source = buffer[oldest + c * capacity] - work[drift + c]
            g = _log_add(g, work[frame + c] + source + bias[c, longest])
        longer[c] = g


@helper
def tail_gradient(messages, longer, scores, end_scores, has_boundary, tail, segments, beyond):
    """Expected segments longer than K, and positions beyond the K-th of their segment.

    Parameters
    ----------
    messages : Messages
    longer : float64 array of shape (T, C)
        Row p: G_{p+1} of the forward pass, less its offset.
    scores, end_scores : arrays of shape (T, C)
    has_boundary : bool
    tail : float64 array of shape (C,)
    segments, beyond : float64 arrays of shape (C,)
        Zeros; get the expectations.
    """
    beta, forward, backward = messages.beta, messages.forward, messages.backward
    length, offset, value = messages.length, messages.offset, messages.value
    for c in range(tail.shape[0]):
        if not tail[c] > NEG_INF:
            continue
        rest = -math.inf  # Q of the position after p, less the offset of the backward pass there
        for p in range(length - 1, -1, -1):
            sink = length - p - 1
            if p + 1 < length:
                x = scores[p + 1, c]
                rest += backward[sink - 1] - backward[sink] + tail[c]
                rest = rest + x if x > NEG_INF else -math.inf
            stop = beta[p, c]
            if has_boundary:
                end = end_scores[p, c]
                stop = stop + end if end > NEG_INF else -math.inf
            rest = _log_add(rest, stop)
            level = longer[p, c] + forward[p + 1] + backward[sink] - offset - value
            segments[c] += math.exp(level + stop)
            beyond[c] += math.exp(level + rest)

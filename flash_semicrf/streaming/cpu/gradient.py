"""Gradients of log Z from the messages of both passes, for static transitions.

Nothing here is sequential, so long sequences are cut into chunks of positions. With o the offsets of
the messages less log Z,

    P(a segment of c starts at p)  = exp(gamma_p(c) + eta_p(c) + o)
    P(one ends at p)               = exp(alpha_{p+1}(c) + beta_{p+1}(c) + o)
    d log Z / d scores[p, c]       = running sum of starts less ends: the position marginal
    d log Z / d D_k(c)             = sum_s exp(h_s(c) + D_k(c) + u_{s+k}(c) - log Z)
    d log Z / d A[c', c]           = sum_s exp(alpha_s(c') + A[c', c] + eta_s(c) - log Z)

The correlation over durations works on exponentials in a frame per label, like the passes; a block
of a label whose exponents leave the range is done term by term.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.potentials import NEG_INF
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.simd import (
    LANES,
    TILE,
    exp_row,
    multiply_tile,
    multiply_tile8,
)

__all__ = [
    "CHUNK",
    "Messages",
    "add_carry",
    "boundary_marginals",
    "duration_gradient",
    "transition_gradient",
]

CHUNK = 16384
"""Positions of one task; fixed, so that sums do not depend on the number of threads."""

_BLOCK = 32  # outputs per sweep of the duration correlation
_HIGH = 300.0  # exponents of both factors stay below it: their product cannot overflow
_NEGLIGIBLE = -50.0  # log of a marginal that no float64 gradient would show


class Messages(NamedTuple):
    """Messages of one sequence. Row p holds those of position p as `message_pass` writes them.

    Attributes
    ----------
    alpha, gamma, beta, eta : float64 arrays of shape (T, C)
        alpha_{p+1}, gamma_p, beta_{p+1} and eta_p, less their offsets.
    forward, backward : float64 arrays of shape (T + 1,)
        Whole-number offsets of the two passes, by their step.
    length : int
    offset, value : float
        log Z = offset + value.
    """

    alpha: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eta: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    length: int
    offset: float
    value: float


@kernel
def _level(messages, source, sink):
    """Offsets of alpha or gamma at step `source` and of beta or eta at step `sink`, less log Z."""
    whole = messages.forward[source] + messages.backward[messages.length - sink] - messages.offset
    return whole - messages.value


@kernel
def _end_row(messages, position, row, num_labels):
    """row[c] = log P(a segment of c ends at position)."""
    level = _level(messages, position + 1, position + 1)
    for c in range(num_labels):
        row[c] = messages.alpha[position, c] + messages.beta[position, c] + level


@kernel
def boundary_marginals(messages, begin, stop, position_rows, start_rows, end_rows, want_ends, carry):
    """Marginals of positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    position_rows : array of shape (T, C)
        Gets the running sum of starts less ends from `begin` on; `add_carry` completes it.
    start_rows, end_rows : arrays of shape (T, C)
        Get the boundary marginals if `want_ends`.
    want_ends : bool
    carry : array of shape (C,)
        Gets the running sum at `stop`, the ends at its last position taken off.
    """
    num_labels = carry.shape[0]
    padded = -(-num_labels // LANES) * LANES
    ends = np.full(padded, -math.inf)
    starts = np.full(padded, -math.inf)
    carry[:] = 0.0
    for p in range(begin, stop):
        level = _level(messages, p, p)
        for c in range(num_labels):
            starts[c] = messages.gamma[p, c] + messages.eta[p, c] + level
        exp_row(starts, 0, starts, 0, padded)
        _end_row(messages, p, ends, num_labels)
        exp_row(ends, 0, ends, 0, padded)
        for c in range(num_labels):
            inside = carry[c] + starts[c]
            position_rows[p, c] = inside
            carry[c] = inside - ends[c]
        if want_ends:
            for c in range(num_labels):
                start_rows[p, c] = starts[c]
                end_rows[p, c] = ends[c]


@kernel
def add_carry(position_rows, begin, stop, carry):
    """Add what was open at `begin` to the running sums of ``[begin, stop)``, kept in [0, 1]."""
    for p in range(begin, stop):
        for c in range(carry.shape[0]):
            position_rows[p, c] = min(max(position_rows[p, c] + carry[c], 0.0), 1.0)


class _Buffer(NamedTuple):
    """Sources and outputs of the duration correlation, a label per row."""

    sources: np.ndarray  # (C * capacity,) E = exp(H)
    logs: np.ndarray  # (C * capacity,) H = h less the frame
    outputs: np.ndarray  # (C * _BLOCK,) U
    output_logs: np.ndarray  # (C * _BLOCK,) log U = u plus the frame and the window's peak
    frame: np.ndarray  # (C,)
    stale: np.ndarray  # (C,) E does not follow from H


@kernel
def _settle_frame(buffer, label, first, count, new):
    """Move a label's frame so that both factors are within range; False if no frame does.

    `first` is the oldest of `count` buffered sources, the last `new` of which are this block's.
    """
    outputs = buffer.output_logs[label * _BLOCK : (label + 1) * _BLOCK]
    top = outputs.max()
    begin = first if buffer.stale[label] else first + count - new
    high = buffer.logs[begin : first + count].max()
    if top > _HIGH or high > _HIGH:
        high = buffer.logs[first : first + count].max()
        if high + top > 2 * _HIGH:
            buffer.stale[label] = True
            return False
        if high == -math.inf:
            shift = -top
        elif top == -math.inf:
            shift = high
        else:
            shift = (high - top) / 2
        buffer.frame[label] += shift
        buffer.logs[first : first + count] -= shift
        outputs += shift
        begin = first
    buffer.stale[label] = False
    rounded = -(-(first + count - begin) // LANES) * LANES
    exp_row(buffer.logs, begin, buffer.sources, begin, rounded)
    exp_row(buffer.output_logs, label * _BLOCK, buffer.outputs, label * _BLOCK, _BLOCK)
    return True


@kernel
def _term_by_term(buffer, label, column, steps, alive_from, bias, peak, total):
    """Add one block of one label to its duration gradient by its logarithms.

    `column` is the buffer index of the block's first source; output i may use sources from
    `alive_from[i]` to ``column + i``.
    """
    longest = bias.shape[0] - 1
    for i in range(steps):
        log_output = buffer.output_logs[label * _BLOCK + i]
        if log_output == -math.inf:
            continue
        for k in range(1, min(longest, column + i + 1 - alive_from[i]) + 1):
            x = buffer.logs[column + i + 1 - k] + (bias[k] - peak) + log_output
            if x > _NEGLIGIBLE:
                total[longest - k] += math.exp(x)


@kernel
def duration_gradient(
    messages, begin, stop, scores, start_scores, end_scores, has_boundary, window, gradient
):
    """Add ``d log Z / d D`` of the segments that end in positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    scores, start_scores, end_scores : arrays of shape (T, C)
    has_boundary : bool
    window : Window
    gradient : float64 array of shape (K, C)
    """
    num_labels = scores.shape[1]
    longest = window.bias.shape[1] - 1
    capacity = longest + _BLOCK * max(4, -(-longest // _BLOCK)) + TILE
    tiled = -(-longest // TILE) * TILE
    buffer = _Buffer(
        np.zeros(num_labels * capacity),
        np.full(num_labels * capacity, -math.inf),
        np.zeros(num_labels * _BLOCK),
        np.full(num_labels * _BLOCK, -math.inf),
        np.zeros(num_labels),
        np.zeros(num_labels, np.bool_),
    )
    weighted = np.zeros(num_labels * tiled)  # by k descending, without the factor W
    direct = np.zeros((num_labels, longest))  # term by term, W included
    born = np.zeros(num_labels, np.int64)  # first source not cut off by a forbidden position
    alive_from = np.zeros(_BLOCK, np.int64)
    oldest = max(0, begin + 1 - longest)
    base = oldest - longest  # source of the buffer's first column

    for block in range(oldest, stop, _BLOCK):
        steps = min(_BLOCK, stop - block)
        if block + _BLOCK + TILE - base > capacity:
            drop = block - longest - base
            for c in range(num_labels):
                for i in range(c * capacity, c * capacity + longest):
                    buffer.sources[i] = buffer.sources[i + drop]
                    buffer.logs[i] = buffer.logs[i + drop]
            base += drop
        for c in range(num_labels):
            column = c * capacity + block - base
            forbidden = False
            frame = buffer.frame[c]
            for i in range(steps):
                p = block + i
                h = messages.gamma[p, c] - frame
                u = messages.beta[p, c]
                if has_boundary:
                    h += start_scores[p, c]
                    u += end_scores[p, c]
                if scores[p, c] > NEG_INF:
                    frame += scores[p, c]
                else:
                    u = -math.inf
                    forbidden = True
                    born[c] = p + 1
                alive_from[i] = c * capacity + max(born[c] - base, 0)
                frame -= messages.forward[p + 1] - messages.forward[p]
                u += frame + _level(messages, p + 1, p + 1) + window.peak[c]
                buffer.logs[column + i] = h if h > NEG_INF else -math.inf
                live = u > NEG_INF and p >= begin
                buffer.output_logs[c * _BLOCK + i] = u if live else -math.inf
            for i in range(c * _BLOCK + steps, (c + 1) * _BLOCK):
                buffer.output_logs[i] = -math.inf
            buffer.frame[c] = frame
            first = column - min(longest, block - base)
            if forbidden:
                _term_by_term(
                    buffer, c, column, steps, alive_from, window.bias[c], window.peak[c], direct[c]
                )
                buffer.logs[first : c * capacity + born[c] - base] = -math.inf
                buffer.stale[c] = True
            elif not _settle_frame(buffer, c, first, column + steps - first, steps):
                _term_by_term(
                    buffer, c, column, steps, alive_from, window.bias[c], window.peak[c], direct[c]
                )
            elif block + steps > begin:
                for q in range(0, longest, TILE):
                    multiply_tile(
                        buffer.outputs, c * _BLOCK, 1,
                        buffer.sources, column + 1 - longest + q, 1,
                        steps, weighted, c * tiled + q,
                    )  # fmt: skip
    for c in range(num_labels):
        for k in range(1, longest + 1):
            term = weighted[c * tiled + longest - k]
            if term != 0.0:
                term *= math.exp(window.bias[c, k] - window.peak[c])
            gradient[k - 1, c] += term + direct[c, longest - k]


@kernel
def _transition_rows(messages, position, free_start, peak, source_row, sink_row, num_labels):
    """Exponents of the two factors of one boundary; False if their product could overflow."""
    first = position == 0
    for c in range(num_labels):
        source_row[c] = messages.alpha[position - 1, c] if not first else 0.0
        sink_row[c] = messages.eta[position, c]
    if first and not free_start:
        source_row[:num_labels] = -math.inf
    top = source_row[:num_labels].max()
    if top == -math.inf:
        sink_row[:num_labels] = -math.inf
        return True
    level = _level(messages, position, position) + top + peak
    for c in range(num_labels):
        source_row[c] -= top
        sink_row[c] += level
    return sink_row[:num_labels].max() < _HIGH


@kernel
def transition_gradient(messages, begin, stop, transition, free_start, gradient):
    """Add ``d log Z / d A`` of the segments that start in positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    transition : float64 array of shape (C, C)
        A[c', c], -inf where forbidden.
    free_start : bool
        The first segment's source label is summed out (no initial scores).
    gradient : float64 array of shape (C, C)
    """
    num_labels = transition.shape[0]
    padded = -(-num_labels // LANES) * LANES
    peak = transition.max()
    if peak == -math.inf:
        return
    sources = np.full(TILE * padded, -math.inf)
    sinks = np.full(TILE * padded, -math.inf)
    total = np.zeros(num_labels * padded)
    for block in range(begin, stop, TILE):
        steps = min(TILE, stop - block)
        for i in range(steps):
            p = block + i
            source_row = sources[i * padded : (i + 1) * padded]
            sink_row = sinks[i * padded : (i + 1) * padded]
            if not _transition_rows(messages, p, free_start, peak, source_row, sink_row, num_labels):
                for c_src in range(num_labels):
                    for c in range(num_labels):
                        x = source_row[c_src] + sink_row[c] + transition[c_src, c] - peak
                        if x > _NEGLIGIBLE:
                            gradient[c_src, c] += math.exp(x)
                source_row[:] = -math.inf
                sink_row[:] = -math.inf
        exp_row(sources, 0, sources, 0, steps * padded)
        exp_row(sinks, 0, sinks, 0, steps * padded)
        for c_src in range(num_labels):
            column = 0
            row = c_src * padded
            while column + TILE <= padded:
                multiply_tile(
                    sources, c_src, padded, sinks, column, padded, steps, total, row + column
                )
                column += TILE
            if column < padded:
                multiply_tile8(
                    sources, c_src, padded, sinks, column, padded, steps, total, row + column
                )
    for c_src in range(num_labels):
        for c in range(num_labels):
            value = total[c_src * padded + c]
            if value != 0.0:
                gradient[c_src, c] += value * math.exp(transition[c_src, c] - peak)

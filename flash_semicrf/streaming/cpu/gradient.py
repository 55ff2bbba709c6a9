"""Gradients of log Z from the messages of both passes, for static transitions.

Nothing here is sequential, so long sequences are cut into chunks of positions. With o the offsets
of the messages less log Z,

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
from flash_semicrf.streaming.cpu.jit import inlined, kernel
from flash_semicrf.streaming.cpu.simd import (
    LANES,
    TILE,
    exp_row,
    exp_shifted_row,
    max_row,
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

_BLOCK = 64  # outputs per sweep of the duration correlation
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


@inlined
def _level(messages, source, sink):
    """Offsets of alpha or gamma at step `source` and of beta or eta at step `sink`, less log Z."""
    whole = messages.forward[source] + messages.backward[messages.length - sink] - messages.offset
    return whole - messages.value


@inlined
def _end_row(messages, position, row, num_labels):
    """row[c] = log P(a segment of c ends at position)."""
    level = _level(messages, position + 1, position + 1)
    for c in range(num_labels):
        row[c] = messages.alpha[position, c] + messages.beta[position, c] + level


@kernel
def boundary_marginals(
    messages, begin, stop, position_rows, start_rows, end_rows, want_ends, carry
):
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
    """Sources and outputs of the duration correlation, a label per row.

    `window` holds E and, `logs` elements further, its logarithms H plus the label's drift: the
    frame that E stands in is `frame`, the one of the logarithms is ``frame - drift``.
    """

    window: np.ndarray  # (2 * C * capacity,)
    logs: int
    outputs: np.ndarray  # (C * _BLOCK,) U
    output_logs: np.ndarray  # (C * _BLOCK,) log U = u plus the frame and the window's peak
    frame: np.ndarray  # (C,)
    drift: np.ndarray  # (C,)
    stale: np.ndarray  # (C,) E does not follow from H


@inlined
def _maximum(values, first, count):
    """Largest of `count` values."""
    whole = count // LANES * LANES
    top = max_row(values, first, 0, 0, 0.0, 0, whole)
    for i in range(first + whole, first + count):
        top = max(top, values[i])
    return top


@inlined
def _settle_frame(buffer, label, first, count, new, output):
    """Move a label's frame so that both factors are within range; False if no frame does.

    `first` is the oldest of `count` buffered sources, of which the last `new` have no E yet; as
    many outputs start at index `output` of the label's.
    """
    row = label * _BLOCK
    top = _maximum(buffer.output_logs, row + output, new)
    begin = first if buffer.stale[label] else first + count - new
    high = _maximum(buffer.window, buffer.logs + begin, first + count - begin) - buffer.drift[label]
    shift = 0.0
    if top > _HIGH or high > _HIGH:
        high = _maximum(buffer.window, buffer.logs + first, count) - buffer.drift[label]
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
        buffer.drift[label] += shift
        buffer.output_logs[row : row + _BLOCK] += shift
        begin = first
    buffer.stale[label] = False
    rounded = -(-(first + count - begin) // LANES) * LANES
    drift = buffer.drift[label]
    exp_shifted_row(buffer.window, buffer.logs + begin, 0, 0, drift, begin, rounded)
    rounded = -(-new // LANES) * LANES
    exp_row(buffer.output_logs, row + output, buffer.outputs, row + output, rounded)
    return True


@inlined
def _correlate(buffer, label, column, first, steps, longest, weighted):
    """Add a block of one label to ``sum_t U_t E_{t-k}``; False if some exponents are out of range.

    In one piece if possible, else in pieces of `TILE` outputs, within which exponents vary less.
    Pieces out of range are left with U = 0 and keep the logarithms of their outputs; the others'
    are set to -inf.
    """
    tiled = -(-longest // TILE) * TILE
    complete = True
    settled = _settle_frame(buffer, label, first, column + steps - first, steps, 0)
    size = steps if settled else TILE
    for i in range(0, steps, size):
        new = min(size, steps - i)
        if not settled and not _settle_frame(
            buffer, label, first, column + i + new - first, new, i
        ):
            complete = False
            continue
        row = label * _BLOCK + i
        for q in range(0, longest, TILE):
            multiply_tile(
                buffer.outputs, row, 1, buffer.window, column + i + 1 - longest + q, 1,
                new, weighted, label * tiled + q,
            )  # fmt: skip
        buffer.output_logs[row : row + new] = -math.inf
    return complete


@kernel
def _term_by_term(buffer, label, column, block, steps, alive_from, window, total):
    """Add one block of one label to its duration gradient by its logarithms.

    `column` is the buffer index of source `block`, the first of the block; output i may use
    sources from ``alive_from[i, label]`` to ``block + i``.
    """
    longest = window.bias.shape[1] - 1
    offset = window.peak[label] + buffer.drift[label]
    for i in range(steps):
        log_output = buffer.output_logs[label * _BLOCK + i] - offset
        if log_output == -math.inf:
            continue
        newest = buffer.logs + column + i + 1
        for k in range(1, min(longest, block + i + 1 - alive_from[i, label]) + 1):
            x = buffer.window[newest - k] + window.bias[label, k] + log_output
            if x > _NEGLIGIBLE:
                total[longest - k] += math.exp(x)


@kernel
def _cut_off(buffer, label, first, born):
    """Remove the sources before column `born`, which a forbidden position has cut off."""
    buffer.window[buffer.logs + first : buffer.logs + born] = -math.inf
    buffer.stale[label] = True


@inlined
def _advance_frames(frame, score, whole, position, born):
    """Add a position's scores to the frames, less a change of offset; True if one is forbidden."""
    forbidden = False
    for c in range(frame.shape[0]):
        if score[c] > NEG_INF:
            frame[c] += score[c] - whole
        else:
            frame[c] -= whole
            born[c] = position + 1
            forbidden = True
    return forbidden


@inlined
def _fill_position(buffer, messages, p, i, column, capacity, begin, score, start, end, has_boundary,
                   peak, born, sources, outputs):  # fmt: skip
    """Add the source and the output of position p, i of its block; True if it is forbidden for any.

    `sources` and `outputs` are scratch rows of C.
    """
    num_labels = sources.shape[0]
    whole = messages.forward[p + 1] - messages.forward[p]
    level = _level(messages, p + 1, p + 1)
    gamma, beta = messages.gamma[p], messages.beta[p]
    for c in range(num_labels):
        sources[c] = gamma[c] - buffer.frame[c] + buffer.drift[c]
    forbidden = _advance_frames(buffer.frame, score, whole, p, born)
    for c in range(num_labels):
        outputs[c] = beta[c] + buffer.frame[c] + peak[c] + level
    if has_boundary:
        for c in range(num_labels):
            sources[c] = sources[c] + start[c] if start[c] > NEG_INF else -math.inf
            outputs[c] = outputs[c] + end[c] if end[c] > NEG_INF else -math.inf
    if forbidden:
        for c in range(num_labels):
            if born[c] == p + 1:
                outputs[c] = -math.inf
    if p < begin:
        outputs[:] = -math.inf
    window = buffer.window[buffer.logs + column :]
    for c in range(num_labels):
        window[c * capacity] = sources[c]
        buffer.output_logs[c * _BLOCK + i] = outputs[c]
    return forbidden


@kernel
def _drop_oldest(buffer, num_labels, capacity, drop, keep):
    """Drop the oldest columns of the buffer, and the drifts."""
    for c in range(num_labels):
        drift = buffer.drift[c]
        buffer.drift[c] = 0.0
        for i in range(c * capacity, c * capacity + keep):
            buffer.window[i] = buffer.window[i + drop]
            buffer.window[buffer.logs + i] = buffer.window[buffer.logs + i + drop] - drift


@kernel
def _new_buffer(num_labels, capacity):
    half = num_labels * capacity
    window = np.zeros(2 * half)
    window[half:] = -math.inf
    return _Buffer(
        window, half, np.zeros(num_labels * _BLOCK), np.full(num_labels * _BLOCK, -math.inf),
        np.zeros(num_labels), np.zeros(num_labels), np.zeros(num_labels, np.bool_),
    )  # fmt: skip


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
    buffer = _new_buffer(num_labels, capacity)
    weighted = np.zeros(num_labels * tiled)  # by k descending, without the factor W
    direct = np.zeros((num_labels, longest))  # term by term, W included
    born = np.zeros(num_labels, np.int64)  # first source not cut off by a forbidden position
    alive_from = np.zeros((_BLOCK, num_labels), np.int64)  # the same, as of each output
    scratch = np.empty((2, num_labels))
    oldest = max(0, begin + 1 - longest)
    base = oldest - longest  # source of the buffer's first column

    for block in range(oldest, stop, _BLOCK):
        steps = min(_BLOCK, stop - block)
        if block + _BLOCK + TILE - base > capacity:
            _drop_oldest(buffer, num_labels, capacity, block - longest - base, longest)
            base = block - longest
        buffer.output_logs[:] = -math.inf
        forbidden = False
        for i in range(steps):
            p = block + i
            row = p if has_boundary else 0
            forbidden |= _fill_position(
                buffer, messages, p, i, p - base, capacity, begin, scores[p], start_scores[row],
                end_scores[row], has_boundary, window.peak, born, scratch[0], scratch[1],
            )  # fmt: skip
            alive_from[i] = born
        for c in range(num_labels):
            column = c * capacity + block - base
            first = column - min(longest, block - base)
            if forbidden and born[c] > block:
                _term_by_term(buffer, c, column, block, steps, alive_from, window, direct[c])
                _cut_off(buffer, c, first, c * capacity + born[c] - base)
            elif not _correlate(buffer, c, column, first, steps, longest, weighted):
                _term_by_term(buffer, c, column, block, steps, alive_from, window, direct[c])
    for c in range(num_labels):
        for k in range(1, longest + 1):
            term = weighted[c * tiled + longest - k]
            if term != 0.0:
                term *= math.exp(window.bias[c, k] - window.peak[c])
            gradient[k - 1, c] += term + direct[c, longest - k]


@inlined
def _transition_row(messages, position, free_start, peak, work, source, sink, num_labels, padded):
    """Write the two factors of one boundary; return the largest exponent of the second.

    The second factor carries all scales: an exponent beyond `_HIGH` says that it has overflowed.
    """
    first = position == 0
    if first and not free_start:
        work[source : source + padded] = 0.0
        work[sink : sink + padded] = 0.0
        return -math.inf
    for c in range(num_labels):
        work[source + c] = 0.0 if first else messages.alpha[position - 1, c]
        work[sink + c] = messages.eta[position, c]
    for c in range(num_labels, padded):
        work[source + c] = -math.inf
        work[sink + c] = -math.inf
    top = max_row(work, source, 0, 0, 0.0, 0, padded)
    if top == -math.inf:
        work[source : source + padded] = 0.0
        work[sink : sink + padded] = 0.0
        return -math.inf
    level = _level(messages, position, position) + top + peak
    highest = max_row(work, sink, 0, 0, 0.0, 0, padded) + level
    if not highest > _HIGH:
        exp_shifted_row(work, source, 0, 0, top, source, padded)
        exp_shifted_row(work, sink, 0, 0, -level, sink, padded)
    return highest


@kernel
def _boundary_terms(messages, position, work, source, sink, transition, gradient):
    """Add one boundary to the gradient of the transitions by its logarithms."""
    level = _level(messages, position, position)
    for c_src in range(transition.shape[0]):
        for c in range(transition.shape[0]):
            x = work[source + c_src] + work[sink + c] + transition[c_src, c] + level
            if x > _NEGLIGIBLE:
                gradient[c_src, c] += math.exp(x)


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
    sinks = _BLOCK * padded
    work = np.zeros(2 * sinks)  # rows of source factors, then of sink factors
    total = np.zeros(num_labels * padded)
    for block in range(begin, stop, _BLOCK):
        steps = min(_BLOCK, stop - block)
        for i in range(steps):
            p = block + i
            source, sink = i * padded, sinks + i * padded
            highest = _transition_row(
                messages, p, free_start, peak, work, source, sink, num_labels, padded
            )
            if highest > _HIGH:
                _boundary_terms(messages, p, work, source, sink, transition, gradient)
                work[source : source + padded] = 0.0
                work[sink : sink + padded] = 0.0
        for c_src in range(num_labels):
            column = 0
            row = c_src * padded
            while column + TILE <= padded:
                multiply_tile(
                    work, c_src, padded, work, sinks + column, padded, steps, total, row + column
                )
                column += TILE
            if column < padded:
                multiply_tile8(
                    work, c_src, padded, work, sinks + column, padded, steps, total, row + column
                )
    for c_src in range(num_labels):
        for c in range(num_labels):
            value = total[c_src * padded + c]
            if value != 0.0:
                gradient[c_src, c] += value * math.exp(transition[c_src, c] - peak)

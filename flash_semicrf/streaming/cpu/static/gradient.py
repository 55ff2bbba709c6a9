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

Where every segmentation passes a mask as large as 1e30, which leaves the messages no digits, the
bounds of probabilities and counts still hold: exponents end at 0, counts at the positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper, inlined, owning
from flash_semicrf.streaming.cpu.vector import (
    TILE,
    add_to,
    exp_row,
    exp_shifted_row,
    factor_row,
    fill,
    max_row,
    multiply_row,
    multiply_tile,
)

__all__ = [
    "CHUNK",
    "add_carry",
    "boundary_marginals",
    "duration_gradient",
    "transition_factors",
    "transition_gradient",
]

CHUNK = 16384
"""Positions of one task; fixed, so that sums do not depend on the number of threads."""

_BLOCK = 64  # outputs per sweep of the duration correlation
_HIGH = 300.0  # exponents of both factors stay below it: their product cannot overflow
_MASK = 1e4  # scores beyond it are kept out of the running sums
_NEGLIGIBLE = -50.0  # log of a marginal that no float64 gradient would show


@helper
def _level(messages, source, sink):
    """Offsets of alpha or gamma at step `source` and of beta or eta at step `sink`, less log Z."""
    whole = messages.forward[source] + messages.backward[messages.length - sink] - messages.offset
    return whole - messages.value


@owning
def boundary_marginals(
    messages, begin, stop, position_rows, start_rows, end_rows, want_ends, carry
):
    """Marginals of positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    position_rows : array of shape (T, C)
        Gets the running sum of starts less ends from `begin` on; `add_carry` completes it where
        `begin` is not 0.
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
    fill(carry, 0, num_labels, 0.0)
    alpha, gamma, beta, eta = messages.alpha, messages.gamma, messages.beta, messages.eta
    forward, backward = messages.forward, messages.backward
    length, offset, value = messages.length, messages.offset, messages.value
    for p in range(begin, stop):
        level = forward[p] + backward[length - p] - offset - value
        for c in range(num_labels):
            starts[c] = min(gamma[p, c] + eta[p, c] + level, 0.0)
        exp_row(starts, 0, starts, 0, padded)
        level = forward[p + 1] + backward[length - p - 1] - offset - value
        for c in range(num_labels):
            ends[c] = min(alpha[p, c] + beta[p, c] + level, 0.0)
        exp_row(ends, 0, ends, 0, padded)
        for c in range(num_labels):
            inside = carry[c] + starts[c]
            position_rows[p, c] = inside if begin > 0 else min(max(inside, 0.0), 1.0)
            carry[c] = inside - ends[c]
        if want_ends:
            for c in range(num_labels):
                start_rows[p, c] = starts[c]
                end_rows[p, c] = ends[c]


@helper
def add_carry(position_rows, begin, stop, carry):
    """Add what was open at `begin` to the running sums of ``[begin, stop)``, kept in [0, 1]."""
    for p in range(begin, stop):
        for c in range(carry.shape[0]):
            position_rows[p, c] = min(max(position_rows[p, c] + carry[c], 0.0), 1.0)


class _Buffer(NamedTuple):
    """Sources and outputs of the duration correlation, a label per row.

    `window` holds E and, `logs` elements further, its logarithms H plus the label's drift: the
    frame that E stands in is `frame`, the one of the logarithms is ``frame - drift``.

    A score that forbids or masks is no part of a frame, where it would take the precision of what
    follows. It is noted in `jumps`, and added to the logarithms of the sources before it when the
    outputs before it are done.
    """

    window: np.ndarray  # (2 * C * capacity,)
    logs: int
    outputs: np.ndarray  # (2 * C * _BLOCK,) U, and behind them `output_logs`
    output_logs: np.ndarray  # (C * _BLOCK,) log U = u plus the frame and the window's peak
    jumps: np.ndarray  # (C * _BLOCK,) score of the position, if it is one of those, else 0
    has_jump: np.ndarray  # (C,) the block has one
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
    window, logs, outputs = buffer.window, buffer.logs, buffer.outputs
    frame, drift, stale = buffer.frame, buffer.drift, buffer.stale
    row = label * _BLOCK
    row_logs = outputs.shape[0] // 2 + row
    top = _maximum(outputs, row_logs + output, new)
    begin = first if stale[label] else first + count - new
    high = _maximum(window, logs + begin, first + count - begin) - drift[label]
    if top > _HIGH or high > _HIGH:
        high = _maximum(window, logs + first, count) - drift[label]
        if high + top > 2 * _HIGH:
            stale[label] = True
            return False
        if high == -math.inf:
            shift = -top
        elif top == -math.inf:
            shift = high
        else:
            shift = (high - top) / 2
        frame[label] += shift
        drift[label] += shift
        for i in range(row_logs, row_logs + _BLOCK):
            outputs[i] += shift
        begin = first
    stale[label] = False
    rounded = -(-(first + count - begin) // LANES) * LANES
    factor_row(window, logs + begin, 0, 0, drift[label], begin, rounded)
    factor_row(outputs, row_logs + output, 0, 0, 0.0, row + output, -(-new // LANES) * LANES)
    return True


@helper
def _term_by_term(buffer, label, column, first, begin, end, window, direct):
    """Add the outputs ``[begin, end)`` of a label's block by their logarithms.

    `column` is the buffer index of the block's first source, `first` of the oldest.
    """
    longest = window.bias.shape[1] - 1
    offset = window.peak[label] + buffer.drift[label]
    for i in range(begin, end):
        log_output = buffer.output_logs[label * _BLOCK + i] - offset
        if log_output == -math.inf:
            continue
        newest = buffer.logs + column + i + 1
        for k in range(1, min(longest, column + i + 1 - first) + 1):
            x = buffer.window[newest - k] + window.bias[label, k] + log_output
            if x > _NEGLIGIBLE:
                direct[label, longest - k] += math.exp(min(x, 0.0))


@helper
def _correlate_pieces(buffer, label, column, first, begin, end, window, weighted, direct):
    """Add the outputs ``[begin, end)`` of a label's block to its correlation, in pieces.

    In pieces of `TILE`, within which exponents vary less than in the block; those that are still
    out of range, term by term.
    """
    longest = window.bias.shape[1] - 1
    tiled = -(-longest // TILE) * TILE
    for i in range(begin, end, TILE):
        new = min(TILE, end - i)
        if not _settle_frame(buffer, label, first, column + i + new - first, new, i):
            _term_by_term(buffer, label, column, first, i, i + new, window, direct)
            continue
        for q in range(0, longest, TILE):
            x, y, out = label * _BLOCK + i, column + i + 1 - longest + q, label * tiled + q
            multiply_tile(buffer.outputs, x, 1, buffer.window, y, 1, new, weighted, out)


@helper
def _correlate_with_jumps(buffer, label, column, first, steps, window, weighted, direct):
    """Add a label's block to its correlation, its sources dropping at every jump."""
    window_rows, logs, stale = buffer.window, buffer.logs, buffer.stale
    jumps = buffer.jumps[label * _BLOCK : (label + 1) * _BLOCK]
    begin = 0
    while begin < steps:
        count = column + begin + 1 - first
        if jumps[begin] == -math.inf:
            # No segment covers this position: none ends here, and its sources are done with.
            fill(window_rows, first, count, 0.0)
            fill(window_rows, logs + first, count, -math.inf)
            stale[label] = False
            first += count
            begin += 1
            continue
        if jumps[begin] != 0.0:
            add_to(window_rows, logs + first, count, jumps[begin])
            stale[label] = True
        end = begin + 1
        while end < steps and jumps[end] == 0.0:
            end += 1
        _correlate_pieces(buffer, label, column, first, begin, end, window, weighted, direct)
        begin = end


@helper
def _add_boundary(buffer, sequence, position, source, capacity, i):
    """Add the start and end scores of a position to its source and its output."""
    for c in range(buffer.frame.shape[0]):
        start, end = sequence.opening[position, c], sequence.closing[position, c]
        buffer.window[source + c * capacity] += start if start > NEG_INF else -math.inf
        buffer.output_logs[c * _BLOCK + i] += end if end > NEG_INF else -math.inf


@helper
def _note_jumps(buffer, scores, position, i):
    """Note the scores of a position that forbid or mask."""
    for c in range(buffer.frame.shape[0]):
        x = scores[position, c]
        if not abs(x) < _MASK:
            buffer.jumps[c * _BLOCK + i] = x if x > NEG_INF else -math.inf
            buffer.has_jump[c] = True


@helper
def _drop_oldest(buffer, num_labels, capacity, drop, keep):
    """Drop the oldest columns of the buffer, and the drifts."""
    for c in range(num_labels):
        drift = buffer.drift[c]
        buffer.drift[c] = 0.0
        for i in range(c * capacity, c * capacity + keep):
            buffer.window[i] = buffer.window[i + drop]
            buffer.window[buffer.logs + i] = buffer.window[buffer.logs + i + drop] - drift


@owning
def _new_buffer(num_labels, capacity):
    half = num_labels * capacity
    window = np.zeros(2 * half)
    fill(window, half, half, -math.inf)
    outputs = np.full(2 * num_labels * _BLOCK, -math.inf)
    jumps, frame, drift = np.zeros(num_labels * _BLOCK), np.zeros(num_labels), np.zeros(num_labels)
    has_jump, stale = np.zeros(num_labels, np.bool_), np.zeros(num_labels, np.bool_)
    output_logs = outputs[num_labels * _BLOCK :]
    return _Buffer(window, half, outputs, output_logs, jumps, has_jump, frame, drift, stale)


@owning
def duration_gradient(messages, begin, stop, sequence, window, gradient):
    """Add ``d log Z / d D`` of the segments that end in positions ``[begin, stop)``.

    Parameters
    ----------
    messages : Messages
    begin, stop : int
    sequence : Sequence
        Read forwards.
    window : Window
    gradient : float64 array of shape (K, C)
    """
    scores, has_boundary = sequence.scores, sequence.has_boundary
    num_labels = scores.shape[1]
    longest = window.bias.shape[1] - 1
    capacity = longest + _BLOCK * max(4, -(-longest // _BLOCK)) + TILE
    tiled = -(-longest // TILE) * TILE
    buffer = _new_buffer(num_labels, capacity)
    weighted = np.zeros(num_labels * tiled)  # by k descending, without the factor W
    direct = np.zeros((num_labels, longest))  # term by term, W included
    oldest = max(0, begin + 1 - longest)
    base = oldest - longest  # source of the buffer's first column
    # Taking an array out of a NamedTuple counts a reference, atomically: once, not per position.
    sources, logs, outputs, peak = buffer.window, buffer.logs, buffer.outputs, window.peak
    frame, drift, has_jump = buffer.frame, buffer.drift, buffer.has_jump
    gamma, beta = messages.gamma, messages.beta
    forward, backward = messages.forward, messages.backward
    length, offset, value = messages.length, messages.offset, messages.value
    row_logs = num_labels * _BLOCK

    for block in range(oldest, stop, _BLOCK):
        steps = min(_BLOCK, stop - block)
        if block + _BLOCK + TILE - base > capacity:
            _drop_oldest(buffer, num_labels, capacity, block - longest - base, longest)
            base = block - longest
        fill(outputs, row_logs, num_labels * _BLOCK, -math.inf)
        fill(buffer.jumps, 0, num_labels * _BLOCK, 0.0)
        fill(has_jump, 0, num_labels, False)
        for i in range(steps):
            p = block + i
            level = forward[p + 1] + backward[length - p - 1] - offset - value
            if p < begin:
                level = -math.inf
            whole = forward[p + 1] - forward[p]
            source = logs + p - base
            jump = False
            for c in range(num_labels):
                before = frame[c]
                x = scores[p, c]
                if abs(x) < _MASK:
                    after = before + x - whole
                else:
                    after = before - whole
                    jump = True
                frame[c] = after
                sources[source + c * capacity] = gamma[p, c] - before + drift[c]
                outputs[row_logs + i + c * _BLOCK] = beta[p, c] + after + peak[c] + level
            if jump:
                _note_jumps(buffer, scores, p, i)
            if has_boundary:
                _add_boundary(buffer, sequence, p, source, capacity, i)
        for c in range(num_labels):
            column = c * capacity + block - base
            first = column - min(longest, block - base)
            if has_jump[c]:
                _correlate_with_jumps(buffer, c, column, first, steps, window, weighted, direct)
            elif not _settle_frame(buffer, c, first, column + steps - first, steps, 0):
                _correlate_pieces(buffer, c, column, first, 0, steps, window, weighted, direct)
            elif block + steps > begin:
                for q in range(0, longest, TILE):
                    x, y, out = c * _BLOCK, column + 1 - longest + q, c * tiled + q
                    multiply_tile(outputs, x, 1, sources, y, 1, steps, weighted, out)
    for c in range(num_labels):
        for k in range(1, longest + 1):
            term = weighted[c * tiled + longest - k]
            if term != 0.0:
                term *= math.exp(window.bias[c, k] - window.peak[c])
            gradient[k - 1, c] += min(term + direct[c, longest - k], stop / k)


@inlined
def transition_factors(alpha, eta, position, free_start, level, work, source, sink, padded):
    """Write the two factors of one boundary; return the largest exponent of the second.

    The second factor carries all scales: beyond `_HIGH` it would overflow, and both
    rows still hold logarithms.
    """
    num_labels = alpha.shape[1]
    first = position == 0
    for c in range(num_labels):
        work[source + c] = 0.0 if first else alpha[position - 1, c]
        work[sink + c] = eta[position, c]
    for c in range(num_labels, padded):
        work[source + c] = -math.inf
        work[sink + c] = -math.inf
    top = max_row(work, source, 0, 0, 0.0, 0, padded)
    if top == -math.inf or (first and not free_start):
        for c in range(padded):
            work[source + c] = 0.0
            work[sink + c] = 0.0
        return -math.inf
    level += top
    highest = max_row(work, sink, 0, 0, 0.0, 0, padded) + level
    if not highest > _HIGH:
        exp_shifted_row(work, source, 0, 0, top, source, padded)
        exp_shifted_row(work, sink, 0, 0, -level, sink, padded)
    return highest


@helper
def _boundary_terms(messages, position, work, source, sink, transition, gradient):
    """Add one boundary to the gradient of the transitions by its logarithms."""
    level = _level(messages, position, position)
    for c_src in range(transition.shape[0]):
        for c in range(transition.shape[0]):
            x = work[source + c_src] + work[sink + c] + transition[c_src, c] + level
            if x > _NEGLIGIBLE:
                gradient[c_src, c] += math.exp(min(x, 0.0))


@owning
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
    alpha, eta = messages.alpha, messages.eta
    forward, backward = messages.forward, messages.backward
    length, offset, value = messages.length, messages.offset, messages.value
    for block in range(begin, stop, _BLOCK):
        steps = min(_BLOCK, stop - block)
        for i in range(steps):
            p = block + i
            source, sink = i * padded, sinks + i * padded
            level = forward[p] + backward[length - p] - offset - value + peak
            highest = transition_factors(
                alpha, eta, p, free_start, level, work, source, sink, padded
            )
            if highest > _HIGH:
                _boundary_terms(messages, p, work, source, sink, transition, gradient)
                fill(work, source, padded, 0.0)
                fill(work, sink, padded, 0.0)
        for c_src in range(num_labels):
            row = c_src * padded
            multiply_row(work, c_src, padded, work, sinks, padded, steps, total, row)
    for c_src in range(num_labels):
        for c in range(num_labels):
            value = total[c_src * padded + c]
            if value != 0.0:
                value *= math.exp(transition[c_src, c] - peak)
                gradient[c_src, c] = min(gradient[c_src, c] + value, float(stop - begin))

"""Boundary marginals and the gradient by the transitions without arithmetic in float64.

The same sums as in `boundary_gradient`, from the same messages, of float32 scores: logarithms are
fixed point, probabilities float32, matrix products float32 with float32 sums. What it leaves for
the gradient by the durations is packed. For sequences without deep scores whose numbers are in
range only; see `flash_semicrf.streaming.triton.static.apart`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.fixed import (
    DEAD,
    exp_fixed,
    fixed_log,
    fixed_message,
    fixed_of,
    pack,
)
from flash_semicrf.streaming.triton.log_rows import feasible
from flash_semicrf.streaming.triton.numerics import allowed, common_part, settled
from flash_semicrf.streaming.triton.static.apart import is_apart

__all__ = ["narrow_boundary_kernel"]

# Largest log of what scaling leaves: underflow then drops less than 2^-60.
_STEEP = tl.constexpr(60 << 32)

# Below what is live, above what has DEAD in its sum.
_LIVE = tl.constexpr(-(1 << 59))


@triton.jit
def _level(x):
    """Largest of each row, 0 where nothing is live."""
    top = tl.max(x, 1)
    return tl.where(top > _LIVE, top, 0)


@triton.jit
def _probability(x):
    """2^x, at most 1."""
    return exp_fixed(tl.minimum(x, 0))


@triton.jit
def _row(row_ptr, C, label):
    """Logarithms of a row of labels, float64 in memory."""
    x = tl.load(row_ptr + label)
    return tl.where(allowed(x), fixed_of(x), DEAD)


@triton.jit
def _raw(row_ptr, row, inside, C, label):
    value = tl.load(row_ptr + row * C + label, mask=inside, other=0.0)
    return value


@triton.jit
def _has_logs(x, y):
    """Whether a row of one of two tiles of messages is in logarithms."""
    bits = x.to(tl.int64, bitcast=True) | y.to(tl.int64, bitcast=True)
    return tl.min(tl.min((bits >> 32).to(tl.int32), 1), 0) < 0


@triton.jit
def _products(alpha, eta, free, weights, transposed, level, PAIRS, CP):
    """Start and end marginals of a tile and its sum for the gradient by A, as matrix products.

    As in `boundary_gradient`.
    """
    source = exp_fixed(tl.where(free, 0, alpha - _level(alpha)[:, None]))
    target = exp_fixed(eta + (level - _level(eta))[:, None])
    start = tl.dot(source, weights, input_precision="ieee") * target
    end = tl.dot(target, transposed, input_precision="ieee") * source
    part = tl.zeros([CP, CP], tl.float32)
    if PAIRS:
        part = tl.dot(tl.trans(source), target, input_precision="ieee")
    return start, end, part


@triton.jit
def _column(row_ptr, offset_ptr, row, other, inside, C):
    value = tl.load(row_ptr + row * C + other, mask=inside, other=0.0)
    return fixed_message(value, True) + fixed_of(tl.load(offset_ptr + row, mask=inside, other=0.0))


@triton.jit
def _term_by_term(
    alpha, eta, log_z, rows, matrix_ptr, pairs_ptr, begin, length, C, HAS_INITIAL, CP, TT
):
    """Start and end marginals of a tile by C² exponentials a row; adds to the gradient by A."""
    forward_ptr, offset_ptr, backward_ptr, backward_offset_ptr = rows
    label = tl.arange(0, CP)[None, :]
    column = begin + tl.arange(0, TT)
    start = tl.zeros([TT, CP], tl.float32)
    end = tl.zeros([TT, CP], tl.float32)
    for other in range(C):
        # `other` as the source: its message is a column.
        inside = (column > 0) & (column < length)
        source = _column(forward_ptr, offset_ptr, column - 1, other, inside, C)
        if not HAS_INITIAL:
            source = tl.where(column == 0, 0, source)
        row = _row(matrix_ptr + other * CP, C, label)
        x = _probability(source[:, None] + row + eta - log_z)
        start += x
        if pairs_ptr is not None:
            place = pairs_ptr + other * C + tl.arange(0, CP)
            total = tl.sum(x, 0) + tl.load(place, mask=tl.arange(0, CP) < C, other=0.0)
            tl.store(place, total, mask=tl.arange(0, CP) < C)
        # `other` as the target.
        target = _column(backward_ptr, backward_offset_ptr, column, other, inside, C)
        row = _row(matrix_ptr + CP * CP + other * CP, C, label)
        end += _probability(alpha + row + target[:, None] - log_z)
    return start, end


@triton.jit
def _running_scores(scores_ptr, prefix_ptr, t, length, C, label):
    """Sum of the scores before each position of a tile."""
    inside = (t < length) & (label < C)
    x = tl.load(scores_ptr + t * C + label, mask=inside, other=float("-inf"))
    top = tl.max(x, 1)[:, None]
    counted = allowed(x)
    own = fixed_of(x)
    if tl.max(tl.max(tl.abs(common_part(top)), 1), 0) > 0.0:
        own = fixed_of(settled(x, top))
    own = tl.where(counted, own, 0)
    prefix = fixed_of(tl.load(prefix_ptr + label, mask=label < C, other=0.0))
    return prefix + tl.cumsum(own, 0) - own


@labels_last
@triton.jit
def narrow_boundary_kernel(
    problem,
    matrix_ptr,
    first_ptr,
    messages,
    apart_ptr,
    to,
    started_ptr,
    tiles,
    HAS_INITIAL,
    WANT_DURATION,
    DOT,
    CP,
    TT,
):
    """As `boundary_kernel`, of the sequences that are not apart, which it leaves alone.

    The parts for the transitions are float32. h and u come packed, in the memory of the messages.
    `started` (B, chunks, C) gets the total of the starts.
    """
    WANT_TRANSITION: tl.constexpr = to.transition is not None
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    T, C = problem.sizes.T, problem.sizes.C
    label = tl.arange(0, CP)[None, :]
    length, wide_log_z = feasible(problem.sizes, messages.log_z, b)
    log_z = fixed_of(wide_log_z)
    mine = is_apart(apart_ptr, b) == 0
    rows = b * T
    scores_ptr = problem.scores + rows * C
    forward_ptr = messages.forward + rows * C
    backward_ptr = messages.backward + rows * C
    offset_ptr = messages.offset + rows
    backward_offset_ptr = offset_ptr + tl.num_programs(1) * T
    m = forward_ptr, offset_ptr, backward_ptr, backward_offset_ptr
    pairs_ptr = None
    running = tl.zeros([CP], tl.float64)
    started = tl.zeros([CP], tl.float64)
    pairs = tl.zeros([CP, CP], tl.float32)
    weights = pairs
    transposed = pairs
    peak = tl.zeros([], tl.int64)
    square = tl.arange(0, CP)[:, None] * CP + tl.arange(0, CP)[None, :]
    if DOT:
        matrix = _row(matrix_ptr, C, square)
        peak = tl.max(_level(matrix), 0)
        weights = exp_fixed(matrix - peak)
        transposed = exp_fixed(_row(matrix_ptr + CP * CP, C, square) - peak)
    if WANT_TRANSITION:
        pairs_ptr = to.transition + (b * tl.num_programs(0) + chunk) * C * C
        cell = pairs_ptr + tl.arange(0, CP)[:, None] * C + tl.arange(0, CP)[None, :]
        within = (tl.arange(0, CP)[:, None] < C) & (tl.arange(0, CP)[None, :] < C) & mine
        tl.store(cell, pairs, mask=within)
        tl.debug_barrier()

    for tile in range(tl.where(mine, tiles, 0)):
        begin = (chunk * tiles + tile) * TT
        t = begin + tl.arange(0, TT)[:, None]
        starts_here = (t < length) & (label < C)
        ends_here = (t > 0) & (t <= length) & (label < C)
        eta_value = _raw(backward_ptr, t, starts_here, C, label)
        alpha_value = _raw(forward_ptr, t - 1, ends_here, C, label)
        eta = fixed_message(eta_value, False)
        alpha = fixed_message(alpha_value, False)
        if _has_logs(eta_value, alpha_value):
            eta = fixed_message(eta_value, True)
            alpha = fixed_message(alpha_value, True)
        eta += fixed_of(tl.load(backward_offset_ptr + t, mask=t < length, other=0.0))
        here = (t > 0) & (t <= length)
        alpha += fixed_of(tl.load(offset_ptr + t - 1, mask=here, other=0.0))
        level = _level(eta) + _level(alpha) + peak - log_z
        if DOT and tl.max(level, 0) < _STEEP:
            free = (t == 0) & (label < C)
            if HAS_INITIAL:
                free = free & (t < 0)
            start, end, part = _products(
                alpha, eta, free, weights, transposed, level, WANT_TRANSITION, CP
            )
            if WANT_TRANSITION:
                pairs += part
        else:
            start, end = _term_by_term(
                alpha,
                eta,
                log_z,
                m,
                matrix_ptr,
                pairs_ptr,
                begin,
                length,
                C,
                HAS_INITIAL,
                CP,
                TT,
            )
        start = tl.where(starts_here, start, 0.0)
        end = tl.where(ends_here & (t < length), end, 0.0)
        if HAS_INITIAL:
            x = _probability(_row(first_ptr, C, label) + eta - log_z)
            start = tl.where((t == 0) & starts_here, x, start)
        x = _probability(alpha + _row(first_ptr + CP, C, label) - log_z)
        end = tl.where((t == length) & ends_here, x, end)
        start, end = tl.minimum(start, 1.0), tl.minimum(end, 1.0)

        net = tl.cumsum(start - end, 0) + running.to(tl.float32)[None, :]
        running += tl.sum(start - end, 0).to(tl.float64)
        started += tl.sum(start, 0).to(tl.float64)
        place = (rows + t) * C + label
        inside = (t < T) & (label < C)
        position = tl.where(t < length, net, 0.0)
        if tl.num_programs(0) == 1:
            position = tl.minimum(tl.maximum(position, 0.0), 1.0)
        tl.store(to.position + place, position, mask=inside)
        own = b * C + label + tl.zeros_like(t)
        tl.store(to.initial + own, start, mask=(t == 0) & (label < C))
        tl.store(to.final + own, end, mask=(t == length) & (label < C))
        if to.start is not None:
            tl.store(to.start + place, start, mask=inside)
            tl.store(to.end + place - C, end, mask=(t > 0) & (t <= T) & (label < C))
        if WANT_DURATION:
            blocks = T // TT + 2
            block = b * blocks + tl.minimum(begin // TT, blocks - 1)
            prefix = _running_scores(scores_ptr, messages.prefix + block * C, t, length, C, label)
            h = fixed_log(tl.where(start > 0, start, 1.0)) + log_z - eta - prefix
            u = fixed_log(tl.where(end > 0, end, 1.0)) + log_z - alpha + prefix
            if problem.start is not None:
                h += fixed_of(tl.load(problem.start + place, mask=starts_here, other=0.0))
                u += fixed_of(tl.load(problem.end + place - C, mask=ends_here, other=0.0))
            tl.debug_barrier()
            h = pack(tl.where(start > 0, h, DEAD)).to(tl.float64, bitcast=True)
            u = pack(tl.where(end > 0, u, DEAD)).to(tl.float64, bitcast=True)
            tl.store(backward_ptr + t * C + label, h, mask=inside)
            tl.store(forward_ptr + (t - 1) * C + label, u, mask=(t > 0) & (t <= T) & (label < C))
    if WANT_TRANSITION and DOT:
        tl.debug_barrier()
        total = pairs * weights + tl.load(cell, mask=within, other=0.0)
        tl.store(cell, total, mask=within)
    if tl.num_programs(0) > 1:
        place = (b * tl.num_programs(0) + chunk) * C + tl.arange(0, CP)
        live = (tl.arange(0, CP) < C) & mine
        tl.store(to.carry + place, running, mask=live)
        tl.store(started_ptr + place, started, mask=live)

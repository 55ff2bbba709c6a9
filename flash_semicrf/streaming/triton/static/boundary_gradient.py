"""Boundary marginals and the gradient by the transitions, from the messages of both passes.

With Z the partition function of the sequence, at every boundary t

    P(c' ends and c starts at t) = exp(alpha_t(c') + A[c', c] + eta_t(c) - log Z)

Summed over c' it is the start marginal, over c the end marginal, over t the gradient by A. The
running sum of starts less ends is the position marginal. The kernel then replaces the messages by
what the gradient by the durations reads: log beta = log P(end) + log Z - alpha, and gamma likewise,
which is exact wherever it matters. Every term is a probability: no range is too wide, and there
are no atomics, so results repeat bit by bit. Cost T C²: three matrix products on the float64 units,
or term by term in tiles whose range is too wide for those.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.log_rows import feasible
from flash_semicrf.streaming.triton.numerics import (
    allowed,
    decode_log,
    exp_wide,
    finite,
    is_deep,
    probability,
    settled,
    wide,
)
from flash_semicrf.streaming.triton.static.apart import is_apart

__all__ = ["Marginals", "apart_boundary_kernel", "boundary_kernel"]

_STEEP = tl.constexpr(300.0)


class Marginals(NamedTuple):
    """Output of `boundary_kernel`."""

    position: Tensor  # (B, T, C): running sums of starts less ends from the chunk's start on
    start: Tensor | None  # (B, T, C)
    end: Tensor | None
    carry: Tensor  # (B, chunks, C): total of `position`
    transition: Tensor | None  # (B, chunks, C, C): the chunk's part
    initial: Tensor  # (B, C)
    final: Tensor


@triton.jit
def _messages(row_ptr, offset_ptr, row, inside, C, label):
    value = tl.load(row_ptr + row * C + label, mask=inside, other=0.0)
    return decode_log(value) + tl.load(offset_ptr + row, mask=row >= 0, other=0.0)


@triton.jit
def _products(alpha, eta, free, weights, transposed, level, WANT_TRANSITION, CP):
    """Start and end marginals of a tile and its sum for the gradient by A, as matrix products.

    Rows are scaled by their largest alpha and eta; `level` is the log of what that leaves, so with
    level < _STEEP all that underflow drops is below e^(_STEEP - 708), a probability of nothing.
    """
    source = tl.where(free, 0.0, alpha - finite(tl.max(alpha, 1))[:, None])
    source = exp_wide(source)
    target = exp_wide(eta + (level - finite(tl.max(eta, 1)))[:, None])
    start = tl.dot(source, weights, out_dtype=tl.float64) * target
    end = tl.dot(target, transposed, out_dtype=tl.float64) * source
    part = tl.zeros([CP, CP], tl.float64)
    if WANT_TRANSITION:
        part = tl.dot(tl.trans(source), target, out_dtype=tl.float64)
    return start, end, part


@triton.jit
def _column(row_ptr, offset_ptr, row, other, inside, C):
    value = tl.load(row_ptr + row * C + other, mask=inside, other=0.0)
    return decode_log(value) + tl.load(offset_ptr + row, mask=inside, other=0.0)


@triton.jit
def _term_by_term(
    alpha, eta, log_z, rows, matrix_ptr, pairs_ptr, begin, length, C, HAS_INITIAL, CP, TT
):
    """Start and end marginals of a tile by C² exponentials a row; adds to the gradient by A."""
    forward_ptr, offset_ptr, backward_ptr, backward_offset_ptr = rows
    label = tl.arange(0, CP)[None, :]
    column = begin + tl.arange(0, TT)
    start = tl.zeros([TT, CP], tl.float64)
    end = tl.zeros([TT, CP], tl.float64)
    for other in range(C):
        # `other` as the source: its message is a column.
        inside = (column > 0) & (column < length)
        source = _column(forward_ptr, offset_ptr, column - 1, other, inside, C)
        if not HAS_INITIAL:
            source = tl.where(column == 0, 0.0, source)
        row = tl.load(matrix_ptr + other * CP + label)
        x = probability(source[:, None] + row + eta - log_z)
        start += x
        if pairs_ptr is not None:
            place = pairs_ptr + other * C + tl.arange(0, CP)
            total = tl.sum(x, 0) + tl.load(place, mask=tl.arange(0, CP) < C, other=0.0)
            tl.store(place, total, mask=tl.arange(0, CP) < C)
        # `other` as the target.
        target = _column(backward_ptr, backward_offset_ptr, column, other, inside, C)
        row = tl.load(matrix_ptr + CP * CP + other * CP + label)
        end += probability(alpha + row + target[:, None] - log_z)
    return start, end


@triton.jit
def _fill(
    problem, matrix_ptr, first_ptr, messages, to, tiles, HAS_INITIAL, WANT_DURATION, DOT, CP, TT
):
    """See `boundary_kernel`."""
    WANT_TRANSITION: tl.constexpr = to.transition is not None
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    T, C = problem.sizes.T, problem.sizes.C
    label = tl.arange(0, CP)[None, :]
    # Where nothing is feasible every gradient is zero: as if the sequence had no positions.
    length, log_z = feasible(problem.sizes, messages.log_z, b)
    last = tl.load(first_ptr + CP + label)
    rows = b * T
    scores_ptr = problem.scores + rows * C
    forward_ptr = messages.forward + rows * C
    backward_ptr = messages.backward + rows * C
    offset_ptr = messages.offset + rows
    backward_offset_ptr = offset_ptr + tl.num_programs(1) * T
    m = forward_ptr, offset_ptr, backward_ptr, backward_offset_ptr
    pairs_ptr = None
    running = tl.zeros([CP], tl.float64)
    pairs = tl.zeros([CP, CP], tl.float64)
    weights = pairs
    transposed = pairs
    peak = 0.0
    square = tl.arange(0, CP)[:, None] * CP + tl.arange(0, CP)[None, :]
    if DOT:
        matrix = tl.load(matrix_ptr + square)
        peak = finite(tl.max(tl.max(matrix, 1), 0))
        weights = exp_wide(matrix - peak)
        transposed = exp_wide(tl.load(matrix_ptr + CP * CP + square) - peak)
    if WANT_TRANSITION:
        pairs_ptr = to.transition + (b * tl.num_programs(0) + chunk) * C * C
        cell = pairs_ptr + tl.arange(0, CP)[:, None] * C + tl.arange(0, CP)[None, :]
        within = (tl.arange(0, CP)[:, None] < C) & (tl.arange(0, CP)[None, :] < C)
        tl.store(cell, pairs, mask=within)
        tl.debug_barrier()

    for tile in range(tiles):
        begin = (chunk * tiles + tile) * TT
        t = begin + tl.arange(0, TT)[:, None]
        starts_here = (t < length) & (label < C)
        ends_here = (t > 0) & (t <= length) & (label < C)
        eta = _messages(backward_ptr, backward_offset_ptr, t, starts_here, C, label)
        alpha = _messages(forward_ptr, offset_ptr, t - 1, ends_here, C, label)
        level = finite(tl.max(eta, 1)) + finite(tl.max(alpha, 1)) + peak - log_z
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
            x = probability(tl.load(first_ptr + label) + eta - log_z)
            start = tl.where((t == 0) & starts_here, x, start)
        x = probability(alpha + last - log_z)
        end = tl.where((t == length) & ends_here, x, end)
        start, end = tl.minimum(start, 1.0), tl.minimum(end, 1.0)

        net = tl.cumsum(start - end, 0) + running[None, :]
        running += tl.sum(start - end, 0)
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
            prefix = tl.load(messages.prefix + block * C + label, mask=label < C, other=0.0)
            inner = (t < length) & (label < C)
            x = tl.load(scores_ptr + t * C + label, mask=inner, other=float("-inf"))
            top = tl.max(x, 1)[:, None]
            counted = allowed(x) & (is_deep(x, top) == 0)
            x = tl.where(counted, settled(x, top), 0.0)
            # The sum up to and including position t, less that of t itself.
            prefix = prefix + tl.cumsum(x, 0) - x
            h = tl.log(tl.where(start > 0, start, 1.0)) + log_z - eta - prefix
            u = tl.log(tl.where(end > 0, end, 1.0)) + log_z - alpha + prefix
            if problem.start is not None:
                h += wide(tl.load(problem.start + place, mask=starts_here, other=0.0))
                u += wide(tl.load(problem.end + place - C, mask=ends_here, other=0.0))
            tl.debug_barrier()
            h = tl.where(start > 0, h, float("-inf"))
            u = tl.where(end > 0, u, float("-inf"))
            tl.store(backward_ptr + t * C + label, h, mask=inside)
            tl.store(forward_ptr + (t - 1) * C + label, u, mask=(t > 0) & (t <= T) & (label < C))
    if WANT_TRANSITION and DOT:
        tl.debug_barrier()
        total = pairs * weights + tl.load(cell, mask=within, other=0.0)
        tl.store(cell, total, mask=within)
    if tl.num_programs(0) > 1:
        place = (b * tl.num_programs(0) + chunk) * C + tl.arange(0, CP)
        tl.store(to.carry + place, running, mask=tl.arange(0, CP) < C)


@labels_last
@triton.jit
def boundary_kernel(
    problem, matrix_ptr, first_ptr, messages, to, tiles, HAS_INITIAL, WANT_DURATION, DOT, CP, TT
):
    """Boundaries ``[chunk * tiles * TT, (chunk + 1) * tiles * TT)``; program (chunk, b).

    Fills `to`. If WANT_DURATION, row t-1 of the forward messages becomes u_t, row s of the backward
    messages h_s. float64 inside.
    """
    _fill(
        problem, matrix_ptr, first_ptr, messages, to, tiles, HAS_INITIAL, WANT_DURATION, DOT, CP, TT
    )


@labels_last
@triton.jit
def apart_boundary_kernel(
    problem,
    matrix_ptr,
    first_ptr,
    messages,
    apart_ptr,
    to,
    tiles,
    HAS_INITIAL,
    WANT_DURATION,
    DOT,
    CP,
    TT,
):
    """`boundary_kernel` of the sequences that are apart."""
    if is_apart(apart_ptr, tl.program_id(1).to(tl.int64)):
        _fill(
            problem,
            matrix_ptr,
            first_ptr,
            messages,
            to,
            tiles,
            HAS_INITIAL,
            WANT_DURATION,
            DOT,
            CP,
            TT,
        )

"""Derivatives of the expected counts of durations and transitions, for static transitions.

    d E[count of D_k(c)]   = sum_s P([s, s+k) of c) (d h_s(c) + dD_k(c) + d u_{s+k}(c) - d log Z)
    d E[count of A[c', c]] = sum_s P(c', c at s) (d alpha_s(c') + dA[c', c] + d eta_s(c) - d log Z)

with h = gamma + source, u = sink + beta. Every factor P is one exponential; sums over chunks of
positions are written apart, without atomics; float64. For duration tails, with G and Q of
`by_duration.passes`,

    d E[positions beyond the K-th] = sum_t P(G_t, Q_t) (d G_t(c) + d Q_t(c) - d log Z)

Kernels take the state and that of the derivatives, d; `d.messages.log_z` (B,) is d log Z. In the
messages of both, the kernels of durations and of tails have h in place of gamma and u of beta.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    either,
    feasible,
    lengthen,
    load_finite,
    load_row,
)
from flash_semicrf.streaming.triton.numerics import exp_wide, wide
from flash_semicrf.streaming.triton.prefixes import rows_from

__all__ = ["duration_tangent_kernel", "tail_tangent_kernel", "transition_tangent_kernel"]


@triton.jit
def _counted(core_ptr, b, begin, span, length):
    """Bounds of what a chunk from `begin` on counts, of sequence b."""
    stop = tl.minimum(begin + span, length)
    if core_ptr is not None:
        begin = tl.maximum(begin, tl.load(core_ptr + 2 * b).to(tl.int32))
        stop = tl.minimum(stop, tl.load(core_ptr + 2 * b + 1).to(tl.int32))
    return begin, stop


@triton.jit
def duration_tangent_kernel(state, d, sizes, core_ptr, found_ptr, span, CP, TT):
    """Duration k, starts in one chunk of `span` positions: row of `found` (B, chunks, K, C).

    Only starts inside `core` (B, 2) count, if given. Program (k - 1, chunk, b).
    """
    T, C, K = sizes.T, sizes.C, sizes.K
    p, q = state.prefixes, d.prefixes
    h_ptr, u_ptr = state.messages.gamma, state.messages.beta
    k = tl.program_id(0) + 1
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    label = tl.arange(0, CP)[None, :]
    length, log_z = feasible(sizes, state.messages.log_z, b)
    mean = tl.load(d.messages.log_z + b)
    base = b * (T + 1) * C
    bias = load_row(state.parameters.bias + (k - 1) * C, label, C) - log_z
    d_bias = load_finite(d.parameters.bias + (k - 1) * C, label, C) - mean
    begin, stop = _counted(core_ptr, b, chunk * span, span, length)
    total = tl.zeros([CP], tl.float64)
    for first in range(begin, tl.minimum(stop, length + 1 - k), TT):
        s = first + tl.arange(0, TT)[:, None]
        live = (s < stop) & (s + k <= length) & (label < C)
        row = base + s * C + label
        to = row + k * C
        live = live & (s >= tl.load(p.born + to, mask=live, other=0))
        x = tl.load(h_ptr + row, mask=live, other=float("-inf")) + bias
        x += tl.load(u_ptr + to, mask=live, other=float("-inf"))
        # First the difference: it is 0 where no deep score is inside, whatever was before.
        before = tl.load(p.deep + row, mask=live, other=0.0)
        x += tl.load(p.deep + to, mask=live, other=0.0) - before
        dx = tl.load(d.messages.gamma + row, mask=live, other=0.0) + d_bias
        dx += tl.load(d.messages.beta + to, mask=live, other=0.0)
        before = tl.load(q.deep + row, mask=live, other=0.0)
        dx += tl.load(q.deep + to, mask=live, other=0.0) - before
        total += tl.sum(tl.where(live, exp_wide(x) * dx, 0.0), 0)
    place = ((b * tl.num_programs(1) + chunk) * K + k - 1) * C + tl.arange(0, CP)
    tl.store(found_ptr + place, total, mask=tl.arange(0, CP) < C)


@triton.jit
def transition_tangent_kernel(state, d, sizes, core_ptr, found_ptr, span, CP, SOURCES):
    """SOURCES rows of A, boundaries in one chunk of `span`: rows of `found` (B, chunks, C, C).

    Program (tile of sources, chunk, b). From boundary 1 on: the first segment has its own term.
    Only boundaries inside `core` (B, 2) count, if given, its end excluded.
    """
    T, C = sizes.T, sizes.C
    m, dm = state.messages, d.messages
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    source = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    label = tl.arange(0, CP)
    inside = (source < C)[:, None] & (label < C)[None, :]
    length, log_z = feasible(sizes, state.messages.log_z, b)
    mean = tl.load(d.messages.log_z + b)
    base = b * (T + 1) * C
    place = source[:, None] * C + label[None, :]
    matrix = (
        wide(tl.load(state.parameters.transition + place, mask=inside, other=float("-inf"))) - log_z
    )
    d_matrix = tl.load(d.parameters.transition + place, mask=inside, other=0.0) - mean
    begin, stop = _counted(core_ptr, b, chunk * span, span, length)
    total = tl.zeros([SOURCES, CP], tl.float64)
    for t in range(tl.maximum(begin, 1), stop):
        row = base + t * C
        alpha = tl.load(m.alpha + row + source, mask=source < C, other=float("-inf"))
        eta = tl.load(m.eta + row + label, mask=label < C, other=float("-inf"))
        dx = d_matrix + tl.load(dm.alpha + row + source, mask=source < C, other=0.0)[:, None]
        dx += tl.load(dm.eta + row + label, mask=label < C, other=0.0)[None, :]
        total += exp_wide(matrix + alpha[:, None] + eta[None, :]) * dx
    place += (b * tl.num_programs(1) + chunk) * C * C
    tl.store(found_ptr + place, total, mask=inside)


@triton.jit
def tail_tangent_kernel(state, d, sizes, found_ptr, CP):
    """Row of `found` (B, C), by the recurrence of Q from the end on; program (b,)."""
    C = sizes.C
    m, dm = state.messages, d.messages
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length, log_z = feasible(sizes, state.messages.log_z, b)
    mean = tl.load(d.messages.log_z + b)
    base = b * (sizes.T + 1) * C
    p, q = rows_from(state.prefixes, base), rows_from(d.prefixes, base)
    tail = load_row(state.parameters.tail, label, C)
    d_tail = load_finite(d.parameters.tail, label, C)
    onward = tl.full([CP], float("-inf"), tl.float64)
    d_onward = tl.zeros([CP], tl.float64)
    total = tl.zeros([CP], tl.float64)
    for i in range(length):
        t = length - i
        row = base + t * C
        d_u = load_finite(dm.beta + row, label, C)
        onward, d_onward = either(onward, d_onward, load_row(m.beta + row, label, C), d_u)
        longer = tl.load(m.longer + row + label, mask=inside, other=float("-inf"))
        dx = load_finite(dm.longer + row, label, C) + d_onward - mean
        total += exp_wide(longer + onward - log_z) * dx
        onward = lengthen(onward, tail, p, t, label, C)
        d_onward += d_tail + deep_content(q.deep, t - 1, t, label, C)
    tl.store(found_ptr + b * C + label, total, mask=inside)

"""Derivatives of the expected counts of durations and transitions, for static transitions.

    d E[count of D_k(c)]   = sum_s P([s, s+k) of c) (d h_s(c) + dD_k(c) + d u_{s+k}(c) - d log Z)
    d E[count of A[c', c]] = sum_s P(c', c at s) (d alpha_s(c') + dA[c', c] + d eta_s(c) - d log Z)

with h = gamma + source, u = sink + beta. Every factor P is one exponential; sums over chunks of
positions are written apart, without atomics; float64. For duration tails, with G and Q of
`by_duration`,

    d E[positions beyond the K-th] = sum_t P(G_t, Q_t) (d G_t(c) + d Q_t(c) - d log Z)
"""

from __future__ import annotations

import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.log_rows import deep_content, lengthen, load_row
from flash_semicrf.streaming.triton.numerics import exp_wide, wide
from flash_semicrf.streaming.triton.static.tangent_passes import either

__all__ = ["duration_tangent_kernel", "tail_tangent_kernel", "transition_tangent_kernel"]


@kernel
def duration_tangent_kernel(
    bias_ptr, d_bias_ptr, lengths_ptr, log_z_ptr, mean_ptr, h_ptr, u_ptr, deep_ptr, born_ptr,
    d_h_ptr, d_u_ptr, d_deep_ptr, found_ptr, T, C, K, span, CP: tl.constexpr, TT: tl.constexpr,
):  # fmt: skip
    """Duration k, starts in one chunk of `span` positions: row of `found` (B, chunks, K, C).

    Program (k - 1, chunk, b); `mean` (B,) is d log Z.
    """
    k = tl.program_id(0) + 1
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    label = tl.arange(0, CP)[None, :]
    log_z = tl.load(log_z_ptr + b)
    mean = tl.load(mean_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    term = (k - 1) * C + label
    bias = wide(tl.load(bias_ptr + term, mask=label < C, other=float("-inf"))) - log_z
    d_bias = tl.load(d_bias_ptr + term, mask=label < C, other=0.0) - mean
    begin = chunk * span
    total = tl.zeros([CP], tl.float64)
    for first in range(begin, tl.minimum(begin + span, length + 1 - k), TT):
        s = first + tl.arange(0, TT)[:, None]
        live = (s < begin + span) & (s + k <= length) & (label < C)
        row = base + s * C + label
        to = row + k * C
        live = live & (s >= tl.load(born_ptr + to, mask=live, other=0))
        x = tl.load(h_ptr + row, mask=live, other=float("-inf")) + bias
        x += tl.load(u_ptr + to, mask=live, other=float("-inf"))
        # First the difference: it is 0 where no deep score is inside, whatever was before.
        before = tl.load(deep_ptr + row, mask=live, other=0.0)
        x += tl.load(deep_ptr + to, mask=live, other=0.0) - before
        d = tl.load(d_h_ptr + row, mask=live, other=0.0) + d_bias
        d += tl.load(d_u_ptr + to, mask=live, other=0.0)
        before = tl.load(d_deep_ptr + row, mask=live, other=0.0)
        d += tl.load(d_deep_ptr + to, mask=live, other=0.0) - before
        total += tl.sum(tl.where(live, exp_wide(x) * d, 0.0), 0)
    place = ((b * tl.num_programs(1) + chunk) * K + k - 1) * C + tl.arange(0, CP)
    tl.store(found_ptr + place, total, mask=tl.arange(0, CP) < C)


@kernel
def transition_tangent_kernel(
    transition_ptr, d_transition_ptr, lengths_ptr, log_z_ptr, mean_ptr, alpha_ptr, eta_ptr,
    d_alpha_ptr, d_eta_ptr, found_ptr, T, C, span, CP: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """SOURCES rows of A, boundaries in one chunk of `span`: rows of `found` (B, chunks, C, C).

    Program (tile of sources, chunk, b). From boundary 1 on: the first segment has its own term.
    """
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    source = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    label = tl.arange(0, CP)
    inside = (source < C)[:, None] & (label < C)[None, :]
    log_z = tl.load(log_z_ptr + b)
    mean = tl.load(mean_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    place = source[:, None] * C + label[None, :]
    matrix = wide(tl.load(transition_ptr + place, mask=inside, other=float("-inf"))) - log_z
    d_matrix = tl.load(d_transition_ptr + place, mask=inside, other=0.0) - mean
    begin = chunk * span
    total = tl.zeros([SOURCES, CP], tl.float64)
    for t in range(tl.maximum(begin, 1), tl.minimum(begin + span, length)):
        row = base + t * C
        alpha = tl.load(alpha_ptr + row + source, mask=source < C, other=float("-inf"))
        eta = tl.load(eta_ptr + row + label, mask=label < C, other=float("-inf"))
        d = d_matrix + tl.load(d_alpha_ptr + row + source, mask=source < C, other=0.0)[:, None]
        d += tl.load(d_eta_ptr + row + label, mask=label < C, other=0.0)[None, :]
        total += exp_wide(matrix + alpha[:, None] + eta[None, :]) * d
    place += (b * tl.num_programs(1) + chunk) * C * C
    tl.store(found_ptr + place, total, mask=inside)


@kernel
def tail_tangent_kernel(
    lengths_ptr, log_z_ptr, mean_ptr, u_ptr, deep_ptr, born_ptr, longer_ptr, tail_ptr,
    d_u_ptr, d_deep_ptr, d_longer_ptr, d_tail_ptr, found_ptr, T, C, CP: tl.constexpr,
):  # fmt: skip
    """Row of `found` (B, C), by the recurrence of Q from the end on; program (b,)."""
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    log_z = tl.load(log_z_ptr + b)
    mean = tl.load(mean_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    deep_ptr += base
    born_ptr += base
    d_deep_ptr += base
    tail = load_row(tail_ptr, label, C)
    d_tail = tl.load(d_tail_ptr + label, mask=inside, other=0.0)
    onward = tl.full([CP], float("-inf"), tl.float64)
    d_onward = tl.zeros([CP], tl.float64)
    total = tl.zeros([CP], tl.float64)
    for i in range(length):
        t = length - i
        row = base + t * C + label
        u = load_row(u_ptr + base + t * C, label, C)
        d_u = tl.load(d_u_ptr + row, mask=inside, other=0.0)
        onward, d_onward = either(onward, d_onward, u, d_u)
        longer = tl.load(longer_ptr + row, mask=inside, other=float("-inf"))
        d = tl.load(d_longer_ptr + row, mask=inside, other=0.0) + d_onward - mean
        total += exp_wide(longer + onward - log_z) * d
        onward = lengthen(onward, tail, deep_ptr, born_ptr, t, label, C)
        d_onward += d_tail + deep_content(d_deep_ptr, t - 1, t, label, C)
    tl.store(found_ptr + b * C + label, total, mask=inside)

"""Kernels for transitions by duration, A_k[c', c]: the plain recurrences at cost T·K·C².

    alpha_t(c)  = S_t(c) + end_{t-1}(c) + LSE_{k, c'} [alpha_{t-k}(c') + A_k[c', c] + e_{t-k, k}(c)]
    beta_s(c')  = LSE_{k, c} [A_k[c', c] + e_{s, k}(c) + u_{s+k}(c)]
    e_{s, k}(c) = D_k(c) + start_s(c) - S_s(c),    u_t(c) = beta_t(c) + S_t(c) + end_{t-1}(c)

over the segments that no forbidden position cuts; alpha_0 = 0, or the initial scores (K, C) in
place of the transition term. Messages are float64 logarithms in rows 0..T. Gradients sum

    P([s, s+k) of label c after c')
        = exp(alpha_s(c') + A_k[c', c] + e_{s, k}(c) + u_{s+k}(c) - log Z)

in parallel kernels, without atomics. A duration tail takes two recurrences more, at O(C): over the
segments longer than K that end at t, and over what may follow K or more positions of a segment,

    G_t(c) = tail(c) + deep_t(c) - deep_{t-1}(c) + LSE [G_{t-1}(c), the term of duration K at t-1]
    Q_t(c) = LSE [u_t(c), tail(c) + deep_{t+1}(c) - deep_t(c) + Q_{t+1}(c)]

-inf past a forbidden position; like e they leave the running scores S to the boundaries. G_t is one
more term of alpha_t, and Q takes the place of u at duration K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    lengthen,
    load_row,
    load_transition,
    log_add,
    sum_over,
)
from flash_semicrf.streaming.triton.numerics import probability

__all__ = [
    "duration_pass_kernel",
    "duration_start_kernel",
    "duration_terms_kernel",
    "gamma_row",
    "onward_row",
]


@triton.jit
def onward_row(beta_ptr, sink_ptr, onward_ptr, t, k, K, label, C, HAS_TAIL: tl.constexpr):
    """u_t; for k = K with a tail Q_t: what may follow the k positions before t of a segment."""
    found = load_row(beta_ptr + t * C, label, C) + load_row(sink_ptr + t * C, label, C)
    if HAS_TAIL:
        if k == K:
            found = load_row(onward_ptr + t * C, label, C)
    return found


@triton.jit
def gamma_row(
    alpha_ptr, transition_ptr, initial_ptr, s, k, label, C,
    HAS_INITIAL: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Sum over c' of alpha_s(c') + A_k[c', c]: the term of a segment [s, s + k)."""
    if HAS_INITIAL:
        if s == 0:
            found = load_row(initial_ptr + (k - 1) * C, label, C)
        else:
            alpha = load_row(alpha_ptr + s * C, label, C)
            matrix = load_transition(transition_ptr, k, label[:, None], label[None, :], C)
            found = sum_over(matrix + alpha[None, :], MAX)
    else:
        alpha = load_row(alpha_ptr + s * C, label, C)
        matrix = load_transition(transition_ptr, k, label[:, None], label[None, :], C)
        found = sum_over(matrix + alpha[None, :], MAX)
    return found


@kernel
def duration_pass_kernel(
    transition_ptr, bias_ptr, initial_ptr, final_ptr, lengths_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, tail_ptr, alpha_ptr, beta_ptr, longer_ptr, onward_ptr, log_z_ptr, T, C, K,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_TAIL: tl.constexpr, MAX: tl.constexpr,
    CP: tl.constexpr,
):  # fmt: skip
    """Messages `alpha` by program (b, 0), with log Z; `beta` by program (b, 1), if launched.

    With HAS_TAIL also `longer` and `onward` (B, T+1, C), G and Q; with MAX `longer` is int32, the
    duration of the best segment that ends at t where that is above K, else 0.
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    base = b * (T + 1) * C
    alpha_ptr += base
    beta_ptr += base
    sink_ptr += base
    source_ptr += base
    deep_ptr += base
    born_ptr += base
    longer_ptr += base
    onward_ptr += base
    final = tl.where(inside, 0.0, float("-inf")).to(tl.float64)
    if HAS_TAIL:
        tail = load_row(tail_ptr, label, C)
    if HAS_FINAL:
        final = load_row(final_ptr, label, C)
    if tl.program_id(1) == 0:
        tl.store(alpha_ptr + label, tl.zeros([CP], tl.float64), mask=inside)
        row = final
        if HAS_TAIL:
            longer = tl.full([CP], float("-inf"), tl.float64)
            newest = longer  # the term of duration K
            duration = tl.zeros([CP], tl.int32)
        for t in range(1, length + 1):
            tl.debug_barrier()
            if HAS_TAIL:
                duration = tl.where(longer > newest, duration, K) + 1
                longer = lengthen(
                    log_add(longer, newest, MAX), tail, deep_ptr, born_ptr, t, label, C
                )
                newest = tl.full([CP], float("-inf"), tl.float64)
            born = tl.load(born_ptr + t * C + label, mask=inside, other=0)
            total = tl.full([CP], float("-inf"), tl.float64)
            for k in range(1, tl.minimum(K, t) + 1):
                s = t - k
                x = gamma_row(
                    alpha_ptr, transition_ptr, initial_ptr, s, k, label, C, HAS_INITIAL, MAX
                )
                x += load_row(source_ptr + s * C, label, C) + load_row(
                    bias_ptr + (k - 1) * C, label, C
                )
                x += deep_content(deep_ptr, s, t, label, C)
                x = tl.where(s >= born, x, float("-inf"))
                total = log_add(total, x, MAX)
                if HAS_TAIL:
                    newest = tl.where(k == K, x, newest)
            if HAS_TAIL:
                if MAX:
                    duration_or_0 = tl.where(longer > total, duration, 0)
                    tl.store(longer_ptr + t * C + label, duration_or_0, mask=inside)
                else:
                    tl.store(longer_ptr + t * C + label, longer, mask=inside)
                total = log_add(total, longer, MAX)
            row = total + load_row(sink_ptr + t * C, label, C)
            tl.store(alpha_ptr + t * C + label, row, mask=inside)
        tl.store(log_z_ptr + b, tl.max(sum_over((row + final)[None, :], MAX), 0))
    else:
        tl.store(beta_ptr + length * C + label, final, mask=inside)
        if HAS_TAIL:
            onward = final + load_row(sink_ptr + length * C, label, C)
            tl.store(onward_ptr + length * C + label, onward, mask=inside)
        for i in range(1, length + 1):
            tl.debug_barrier()
            s = length - i
            total = tl.full([CP], float("-inf"), tl.float64)
            source = load_row(source_ptr + s * C, label, C)
            for k in range(1, tl.minimum(K, i) + 1):
                t = s + k
                x = source + load_row(bias_ptr + (k - 1) * C, label, C)
                x += onward_row(beta_ptr, sink_ptr, onward_ptr, t, k, K, label, C, HAS_TAIL)
                x += deep_content(deep_ptr, s, t, label, C)
                born = tl.load(born_ptr + t * C + label, mask=inside, other=0)
                x = tl.where(s >= born, x, float("-inf"))
                matrix = load_transition(transition_ptr, k, label[None, :], label[:, None], C)
                total = log_add(total, sum_over(matrix + x[None, :], False))
            tl.store(beta_ptr + s * C + label, total, mask=inside)
            if HAS_TAIL:
                onward = lengthen(onward, tail, deep_ptr, born_ptr, s + 1, label, C)
                onward = log_add(total + load_row(sink_ptr + s * C, label, C), onward)
                tl.store(onward_ptr + s * C + label, onward, mask=inside)


@kernel
def duration_terms_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, alpha_ptr, beta_ptr, onward_ptr, log_z_ptr,
    by_transition_ptr, by_bias_ptr, by_initial_ptr, T, C, K,
    HAS_INITIAL: tl.constexpr, HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Gradients by A_k (B, K, C, C), D_k and, if HAS_INITIAL, initial scores (B, K, C).

    Row K counts longer segments too. Program (k - 1, b).
    """
    k = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    log_z = tl.load(log_z_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    base = b * (T + 1) * C
    matrix = load_transition(transition_ptr, k, label[:, None], label[None, :], C)
    bias = load_row(bias_ptr + (k - 1) * C, label, C) - tl.where(length > 0, log_z, 0.0)
    by_transition = tl.zeros([CP, CP], tl.float64)
    first = tl.zeros([CP], tl.float64)
    initial = first
    if HAS_INITIAL:
        initial = load_row(initial_ptr + (k - 1) * C, label, C)
    for s in range(length - k + 1):
        row = base + s * C
        to = base + (s + k) * C
        x = bias + load_row(source_ptr + row, label, C)
        x += onward_row(
            beta_ptr + base, sink_ptr + base, onward_ptr + base, s + k, k, K, label, C, HAS_TAIL
        )
        x += deep_content(deep_ptr + base, s, s + k, label, C)
        born = tl.load(born_ptr + to + label, mask=inside, other=0)
        x = tl.where(s >= born, x, float("-inf"))
        alpha = load_row(alpha_ptr + row, label, C)
        if HAS_INITIAL:
            first = tl.where(s == 0, probability(x + initial), first)
            alpha = tl.where(s == 0, float("-inf"), alpha)
        by_transition += probability(matrix + alpha[None, :] + x[:, None])
    row = (b * K + k - 1) * C + label
    tl.store(by_bias_ptr + row, first + tl.sum(by_transition, 1), mask=inside)
    if HAS_INITIAL:
        tl.store(by_initial_ptr + row, first, mask=inside)
    place = ((b * K + k - 1) * C + label[None, :]) * C + label[:, None]
    tl.store(by_transition_ptr + place, by_transition, mask=inside[:, None] & inside[None, :])


@kernel
def duration_start_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, alpha_ptr, beta_ptr, onward_ptr, log_z_ptr, start_ptr, end_ptr, T, C, K,
    HAS_INITIAL: tl.constexpr, HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Start and end marginals (B, T, C) in float64, zero after a sequence's end; program (s, b)."""
    s = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    log_z = tl.load(log_z_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    start = tl.zeros([CP], tl.float64)
    end = tl.zeros([CP], tl.float64)
    if s < length:
        row = base + (s + 1) * C
        x = load_row(alpha_ptr + row, label, C) + load_row(beta_ptr + row, label, C) - log_z
        end = probability(x)
        source = load_row(source_ptr + base + s * C, label, C) - log_z
        for k in range(1, tl.minimum(K, length - s) + 1):
            to = base + (s + k) * C
            x = gamma_row(
                alpha_ptr + base, transition_ptr, initial_ptr, s, k, label, C, HAS_INITIAL, False
            )
            x += source + load_row(bias_ptr + (k - 1) * C, label, C)
            x += onward_row(
                beta_ptr + base, sink_ptr + base, onward_ptr + base, s + k, k, K, label, C, HAS_TAIL
            )
            x += deep_content(deep_ptr + base, s, s + k, label, C)
            born = tl.load(born_ptr + to + label, mask=inside, other=0)
            start += tl.where(s >= born, probability(x), 0.0)
    place = (b * T + s) * C + label
    tl.store(start_ptr + place, tl.minimum(start, 1.0), mask=inside)
    tl.store(end_ptr + place, end, mask=inside)

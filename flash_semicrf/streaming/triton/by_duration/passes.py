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

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    feasible,
    lengthen,
    load_row,
    load_transition,
    log_add,
    sum_over,
    uncut,
)
from flash_semicrf.streaming.triton.numerics import probability
from flash_semicrf.streaming.triton.prefixes import rows_from
from flash_semicrf.streaming.triton.records import State

__all__ = [
    "Messages",
    "duration_pass_kernel",
    "duration_start_kernel",
    "duration_terms_kernel",
    "gamma_row",
    "messages_from",
    "onward_row",
    "with_segment",
]


class Messages(NamedTuple):
    """Output of `duration_pass_kernel`; alpha in place of what is not computed."""

    log_z: Tensor  # (B,), without the common parts; the best score of the max pass
    alpha: Tensor  # (B, T + 1, C)
    beta: Tensor
    longer: Tensor  # G; in the max pass int32
    onward: Tensor  # Q


@triton.jit
def messages_from(m, base):
    """Messages of the sequence whose rows begin at `base`."""
    return Messages(m.log_z, m.alpha + base, m.beta + base, m.longer + base, m.onward + base)


@triton.jit
def onward_row(state, t, k, K, label, C):
    """u_t; for k = K with a tail Q_t: what may follow the k positions before t of a segment."""
    m = state.messages
    found = load_row(m.beta + t * C, label, C) + load_row(state.prefixes.sink + t * C, label, C)
    if state.parameters.tail is not None:
        if k == K:
            found = load_row(m.onward + t * C, label, C)
    return found


@triton.jit
def with_segment(x, state, s, k, label, C):
    """x + e_{s, k} of segments [s, s + k); -inf where a forbidden position cuts them."""
    p = state.prefixes
    x += load_row(p.source + s * C, label, C) + load_row(
        state.parameters.bias + (k - 1) * C, label, C
    )
    x += deep_content(p.deep, s, s + k, label, C)
    return uncut(x, p.born, s, s + k, label, C)


@triton.jit
def gamma_row(state, s, k, label, C, MAX):
    """Sum over c' of alpha_s(c') + A_k[c', c]: the term of a segment [s, s + k)."""
    alpha = load_row(state.messages.alpha + s * C, label, C)
    transition = state.parameters.transition
    matrix = load_transition(transition, k, label[:, None], label[None, :], C)
    found = sum_over(matrix + alpha[None, :], MAX)
    if state.parameters.initial is not None:
        first = load_row(state.parameters.initial + (k - 1) * C, label, C)
        found = tl.where(s == 0, first, found)
    return found


@triton.jit
def duration_pass_kernel(state, sizes, MAX, CP):
    """Messages `alpha` by program (b, 0), with log Z; `beta` by program (b, 1), if launched.

    With a tail also `longer` and `onward` (B, T+1, C), G and Q; with MAX `longer` is the duration
    of the best segment that ends at t where that is above K, else 0.
    """
    b = tl.program_id(0).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(sizes.lengths + b).to(tl.int32)
    base = b * (sizes.T + 1) * C
    given = state.parameters
    x = rows_from(state.prefixes, base)
    m = messages_from(state.messages, base)
    state = State(given, x, m)
    final = tl.where(inside, 0.0, float("-inf")).to(tl.float64)
    if given.tail is not None:
        tail = load_row(given.tail, label, C)
    if given.final is not None:
        final = load_row(given.final, label, C)
    if tl.program_id(1) == 0:
        tl.store(m.alpha + label, tl.zeros([CP], tl.float64), mask=inside)
        row = final
        if given.tail is not None:
            longer = tl.full([CP], float("-inf"), tl.float64)
            newest = longer  # the term of duration K
            duration = tl.zeros([CP], tl.int32)
        for t in range(1, length + 1):
            tl.debug_barrier()
            if given.tail is not None:
                duration = tl.where(longer > newest, duration, K) + 1
                longer = lengthen(log_add(longer, newest, MAX), tail, x, t, label, C)
                newest = tl.full([CP], float("-inf"), tl.float64)
            total = tl.full([CP], float("-inf"), tl.float64)
            for k in range(1, tl.minimum(K, t) + 1):
                term = gamma_row(state, t - k, k, label, C, MAX)
                term = with_segment(term, state, t - k, k, label, C)
                total = log_add(total, term, MAX)
                if given.tail is not None:
                    newest = tl.where(k == K, term, newest)
            if given.tail is not None:
                found = longer
                if MAX:
                    found = tl.where(longer > total, duration, 0)
                tl.store(m.longer + t * C + label, found, mask=inside)
                total = log_add(total, longer, MAX)
            row = total + load_row(x.sink + t * C, label, C)
            tl.store(m.alpha + t * C + label, row, mask=inside)
        tl.store(m.log_z + b, tl.max(sum_over((row + final)[None, :], MAX), 0))
    else:
        tl.store(m.beta + length * C + label, final, mask=inside)
        if given.tail is not None:
            onward = final + load_row(x.sink + length * C, label, C)
            tl.store(m.onward + length * C + label, onward, mask=inside)
        for i in range(1, length + 1):
            tl.debug_barrier()
            s = length - i
            total = tl.full([CP], float("-inf"), tl.float64)
            for k in range(1, tl.minimum(K, i) + 1):
                term = onward_row(state, s + k, k, K, label, C)
                term = with_segment(term, state, s, k, label, C)
                matrix = load_transition(given.transition, k, label[None, :], label[:, None], C)
                total = log_add(total, sum_over(matrix + term[None, :], False))
            tl.store(m.beta + s * C + label, total, mask=inside)
            if given.tail is not None:
                onward = lengthen(onward, tail, x, s + 1, label, C)
                onward = log_add(total + load_row(x.sink + s * C, label, C), onward)
                tl.store(m.onward + s * C + label, onward, mask=inside)


@triton.jit
def duration_terms_kernel(state, sizes, bounds_ptr, to, CP):
    """Gradients by A_k (B, K, C, C), D_k and, if given, initial scores (B, K, C).

    Row K counts longer segments too. Only segments that end inside `bounds` (B, 2) count, if given,
    and longer ones whose K-th position is inside. Program (k - 1, b).
    """
    k = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    length, log_z = feasible(sizes, state.messages.log_z, b)
    base = b * (sizes.T + 1) * C
    given = state.parameters
    p = rows_from(state.prefixes, base)
    m = messages_from(state.messages, base)
    state = State(given, p, m)
    matrix = load_transition(given.transition, k, label[:, None], label[None, :], C)
    bias = load_row(given.bias + (k - 1) * C, label, C) - log_z
    by_transition = tl.zeros([CP, CP], tl.float64)
    first = tl.zeros([CP], tl.float64)
    initial = first
    if given.initial is not None:
        initial = load_row(given.initial + (k - 1) * C, label, C)
    begin = 0
    stop = length - k + 1
    if bounds_ptr is not None:
        begin = tl.maximum(begin, tl.load(bounds_ptr + 2 * b).to(tl.int32) - k + 1)
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * b + 1).to(tl.int32) - k + 1)
    for s in range(begin, stop):
        x = bias + load_row(p.source + s * C, label, C)
        x += onward_row(state, s + k, k, K, label, C)
        x += deep_content(p.deep, s, s + k, label, C)
        x = uncut(x, p.born, s, s + k, label, C)
        alpha = load_row(m.alpha + s * C, label, C)
        if given.initial is not None:
            first = tl.where(s == 0, probability(x + initial), first)
            alpha = tl.where(s == 0, float("-inf"), alpha)
        by_transition += probability(matrix + alpha[None, :] + x[:, None])
    row = (b * K + k - 1) * C + label
    tl.store(to.bias + row, first + tl.sum(by_transition, 1), mask=inside)
    if given.initial is not None:
        tl.store(to.initial + row, first, mask=inside)
    place = ((b * K + k - 1) * C + label[None, :]) * C + label[:, None]
    tl.store(to.transition + place, by_transition, mask=inside[:, None] & inside[None, :])


@triton.jit
def duration_start_kernel(state, sizes, start_ptr, end_ptr, CP):
    """Start and end marginals (B, T, C) in float64, zero after a sequence's end; program (s, b)."""
    s = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    length, log_z = feasible(sizes, state.messages.log_z, b)
    base = b * (sizes.T + 1) * C
    p = rows_from(state.prefixes, base)
    m = messages_from(state.messages, base)
    state = State(state.parameters, p, m)
    start = tl.zeros([CP], tl.float64)
    end = tl.zeros([CP], tl.float64)
    if s < length:
        row = (s + 1) * C
        end = probability(
            load_row(m.alpha + row, label, C) + load_row(m.beta + row, label, C) - log_z
        )
        source = load_row(p.source + s * C, label, C) - log_z
        for k in range(1, tl.minimum(K, length - s) + 1):
            x = gamma_row(state, s, k, label, C, False)
            x += source + load_row(state.parameters.bias + (k - 1) * C, label, C)
            x += onward_row(state, s + k, k, K, label, C)
            x += deep_content(p.deep, s, s + k, label, C)
            born = tl.load(p.born + (s + k) * C + label, mask=label < C, other=0)
            start += tl.where(s >= born, probability(x), 0.0)
    place = (b * sizes.T + s) * C + label
    tl.store(start_ptr + place, tl.minimum(start, 1.0), mask=label < C)
    tl.store(end_ptr + place, end, mask=label < C)

"""Derivatives of messages and expected counts along a direction, for transitions by duration.

As `tangent_passes` and `tangent_terms`, by the recurrences of `passes`: a derivative is the
posterior mean of the direction's score, over durations and labels at once. Cost T·K·C² in every
kernel, exponentials of log probabilities; float64. Initial scores are (K, C) and always given. With
a duration tail G and Q of `passes` have derivatives too: means over the two terms of each.

Kernels take the state and that of the derivatives, d; `d.messages.log_z` (B,) is d log Z.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.by_duration.passes import messages_from, onward_row
from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    either,
    feasible,
    lengthen,
    load_finite,
    load_row,
    load_transition,
    mean_of,
    uncut,
)
from flash_semicrf.streaming.triton.numerics import exp_wide, finite
from flash_semicrf.streaming.triton.prefixes import rows_from
from flash_semicrf.streaming.triton.records import State

__all__ = [
    "duration_start_tangent_kernel",
    "duration_tangent_pass_kernel",
    "duration_tangent_terms_kernel",
]


@triton.jit
def _segment(state, d, s, k, label, C):
    """Score of [s, s + k) but for its transition and sink, -inf where a forbidden position cuts;
    and its derivative."""
    p, q = state.prefixes, d.prefixes
    bias = (k - 1) * C
    x = load_row(p.source + s * C, label, C) + load_row(state.parameters.bias + bias, label, C)
    x += deep_content(p.deep, s, s + k, label, C)
    dx = load_finite(q.source + s * C, label, C) + load_finite(d.parameters.bias + bias, label, C)
    dx += deep_content(q.deep, s, s + k, label, C)
    return uncut(x, p.born, s, s + k, label, C), dx


@triton.jit
def _after_start(state, d, s, k, K, label, C):
    """Log-sum of all from the start of a segment [s, s + k) on, and its derivative."""
    m = d.messages
    to = (s + k) * C
    x, dx = _segment(state, d, s, k, label, C)
    x += onward_row(state, s + k, k, K, label, C)
    onward = load_finite(m.beta + to, label, C) + load_finite(d.prefixes.sink + to, label, C)
    if state.parameters.tail is not None:
        if k == K:
            onward = load_finite(m.onward + to, label, C)
    return x, dx + onward


@triton.jit
def _d_matrix(d, k, target, source, C):
    place = ((k - 1) * C + source) * C + target
    inside = (source < C) & (target < C)
    return tl.load(d.parameters.transition + place, mask=inside, other=0.0)


@triton.jit
def _arrivals(state, d, x, dx, s, k, label, C):
    """Exponentials of x (CP,) plus what arrives, and their products with the derivatives.

    Two of them for the first segment, (CP,), 0 if s > 0; and two for the others, (CP dst, CP src).
    """
    given = state.parameters
    inside = (label < C) & (s > 0)
    alpha = tl.load(state.messages.alpha + s * C + label, mask=inside, other=float("-inf"))
    d_alpha = tl.load(d.messages.alpha + s * C + label, mask=inside, other=0.0)
    matrix = load_transition(given.transition, k, label[:, None], label[None, :], C)
    d_matrix = _d_matrix(d, k, label[:, None], label[None, :], C)
    later = exp_wide(matrix + alpha[None, :] + x[:, None])
    d_later = later * (d_matrix + d_alpha[None, :] + dx[:, None])
    first = exp_wide(x + load_row(given.initial + (k - 1) * C, label, C))
    first = tl.where(s == 0, first, 0.0)
    d_first = first * (dx + load_finite(d.parameters.initial + (k - 1) * C, label, C))
    return first, d_first, later, d_later


@triton.jit
def _newest_longest(state, d, s, K, label, C):
    """The term of duration K that starts at s, but for its sink, and its derivative.

    Its level is its own: the message that it goes into may have none or one far above.
    """
    given = state.parameters
    inside = (label < C) & (s > 0)
    alpha = tl.load(state.messages.alpha + s * C + label, mask=inside, other=float("-inf"))
    later = load_transition(given.transition, K, label[:, None], label[None, :], C) + alpha[None, :]
    first = load_row(given.initial + (K - 1) * C, label, C)
    first = tl.where(s == 0, first, float("-inf"))
    top = finite(tl.maximum(tl.max(later, 1), first))
    x, dx = _segment(state, d, s, K, label, C)
    first, d_first, later, d_later = _arrivals(state, d, -top, dx, s, K, label, C)
    total = first + tl.sum(later, 1)
    return x + top + tl.log(total), mean_of(d_first + tl.sum(d_later, 1), total)


@triton.jit
def duration_tangent_pass_kernel(state, d, sizes, CP):
    """Rows 1..length of d alpha by program (b, 0), of d beta by (b, 1); all (B, T+1, C).

    With a tail also of the derivatives of G and Q.
    """
    b = tl.program_id(0).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    length, _ = feasible(sizes, state.messages.log_z, b)
    base = b * (sizes.T + 1) * C
    given, towards = state.parameters, d.parameters
    p, q = rows_from(state.prefixes, base), rows_from(d.prefixes, base)
    m, dm = messages_from(state.messages, base), messages_from(d.messages, base)
    state, d = State(given, p, m), State(towards, q, dm)
    if given.tail is not None:
        tail = load_row(given.tail, label, C)
        d_tail = load_finite(towards.tail, label, C)
    if tl.program_id(1) == 0:
        if given.tail is not None:
            longer = tl.full([CP], float("-inf"), tl.float64)
            d_longer = tl.zeros([CP], tl.float64)
            newest = longer
            d_newest = d_longer
        for t in range(1, length + 1):
            tl.debug_barrier()
            level = load_row(p.sink + t * C, label, C) - finite(load_row(m.alpha + t * C, label, C))
            d_sink = load_finite(q.sink + t * C, label, C)
            total = tl.zeros([CP], tl.float64)
            mean = tl.zeros([CP], tl.float64)
            for k in range(1, tl.minimum(K, t) + 1):
                x, dx = _segment(state, d, t - k, k, label, C)
                first, d_first, later, d_later = _arrivals(
                    state, d, level + x, d_sink + dx, t - k, k, label, C
                )
                total += first + tl.sum(later, 1)
                mean += d_first + tl.sum(d_later, 1)
            if given.tail is not None:
                longer, d_longer = either(longer, d_longer, newest, d_newest)
                longer = lengthen(longer, tail, p, t, label, C)
                d_longer += d_tail + deep_content(q.deep, t - 1, t, label, C)
                tl.store(dm.longer + t * C + label, d_longer, mask=inside)
                weight = exp_wide(longer + level)
                total += weight
                mean += weight * (d_longer + d_sink)
                if t >= K:
                    newest, d_newest = _newest_longest(state, d, t - K, K, label, C)
            tl.store(dm.alpha + t * C + label, mean_of(mean, total), mask=inside)
    else:
        d_final = load_finite(towards.final, label, C)
        tl.store(dm.beta + length * C + label, d_final, mask=inside)
        if given.tail is not None:
            onward = load_row(m.onward + length * C, label, C)
            d_onward = d_final + load_finite(q.sink + length * C, label, C)
            tl.store(dm.onward + length * C + label, d_onward, mask=inside & (length > 0))
        for i in range(1, length):
            tl.debug_barrier()
            s = length - i
            own = load_row(m.beta + s * C, label, C)
            total = tl.zeros([CP], tl.float64)
            mean = tl.zeros([CP], tl.float64)
            for k in range(1, tl.minimum(K, i) + 1):
                x, dx = _after_start(state, d, s, k, K, label, C)
                matrix = load_transition(given.transition, k, label[None, :], label[:, None], C)
                d_matrix = _d_matrix(d, k, label[None, :], label[:, None], C)
                weight = exp_wide(matrix + x[None, :] - finite(own)[:, None])
                total += tl.sum(weight, 1)
                mean += tl.sum(weight * (d_matrix + dx[None, :]), 1)
            found = mean_of(mean, total)
            tl.store(dm.beta + s * C + label, found, mask=inside)
            if given.tail is not None:
                onward = lengthen(onward, tail, p, s + 1, label, C)
                d_onward += d_tail + deep_content(q.deep, s, s + 1, label, C)
                other = own + load_row(p.sink + s * C, label, C)
                d_other = found + load_finite(q.sink + s * C, label, C)
                onward, d_onward = either(onward, d_onward, other, d_other)
                tl.store(dm.onward + s * C + label, d_onward, mask=inside)


@triton.jit
def _products(state, d, s, k, K, log_z, mean, label, C):
    """Derivatives of the probabilities of segments [s, s + k), as `_arrivals`: of the first, of
    others."""
    x, dx = _after_start(state, d, s, k, K, label, C)
    _, d_first, _, d_later = _arrivals(state, d, x - log_z, dx - mean, s, k, label, C)
    return d_first, d_later


@triton.jit
def duration_tangent_terms_kernel(state, d, sizes, core_ptr, to, CP):
    """Derivatives of the counts of A_k (B, K, C, C), D_k and first segments (B, K, C).

    Only segments that start inside `core` (B, 2) count, if given. Program (k - 1, b).
    """
    k = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    length, log_z = feasible(sizes, state.messages.log_z, b)
    mean = tl.load(d.messages.log_z + b)
    base = b * (sizes.T + 1) * C
    p, q = rows_from(state.prefixes, base), rows_from(d.prefixes, base)
    state = State(state.parameters, p, messages_from(state.messages, base))
    d = State(d.parameters, q, messages_from(d.messages, base))
    by_transition = tl.zeros([CP, CP], tl.float64)
    by_initial = tl.zeros([CP], tl.float64)
    begin = 0
    stop = length - k + 1
    if core_ptr is not None:
        begin = tl.maximum(begin, tl.load(core_ptr + 2 * b).to(tl.int32))
        stop = tl.minimum(stop, tl.load(core_ptr + 2 * b + 1).to(tl.int32))
    for s in range(begin, stop):
        d_first, d_later = _products(state, d, s, k, K, log_z, mean, label, C)
        by_initial += d_first
        by_transition += d_later
    row = (b * K + k - 1) * C + label
    tl.store(to.initial + row, by_initial, mask=inside)
    tl.store(to.bias + row, by_initial + tl.sum(by_transition, 1), mask=inside)
    place = ((b * K + k - 1) * C + label[None, :]) * C + label[:, None]
    tl.store(to.transition + place, by_transition, mask=inside[:, None] & inside[None, :])


@triton.jit
def duration_start_tangent_kernel(state, d, sizes, found_ptr, CP):
    """Derivatives of the start marginals (B, T, C), zero after a sequence's end; program (s, b)."""
    s = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    length, log_z = feasible(sizes, state.messages.log_z, b)
    mean = tl.load(d.messages.log_z + b)
    base = b * (sizes.T + 1) * C
    p, q = rows_from(state.prefixes, base), rows_from(d.prefixes, base)
    state = State(state.parameters, p, messages_from(state.messages, base))
    d = State(d.parameters, q, messages_from(d.messages, base))
    found = tl.zeros([CP], tl.float64)
    for k in range(1, tl.minimum(K, length - s) + 1):
        d_first, d_later = _products(state, d, s, k, K, log_z, mean, label, C)
        found += d_first + tl.sum(d_later, 1)
    tl.store(found_ptr + (b * sizes.T + s) * C + label, found, mask=label < C)

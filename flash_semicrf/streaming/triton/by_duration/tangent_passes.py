"""Derivatives of messages and expected counts along a direction, for transitions by duration.

As `tangent_passes` and `tangent_terms`, by the recurrences of `by_duration`: a derivative is the
posterior mean of the direction's score, over durations and labels at once. Cost T·K·C² in every
kernel, exponentials of log probabilities; float64. Initial scores are (K, C) and always given. With
a duration tail G and Q of `by_duration` have derivatives too: means over the two terms of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.by_duration.passes import onward_row
from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    lengthen,
    load_row,
    load_transition,
)
from flash_semicrf.streaming.triton.numerics import exp_wide
from flash_semicrf.streaming.triton.static.tangent_passes import either, finite

__all__ = [
    "duration_start_tangent_kernel",
    "duration_tangent_pass_kernel",
    "duration_tangent_terms_kernel",
]


@triton.jit
def _load_finite(row_ptr, label, C):
    return tl.load(row_ptr + label, mask=label < C, other=0.0)


@triton.jit
def _segment(bias_ptr, source_ptr, deep_ptr, born_ptr, s, k, label, C):
    """Score of [s, s + k) but for its transition and sink, -inf where a forbidden position cuts."""
    x = load_row(source_ptr + s * C, label, C) + load_row(bias_ptr + (k - 1) * C, label, C)
    x += deep_content(deep_ptr, s, s + k, label, C)
    born = tl.load(born_ptr + (s + k) * C + label, mask=label < C, other=0)
    return tl.where(s >= born, x, float("-inf"))


@triton.jit
def _d_segment(d_bias_ptr, d_source_ptr, d_deep_ptr, s, k, label, C):
    """Score by the direction of [s, s + k) but for its transition and sink."""
    d = _load_finite(d_source_ptr + s * C, label, C)
    d += _load_finite(d_bias_ptr + (k - 1) * C, label, C)
    return d + deep_content(d_deep_ptr, s, s + k, label, C)


@triton.jit
def _d_onward_row(d_beta_ptr, d_sink_ptr, d_onward_ptr, t, k, K, label, C, HAS_TAIL: tl.constexpr):
    """Derivative of `onward_row`."""
    d = _load_finite(d_beta_ptr + t * C, label, C) + _load_finite(d_sink_ptr + t * C, label, C)
    if HAS_TAIL:
        if k == K:
            d = _load_finite(d_onward_ptr + t * C, label, C)
    return d


@triton.jit
def _after_start(
    bias_ptr, sink_ptr, source_ptr, deep_ptr, born_ptr, beta_ptr, onward_ptr,
    d_bias_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr, d_beta_ptr, d_onward_ptr,
    s, k, K, label, C, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """Log-sum of all from the start of a segment [s, s + k) on, and its derivative."""
    x = _segment(bias_ptr, source_ptr, deep_ptr, born_ptr, s, k, label, C)
    x += onward_row(beta_ptr, sink_ptr, onward_ptr, s + k, k, K, label, C, HAS_TAIL)
    d = _d_segment(d_bias_ptr, d_source_ptr, d_deep_ptr, s, k, label, C)
    d += _d_onward_row(d_beta_ptr, d_sink_ptr, d_onward_ptr, s + k, k, K, label, C, HAS_TAIL)
    return x, d


@triton.jit
def _load_d_transition(d_transition_ptr, k, target, source, C):
    place = ((k - 1) * C + source) * C + target
    return tl.load(d_transition_ptr + place, mask=(source < C) & (target < C), other=0.0)


@triton.jit
def _arrivals(
    transition_ptr, initial_ptr, alpha_ptr, d_transition_ptr, d_initial_ptr, d_alpha_ptr,
    x, d, s, k, label, C,
):  # fmt: skip
    """Exponentials of x (CP,) plus what arrives, and their products with the derivatives.

    Two of them for the first segment, (CP,), 0 if s > 0; and two for the others, (CP dst, CP src).
    """
    inside = (label < C) & (s > 0)
    alpha = tl.load(alpha_ptr + s * C + label, mask=inside, other=float("-inf"))
    d_alpha = tl.load(d_alpha_ptr + s * C + label, mask=inside, other=0.0)
    matrix = load_transition(transition_ptr, k, label[:, None], label[None, :], C)
    d_matrix = _load_d_transition(d_transition_ptr, k, label[:, None], label[None, :], C)
    later = exp_wide(matrix + alpha[None, :] + x[:, None])
    d_later = later * (d_matrix + d_alpha[None, :] + d[:, None])
    first = exp_wide(x + load_row(initial_ptr + (k - 1) * C, label, C))
    first = tl.where(s == 0, first, 0.0)
    d_first = first * (d + _load_finite(d_initial_ptr + (k - 1) * C, label, C))
    return first, d_first, later, d_later


@triton.jit
def _newest_longest(
    transition_ptr, bias_ptr, initial_ptr, source_ptr, deep_ptr, born_ptr, alpha_ptr,
    d_transition_ptr, d_bias_ptr, d_initial_ptr, d_source_ptr, d_deep_ptr, d_alpha_ptr,
    s, K, label, C,
):  # fmt: skip
    """The term of duration K that starts at s, but for its sink, and its derivative.

    Its level is its own: the message that it goes into may have none or one far above.
    """
    inside = (label < C) & (s > 0)
    alpha = tl.load(alpha_ptr + s * C + label, mask=inside, other=float("-inf"))
    later = load_transition(transition_ptr, K, label[:, None], label[None, :], C) + alpha[None, :]
    first = load_row(initial_ptr + (K - 1) * C, label, C)
    first = tl.where(s == 0, first, float("-inf"))
    top = finite(tl.maximum(tl.max(later, 1), first))
    x = _segment(bias_ptr, source_ptr, deep_ptr, born_ptr, s, K, label, C)
    d = _d_segment(d_bias_ptr, d_source_ptr, d_deep_ptr, s, K, label, C)
    first, d_first, later, d_later = _arrivals(
        transition_ptr, initial_ptr, alpha_ptr, d_transition_ptr, d_initial_ptr, d_alpha_ptr,
        -top, d, s, K, label, C,
    )  # fmt: skip
    total = first + tl.sum(later, 1)
    mean = (d_first + tl.sum(d_later, 1)) / tl.where(total > 0, total, 1.0)
    return x + top + tl.log(total), tl.where(total > 0, mean, 0.0)


@kernel
def duration_tangent_pass_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, log_z_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, alpha_ptr, beta_ptr, onward_ptr,
    d_transition_ptr, d_bias_ptr, d_initial_ptr, d_final_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr,
    d_alpha_ptr, d_beta_ptr, d_onward_ptr, d_longer_ptr, tail_ptr, d_tail_ptr, T, C, K,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Rows 1..length of d_alpha by program (b, 0), of d_beta by (b, 1); all (B, T+1, C).

    With HAS_TAIL also of d_longer and d_onward, the derivatives of G and Q.
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    length = tl.where(tl.load(log_z_ptr + b) > float("-inf"), length, 0)
    base = b * (T + 1) * C
    sink_ptr += base
    source_ptr += base
    deep_ptr += base
    born_ptr += base
    alpha_ptr += base
    beta_ptr += base
    d_sink_ptr += base
    d_source_ptr += base
    d_deep_ptr += base
    d_alpha_ptr += base
    d_beta_ptr += base
    onward_ptr += base
    d_onward_ptr += base
    d_longer_ptr += base
    if HAS_TAIL:
        tail = load_row(tail_ptr, label, C)
        d_tail = _load_finite(d_tail_ptr, label, C)
    if tl.program_id(1) == 0:
        if HAS_TAIL:
            longer = tl.full([CP], float("-inf"), tl.float64)
            d_longer = tl.zeros([CP], tl.float64)
            newest = longer
            d_newest = d_longer
        for t in range(1, length + 1):
            tl.debug_barrier()
            own = load_row(alpha_ptr + t * C, label, C)
            level = load_row(sink_ptr + t * C, label, C) - finite(own)
            d_sink = _load_finite(d_sink_ptr + t * C, label, C)
            total = tl.zeros([CP], tl.float64)
            mean = tl.zeros([CP], tl.float64)
            for k in range(1, tl.minimum(K, t) + 1):
                s = t - k
                x = level + _segment(bias_ptr, source_ptr, deep_ptr, born_ptr, s, k, label, C)
                d = d_sink + _d_segment(d_bias_ptr, d_source_ptr, d_deep_ptr, s, k, label, C)
                first, d_first, later, d_later = _arrivals(
                    transition_ptr, initial_ptr, alpha_ptr, d_transition_ptr, d_initial_ptr,
                    d_alpha_ptr, x, d, s, k, label, C,
                )  # fmt: skip
                total += first + tl.sum(later, 1)
                mean += d_first + tl.sum(d_later, 1)
            if HAS_TAIL:
                longer, d_longer = either(longer, d_longer, newest, d_newest)
                longer = lengthen(longer, tail, deep_ptr, born_ptr, t, label, C)
                d_longer += d_tail + deep_content(d_deep_ptr, t - 1, t, label, C)
                tl.store(d_longer_ptr + t * C + label, d_longer, mask=inside)
                weight = exp_wide(longer + level)
                total += weight
                mean += weight * (d_longer + d_sink)
                if t >= K:
                    newest, d_newest = _newest_longest(
                        transition_ptr, bias_ptr, initial_ptr, source_ptr, deep_ptr, born_ptr,
                        alpha_ptr, d_transition_ptr, d_bias_ptr, d_initial_ptr, d_source_ptr,
                        d_deep_ptr, d_alpha_ptr, t - K, K, label, C,
                    )  # fmt: skip
            d = tl.where(total > 0, mean / tl.where(total > 0, total, 1.0), 0.0)
            tl.store(d_alpha_ptr + t * C + label, d, mask=inside)
    else:
        d_final = _load_finite(d_final_ptr, label, C)
        tl.store(d_beta_ptr + length * C + label, d_final, mask=inside)
        if HAS_TAIL:
            onward = load_row(onward_ptr + length * C, label, C)
            d_onward = d_final + _load_finite(d_sink_ptr + length * C, label, C)
            tl.store(d_onward_ptr + length * C + label, d_onward, mask=inside & (length > 0))
        for i in range(1, length):
            tl.debug_barrier()
            s = length - i
            own = load_row(beta_ptr + s * C, label, C)
            total = tl.zeros([CP], tl.float64)
            mean = tl.zeros([CP], tl.float64)
            for k in range(1, tl.minimum(K, i) + 1):
                x, d = _after_start(
                    bias_ptr, sink_ptr, source_ptr, deep_ptr, born_ptr, beta_ptr, onward_ptr,
                    d_bias_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr, d_beta_ptr, d_onward_ptr,
                    s, k, K, label, C, HAS_TAIL,
                )  # fmt: skip
                matrix = load_transition(transition_ptr, k, label[None, :], label[:, None], C)
                d_matrix = _load_d_transition(
                    d_transition_ptr, k, label[None, :], label[:, None], C
                )
                weight = exp_wide(matrix + x[None, :] - finite(own)[:, None])
                total += tl.sum(weight, 1)
                mean += tl.sum(weight * (d_matrix + d[None, :]), 1)
            d = tl.where(total > 0, mean / tl.where(total > 0, total, 1.0), 0.0)
            tl.store(d_beta_ptr + s * C + label, d, mask=inside)
            if HAS_TAIL:
                onward = lengthen(onward, tail, deep_ptr, born_ptr, s + 1, label, C)
                d_onward += d_tail + deep_content(d_deep_ptr, s, s + 1, label, C)
                onward, d_onward = either(
                    onward, d_onward, own + load_row(sink_ptr + s * C, label, C),
                    d + _load_finite(d_sink_ptr + s * C, label, C),
                )  # fmt: skip
                tl.store(d_onward_ptr + s * C + label, d_onward, mask=inside)


@kernel
def duration_tangent_terms_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, log_z_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, alpha_ptr, beta_ptr, onward_ptr,
    d_transition_ptr, d_bias_ptr, d_initial_ptr, mean_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr,
    d_alpha_ptr, d_beta_ptr, d_onward_ptr, by_transition_ptr, by_bias_ptr, by_initial_ptr, T, C, K,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Derivatives of the counts of A_k (B, K, C, C), D_k and first segments (B, K, C).

    Program (k - 1, b); `mean` (B,) is d log Z.
    """
    k = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    log_z = tl.load(log_z_ptr + b)
    mean = tl.load(mean_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    by_transition = tl.zeros([CP, CP], tl.float64)
    by_initial = tl.zeros([CP], tl.float64)
    for s in range(length - k + 1):
        x, d = _after_start(
            bias_ptr, sink_ptr + base, source_ptr + base, deep_ptr + base, born_ptr + base,
            beta_ptr + base, onward_ptr + base, d_bias_ptr, d_sink_ptr + base, d_source_ptr + base,
            d_deep_ptr + base, d_beta_ptr + base, d_onward_ptr + base, s, k, K, label, C, HAS_TAIL,
        )  # fmt: skip
        _, d_first, _, d_later = _arrivals(
            transition_ptr, initial_ptr, alpha_ptr + base, d_transition_ptr, d_initial_ptr,
            d_alpha_ptr + base, x - log_z, d - mean, s, k, label, C,
        )  # fmt: skip
        by_initial += d_first
        by_transition += d_later
    row = (b * K + k - 1) * C + label
    tl.store(by_initial_ptr + row, by_initial, mask=inside)
    tl.store(by_bias_ptr + row, by_initial + tl.sum(by_transition, 1), mask=inside)
    place = ((b * K + k - 1) * C + label[None, :]) * C + label[:, None]
    tl.store(by_transition_ptr + place, by_transition, mask=inside[:, None] & inside[None, :])


@kernel
def duration_start_tangent_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, log_z_ptr, sink_ptr, source_ptr, deep_ptr,
    born_ptr, alpha_ptr, beta_ptr, onward_ptr,
    d_transition_ptr, d_bias_ptr, d_initial_ptr, mean_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr,
    d_alpha_ptr, d_beta_ptr, d_onward_ptr, found_ptr, T, C, K,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Derivatives of the start marginals (B, T, C), zero after a sequence's end; program (s, b)."""
    s = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    log_z = tl.load(log_z_ptr + b)
    mean = tl.load(mean_ptr + b)
    length = tl.where(log_z > float("-inf"), tl.load(lengths_ptr + b).to(tl.int32), 0)
    log_z = tl.where(length > 0, log_z, 0.0)
    base = b * (T + 1) * C
    found = tl.zeros([CP], tl.float64)
    for k in range(1, tl.minimum(K, length - s) + 1):
        x, d = _after_start(
            bias_ptr, sink_ptr + base, source_ptr + base, deep_ptr + base, born_ptr + base,
            beta_ptr + base, onward_ptr + base, d_bias_ptr, d_sink_ptr + base, d_source_ptr + base,
            d_deep_ptr + base, d_beta_ptr + base, d_onward_ptr + base, s, k, K, label, C, HAS_TAIL,
        )  # fmt: skip
        _, d_first, _, d_later = _arrivals(
            transition_ptr, initial_ptr, alpha_ptr + base, d_transition_ptr, d_initial_ptr,
            d_alpha_ptr + base, x - log_z, d - mean, s, k, label, C,
        )  # fmt: skip
        found += d_first + tl.sum(d_later, 1)
    tl.store(found_ptr + (b * T + s) * C + label, found, mask=label < C)

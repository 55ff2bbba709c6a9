"""Derivatives of the messages of both passes along a direction, for static transitions.

A message's derivative is the posterior mean of the direction's score of what it summarises (the
first-order expectation semiring):

    d alpha_t(c) = sum_k P(k | c ends at t) [d gamma_{t-k}(c) + the direction's score of [t-k, t)]
    d gamma_t(c) = sum_{c'} P(c' | c starts at t) [d alpha_t(c') + dA[c', c]]

and, from the end, d eta and d beta in the same way. The weights come from the messages, and are
made to sum to 1, so that their rounding does not add up over the positions; what has no posterior
probability gets 0. Cost T(KC + C²) exponentials, one position after the other; float64.

With a duration tail the segments longer than K are one more term of that mean, of log-sum G_t as in
`by_duration` forwards, and the same read from the end, with

    d G_t(c) = the direction's score of a further position + the mean of d G_{t-1}(c) and
               the derivative of the term of duration K at t-1
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.log_rows import deep_content, lengthen, load_row
from flash_semicrf.streaming.triton.numerics import exp_wide, wide

__all__ = ["either", "finite", "tangent_pass_kernel"]


@triton.jit
def finite(x):
    """0 in place of what is infinite: for levels that a term of -inf is compared with."""
    return tl.where(x > float("-inf"), x, 0.0)


@triton.jit
def either(x, d, y, e):
    """Log of exp(x) + exp(y), and the mean of d and e by their shares; 0 where both are -inf."""
    top = finite(tl.maximum(x, y))
    weight = exp_wide(x - top)
    other = exp_wide(y - top)
    total = weight + other
    mean = (weight * d + other * e) / tl.where(total > 0, total, 1.0)
    return top + tl.log(total), tl.where(total > 0, mean, 0.0)


@triton.jit
def _window_terms(
    across_ptr, opening_ptr, bias_ptr, deep_ptr, born_ptr,
    d_across_ptr, d_opening_ptr, d_bias_ptr, d_deep_ptr,
    level, here, direction, longest, C, CP: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """Weights of the segments between `here` and the boundaries up to `longest` away, summed up,
    and the sum of their products with the derivatives."""
    label = tl.arange(0, CP)[None, :]
    total = tl.zeros([CP], tl.float64)
    mean = tl.zeros([CP], tl.float64)
    for first in range(0, longest, KT):
        k = first + 1 + tl.arange(0, KT)[:, None]
        other = here - direction * k
        live = (k <= longest) & (label < C)
        born = tl.load(born_ptr + tl.maximum(here, other) * C + label, mask=live, other=0)
        live = live & (tl.minimum(here, other) >= born)
        row = other * C + label
        term = (k - 1) * C + label
        x = wide(tl.load(bias_ptr + term, mask=live, other=float("-inf")))
        x += tl.load(across_ptr + row, mask=live, other=float("-inf")) + level[None, :]
        x += tl.load(opening_ptr + row, mask=live, other=float("-inf"))
        d = tl.load(d_bias_ptr + term, mask=live, other=0.0)
        d += tl.load(d_across_ptr + row, mask=live, other=0.0)
        d += tl.load(d_opening_ptr + row, mask=live, other=0.0)
        at = here * C + label
        away = tl.load(deep_ptr + row, mask=live, other=0.0)
        x += (tl.load(deep_ptr + at, mask=live, other=0.0) - away) * direction
        away = tl.load(d_deep_ptr + row, mask=live, other=0.0)
        d += (tl.load(d_deep_ptr + at, mask=live, other=0.0) - away) * direction
        weight = tl.where(live, exp_wide(x), 0.0)
        total += tl.sum(weight, 0)
        mean += tl.sum(tl.where(live, weight * d, 0.0), 0)
    return total, mean


@triton.jit
def _longest(
    across_ptr, opening_ptr, bias_ptr, deep_ptr, born_ptr,
    d_across_ptr, d_opening_ptr, d_bias_ptr, d_deep_ptr, here, direction, K, label, C,
):  # fmt: skip
    """Log of the segments between `here` and the boundary K away, and their derivative."""
    inside = label < C
    other = here - direction * K
    first = tl.minimum(here, other)
    stop = first + K
    x = load_row(bias_ptr + (K - 1) * C, label, C) + load_row(across_ptr + other * C, label, C)
    x += load_row(opening_ptr + other * C, label, C)
    x += deep_content(deep_ptr, first, stop, label, C)
    born = tl.load(born_ptr + stop * C + label, mask=inside, other=0)
    d = tl.load(d_bias_ptr + (K - 1) * C + label, mask=inside, other=0.0)
    d += tl.load(d_across_ptr + other * C + label, mask=inside, other=0.0)
    d += tl.load(d_opening_ptr + other * C + label, mask=inside, other=0.0)
    d += deep_content(d_deep_ptr, first, stop, label, C)
    return tl.where(first >= born, x, float("-inf")), d


@triton.jit
def _arrival_mean(
    own_ptr, d_own_ptr, across, transition_ptr, d_transition_ptr, to, by, C,
    CP: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Mean derivative of what arrives at each label, of messages `own` and their sums `across`.

    `to` and `by` are the strides of A by the label arrived at and by the other.
    """
    label = tl.arange(0, CP)[:, None]
    level = finite(across)[:, None]
    total = tl.zeros([CP], tl.float64)
    mean = tl.zeros([CP], tl.float64)
    for first in range(0, C, SOURCES):
        source = first + tl.arange(0, SOURCES)
        inside = (label < C) & (source < C)[None, :]
        place = label * to + source[None, :] * by
        own = tl.load(own_ptr + source, mask=source < C, other=float("-inf"))[None, :]
        x = wide(tl.load(transition_ptr + place, mask=inside, other=float("-inf")))
        weight = exp_wide(x + own - level)
        d = tl.load(d_transition_ptr + place, mask=inside, other=0.0)
        d += tl.load(d_own_ptr + source, mask=source < C, other=0.0)[None, :]
        total += tl.sum(weight, 1)
        mean += tl.sum(weight * d, 1)
    return tl.where(total > 0, mean / tl.where(total > 0, total, 1.0), 0.0)


@kernel
def tangent_pass_kernel(
    transition_ptr, bias_ptr, lengths_ptr, log_z_ptr, sink_ptr, source_ptr, deep_ptr, born_ptr,
    alpha_ptr, gamma_ptr, eta_ptr, beta_ptr,
    d_transition_ptr, d_bias_ptr, d_initial_ptr, d_final_ptr, d_sink_ptr, d_source_ptr, d_deep_ptr,
    d_alpha_ptr, d_gamma_ptr, d_eta_ptr, d_beta_ptr,
    tail_ptr, d_tail_ptr, longer_ptr, d_longer_ptr, T, C, K,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr, KT: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Fill rows of d_alpha and d_gamma by program (b, 0), of d_eta and d_beta by (b, 1).

    All (B, T+1, C), as the messages; nothing is written where nothing is feasible. Every array of
    the direction is float64 and finite. With HAS_TAIL program (b, 0) also fills `longer`, G without
    running scores as in `by_duration`, and d_longer.
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    length = tl.where(tl.load(log_z_ptr + b) > float("-inf"), length, 0)
    base = b * (T + 1) * C
    direction = 1
    origin = tl.zeros([], tl.int32)
    to = tl.full([], 1, tl.int32)
    by = C + to - 1
    own_ptr = alpha_ptr + base
    across_ptr = gamma_ptr + base
    opening_ptr = source_ptr + base
    closing_ptr = sink_ptr + base
    d_own_ptr = d_alpha_ptr + base
    d_across_ptr = d_gamma_ptr + base
    d_opening_ptr = d_source_ptr + base
    d_closing_ptr = d_sink_ptr + base
    edge_ptr = d_initial_ptr
    if tl.program_id(1) == 1:
        direction = -1
        origin = length
        to = C + origin - length
        by = tl.full([], 1, tl.int32)
        own_ptr = eta_ptr + base
        across_ptr = beta_ptr + base
        opening_ptr = sink_ptr + base
        closing_ptr = source_ptr + base
        d_own_ptr = d_eta_ptr + base
        d_across_ptr = d_beta_ptr + base
        d_opening_ptr = d_sink_ptr + base
        d_closing_ptr = d_source_ptr + base
        edge_ptr = d_final_ptr
    deep_ptr += base
    born_ptr += base
    d_deep_ptr += base
    if HAS_TAIL:
        tail = load_row(tail_ptr, label, C)
        d_tail = tl.load(d_tail_ptr + label, mask=inside, other=0.0)
        longer = tl.full([CP], float("-inf"), tl.float64)
        d_longer = tl.zeros([CP], tl.float64)
        newest = longer
        d_newest = d_longer
    edge = tl.load(edge_ptr + label, mask=inside, other=0.0)
    tl.store(d_across_ptr + origin * C + label, edge, mask=inside & (length > 0))
    for i in range(1, length + 1):
        tl.debug_barrier()
        here = origin + direction * i
        row = here * C + label
        own = load_row(own_ptr + here * C, label, C)
        level = load_row(closing_ptr + here * C, label, C) - finite(own)
        total, mean = _window_terms(
            across_ptr, opening_ptr, bias_ptr, deep_ptr, born_ptr,
            d_across_ptr, d_opening_ptr, d_bias_ptr, d_deep_ptr,
            level, here, direction, tl.minimum(K, i), C, CP, KT,
        )  # fmt: skip
        if HAS_TAIL:
            longer, d_longer = either(longer, d_longer, newest, d_newest)
            t = tl.maximum(here, here - direction)  # the position before it is passed
            longer = lengthen(longer, tail, deep_ptr, born_ptr, t, label, C)
            d_longer += d_tail + deep_content(d_deep_ptr, t - 1, t, label, C)
            tl.store(longer_ptr + base + row, longer, mask=inside & (direction > 0))
            tl.store(d_longer_ptr + base + row, d_longer, mask=inside & (direction > 0))
            weight = exp_wide(longer + level)
            total += weight
            mean += weight * d_longer
            if i >= K:
                newest, d_newest = _longest(
                    across_ptr, opening_ptr, bias_ptr, deep_ptr, born_ptr,
                    d_across_ptr, d_opening_ptr, d_bias_ptr, d_deep_ptr, here, direction, K,
                    label, C,
                )  # fmt: skip
        d = tl.where(total > 0, mean / tl.where(total > 0, total, 1.0), 0.0)
        d += tl.load(d_closing_ptr + row, mask=inside, other=0.0)
        tl.store(d_own_ptr + row, tl.where(own > float("-inf"), d, 0.0), mask=inside)
        tl.debug_barrier()
        across = load_row(across_ptr + here * C, label, C)
        d = _arrival_mean(
            own_ptr + here * C, d_own_ptr + here * C, across, transition_ptr, d_transition_ptr,
            to, by, C, CP, SOURCES,
        )  # fmt: skip
        tl.store(d_across_ptr + row, d, mask=inside)

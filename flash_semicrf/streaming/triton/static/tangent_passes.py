"""Derivatives of the messages of both passes along a direction, for static transitions.

A message's derivative is the posterior mean of the direction's score of what it summarises (the
first-order expectation semiring):

    d alpha_t(c) = sum_k P(k | c ends at t) [d gamma_{t-k}(c) + the direction's score of [t-k, t)]
    d gamma_t(c) = sum_{c'} P(c' | c starts at t) [d alpha_t(c') + dA[c', c]]

and, from the end, d eta and d beta in the same way. The weights come from the messages, and are
made to sum to 1, so that their rounding does not add up over the positions; what has no posterior
probability gets 0. Cost T(KC + C²) exponentials, one position after the other; float64.

With a duration tail the segments longer than K are one more term of that mean, of log-sum G_t as in
`by_duration.passes` forwards, and the same read from the end, with

    d G_t(c) = the direction's score of a further position + the mean of d G_{t-1}(c) and
               the derivative of the term of duration K at t-1

Kernels take the state and that of the derivatives, d. Read from the end, the messages change roles:
a `Side` names them by their part in the recurrence.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.log_rows import (
    deep_content,
    either,
    feasible,
    lengthen,
    load_finite,
    load_row,
    mean_of,
    uncut,
)
from flash_semicrf.streaming.triton.numerics import exp_wide, finite, wide
from flash_semicrf.streaming.triton.prefixes import rows_from

__all__ = ["tangent_pass_kernel"]


class Side(NamedTuple):
    """Rows of one sequence that a pass reads and writes; the pass goes in `direction`, 1 or -1."""

    own: Tensor  # alpha or eta
    across: Tensor  # gamma or beta
    opening: Tensor  # source or sink
    closing: Tensor  # sink or source
    bias: Tensor
    prefixes: tuple


@triton.jit
def _window_terms(side, d, level, here, direction, longest, C, CP, KT):
    """Weights of the segments between `here` and the boundaries up to `longest` away, summed up,
    and the sum of their products with the derivatives."""
    p, q = side.prefixes, d.prefixes
    label = tl.arange(0, CP)[None, :]
    total = tl.zeros([CP], tl.float64)
    mean = tl.zeros([CP], tl.float64)
    for first in range(0, longest, KT):
        k = first + 1 + tl.arange(0, KT)[:, None]
        other = here - direction * k
        live = (k <= longest) & (label < C)
        born = tl.load(p.born + tl.maximum(here, other) * C + label, mask=live, other=0)
        live = live & (tl.minimum(here, other) >= born)
        row = other * C + label
        term = (k - 1) * C + label
        x = wide(tl.load(side.bias + term, mask=live, other=float("-inf")))
        x += tl.load(side.across + row, mask=live, other=float("-inf")) + level[None, :]
        x += tl.load(side.opening + row, mask=live, other=float("-inf"))
        dx = tl.load(d.bias + term, mask=live, other=0.0)
        dx += tl.load(d.across + row, mask=live, other=0.0)
        dx += tl.load(d.opening + row, mask=live, other=0.0)
        at = here * C + label
        away = tl.load(p.deep + row, mask=live, other=0.0)
        x += (tl.load(p.deep + at, mask=live, other=0.0) - away) * direction
        away = tl.load(q.deep + row, mask=live, other=0.0)
        dx += (tl.load(q.deep + at, mask=live, other=0.0) - away) * direction
        weight = tl.where(live, exp_wide(x), 0.0)
        total += tl.sum(weight, 0)
        mean += tl.sum(tl.where(live, weight * dx, 0.0), 0)
    return total, mean


@triton.jit
def _longest(side, d, here, direction, K, label, C):
    """Log of the segments between `here` and the boundary K away, and their derivative."""
    p, q = side.prefixes, d.prefixes
    other = here - direction * K
    first = tl.minimum(here, other)
    row, bias = other * C, (K - 1) * C
    x = load_row(side.bias + bias, label, C) + load_row(side.across + row, label, C)
    x += load_row(side.opening + row, label, C)
    x += deep_content(p.deep, first, first + K, label, C)
    dx = load_finite(d.bias + bias, label, C) + load_finite(d.across + row, label, C)
    dx += load_finite(d.opening + row, label, C)
    dx += deep_content(q.deep, first, first + K, label, C)
    return uncut(x, p.born, first, first + K, label, C), dx


@triton.jit
def _arrival_mean(own_ptr, d_own_ptr, across, matrices, strides, C, CP, SOURCES):
    """Mean derivative of what arrives at each label, of messages `own` and their sums `across`.

    `matrices` are A and its derivative, `strides` theirs by the label arrived at and by the other.
    """
    transition_ptr, d_transition_ptr = matrices
    to, by = strides
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
    return mean_of(mean, total)


@triton.jit
def tangent_pass_kernel(state, d, sizes, CP, KT, SOURCES):
    """Fill rows of d alpha and d gamma by program (b, 0), of d eta and d beta by (b, 1).

    All (B, T+1, C), as the messages; nothing is written where nothing is feasible. Every array of
    the direction is float64 and finite. With a tail program (b, 0) also fills `longer`, G without
    running scores as in `by_duration.passes`, and its derivative.
    """
    b = tl.program_id(0).to(tl.int64)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    length, _ = feasible(sizes, state.messages.log_z, b)
    base = b * (sizes.T + 1) * C
    given, towards = state.parameters, d.parameters
    p, q = rows_from(state.prefixes, base), rows_from(d.prefixes, base)
    m, dm = state.messages, d.messages
    direction = 1
    origin = tl.zeros([], tl.int32)
    to = tl.full([], 1, tl.int32)
    by = C + to - 1
    own_ptr, across_ptr, opening_ptr, closing_ptr = m.alpha, m.gamma, p.source, p.sink
    d_own_ptr, d_across_ptr, d_opening_ptr, d_closing_ptr = dm.alpha, dm.gamma, q.source, q.sink
    edge_ptr = towards.initial
    if tl.program_id(1) == 1:
        direction = -1
        origin = length
        to = C + origin - length
        by = tl.full([], 1, tl.int32)
        own_ptr, across_ptr, opening_ptr, closing_ptr = m.eta, m.beta, p.sink, p.source
        d_own_ptr, d_across_ptr, d_opening_ptr, d_closing_ptr = dm.eta, dm.beta, q.sink, q.source
        edge_ptr = towards.final
    side = Side(own_ptr + base, across_ptr + base, opening_ptr, closing_ptr, given.bias, p)
    d_side = Side(
        d_own_ptr + base, d_across_ptr + base, d_opening_ptr, d_closing_ptr, towards.bias, q
    )
    if given.tail is not None:
        tail = load_row(given.tail, label, C)
        d_tail = load_finite(towards.tail, label, C)
        longer = tl.full([CP], float("-inf"), tl.float64)
        d_longer = tl.zeros([CP], tl.float64)
        newest = longer
        d_newest = d_longer
    matrices, strides = (given.transition, towards.transition), (to, by)
    edge = tl.load(edge_ptr + label, mask=inside, other=0.0)
    tl.store(d_side.across + origin * C + label, edge, mask=inside & (length > 0))
    for i in range(1, length + 1):
        tl.debug_barrier()
        here = origin + direction * i
        row = here * C
        own = load_row(side.own + row, label, C)
        level = load_row(side.closing + row, label, C) - finite(own)
        total, mean = _window_terms(
            side, d_side, level, here, direction, tl.minimum(K, i), C, CP, KT
        )
        if given.tail is not None:
            longer, d_longer = either(longer, d_longer, newest, d_newest)
            t = tl.maximum(here, here - direction)  # the position before it is passed
            longer = lengthen(longer, tail, p, t, label, C)
            d_longer += d_tail + deep_content(q.deep, t - 1, t, label, C)
            forwards = inside & (direction > 0)
            tl.store(m.longer + base + row + label, longer, mask=forwards)
            tl.store(dm.longer + base + row + label, d_longer, mask=forwards)
            weight = exp_wide(longer + level)
            total += weight
            mean += weight * d_longer
            if i >= K:
                newest, d_newest = _longest(side, d_side, here, direction, K, label, C)
        found = mean_of(mean, total) + load_finite(d_side.closing + row, label, C)
        found = tl.where(own > float("-inf"), found, 0.0)
        tl.store(d_side.own + row + label, found, mask=inside)
        tl.debug_barrier()
        across = load_row(side.across + row, label, C)
        found = _arrival_mean(
            side.own + row, d_side.own + row, across, matrices, strides, C, CP, SOURCES
        )
        tl.store(d_side.across + row + label, found, mask=inside)

"""Gradient by the duration scores: a correlation of sources with outputs.

    d log Z / d D_k(c) = sum_t exp(h_{t-k}(c) + D_k(c) + u_t(c) - log Z)

over the segments that no forbidden position cuts. One exponential per term, each a probability;
no atomics. Cost T K C.

Segments longer than K count as K. Their number and that of their positions beyond the K-th come
from a scan over their ends t, in the same terms:

    R_t(c) = sum_s exp(h_s(c) + (t-s-K) * tail(c)),    M_t(c) = sum_s (t-s-K) exp(the same)
    R_t    = exp(tail) * (R_{t-1} + exp(h_{t-1-K})),   M_t    = exp(tail) * M_{t-1} + R_t

Cost T C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.log_rows import feasible
from flash_semicrf.streaming.triton.numerics import (
    allowed,
    exp_wide,
    finite,
    is_deep,
    probability,
    settled,
)
from flash_semicrf.streaming.triton.static.apart import is_apart
from flash_semicrf.streaming.triton.static.plan import SPAN
from flash_semicrf.streaming.triton.static.tail import deep_window

__all__ = [
    "apart_durations_kernel",
    "duration_gradient_kernel",
    "longer_gradient_kernel",
]

_UNROLL = tl.constexpr(4)
_SPAN = tl.constexpr(SPAN)


@triton.jit
def _deep_content(scores_ptr, p, length, k, longest, label, C, CP, KT):
    """Sum of the deep scores among the k positions up to p; (KT, CP)."""
    total = tl.zeros([KT, CP], tl.float64)
    for back in range(longest):
        inside = (label < C) & (p - back < length)
        x = tl.load(scores_ptr + (p - back) * C + label, mask=inside, other=float("-inf"))
        top = tl.max(x, 0)
        deep = tl.where(is_deep(x, top), settled(x, top), 0.0)
        total += tl.where(k > back, deep[None, :], 0.0)
    return total


@triton.jit
def _deep_contents(scores_ptr, p, length, k, longest, label, C, CP, ROWS):
    """`_deep_content` of positions p (ROWS, 1).

    One function for both would take registers of the usual kernel, which is a quarter slower then.
    """
    total = tl.zeros([ROWS, CP], tl.float64)
    for back in range(longest):
        inside = (label < C) & (p - back < length) & (p >= back)
        x = tl.load(scores_ptr + (p - back) * C + label, mask=inside, other=float("-inf"))
        top = tl.max(x, 1)[:, None]
        deep = tl.where(is_deep(x, top), settled(x, top), 0.0)
        total += tl.where(k > back, deep, 0.0)
    return total


@triton.jit
def _correlate(
    scores_ptr, sizes, log_window_ptr, messages, bounds_ptr, gradient_ptr, span, CP, KT, G
):
    """See `duration_gradient_kernel`."""
    NARROW: tl.constexpr = scores_ptr.dtype.element_ty == tl.float32
    ROWS: tl.constexpr = G * KT
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    T, C, K = sizes.T, sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    k = tl.program_id(0) * KT + 1 + tl.arange(0, ROWS)[:, None]
    if G > 1:
        k = tl.program_id(0) * KT + 1 + (tl.arange(0, ROWS) % KT)[:, None]
    within = (k <= K) & inside[None, :]
    length = tl.load(sizes.lengths + b).to(tl.int32)
    has_deep = tl.load(messages.has_deep + b)
    log_z = tl.load(messages.log_z + b)
    bias = tl.load(log_window_ptr + k * CP + label[None, :], mask=within, other=float("-inf"))
    bias = tl.where(log_z > float("-inf"), bias - log_z, float("-inf"))
    begin = chunk * span
    stop = tl.minimum(begin + span, length)
    if bounds_ptr is not None:
        begin = tl.maximum(begin, tl.load(bounds_ptr + 2 * b).to(tl.int32))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * b + 1).to(tl.int32))
    column, last = label, stop
    steps_from, steps_to = begin, stop
    if G > 1:  # what was a number becomes a column, of a row for each group and duration
        share = (stop - begin + G * _SPAN - 1) // (G * _SPAN) * _SPAN
        steps_from, steps_to = 0, share
        begin = begin + (tl.arange(0, ROWS) // KT * share)[:, None]
        last = tl.minimum(begin + share, stop)
        column = label[None, :]
        inside = inside[None, :]
    blocks = T // _SPAN + 2
    block = tl.minimum(begin // _SPAN, blocks - 1)
    born = tl.load(messages.born + (b * blocks + block) * C + column, mask=inside, other=0)
    row = b * T * C
    total = tl.zeros([ROWS, CP], tl.float64)
    # Several outputs at a time: their loads and exponentials need not wait for each other.
    for first in range(steps_from, steps_to, _UNROLL):
        if NARROW:
            part = tl.zeros([ROWS, CP], tl.float32)
        for i in tl.static_range(_UNROLL):
            p = first + i
            if G > 1:
                p = begin + p
            # After the end nothing is live: what lies there is not read.
            here = inside & (p < last)
            x = tl.load(scores_ptr + row + p * C + column, mask=here, other=float("-inf"))
            u = tl.load(messages.forward + row + p * C + column, mask=here, other=float("-inf"))
            born = tl.where(allowed(x), born, p + 1)
            source = p + 1 - k
            live = within & (source >= born)
            place = messages.backward + row + source * C + label[None, :]
            h = tl.load(place, mask=live, other=float("-inf"))
            term = h + bias + u
            if has_deep != 0:
                longest = (tl.program_id(0) + 1) * KT
                if G > 1:
                    term += _deep_contents(
                        scores_ptr + row, p, length, k, longest, column, C, CP, ROWS
                    )
                else:
                    longest = tl.minimum(longest, p + 1)
                    term += _deep_content(
                        scores_ptr + row, p, length, k, longest, label, C, CP, ROWS
                    )
            if NARROW:
                part += tl.exp(tl.where(term > 0.0, 0.0, term).to(tl.float32))
            else:
                total += probability(term)
        if NARROW:
            total += part.to(tl.float64)
    if G > 1:
        total = tl.sum(tl.reshape(total, [G, KT, CP]), 0)
    k = tl.program_id(0) * KT + 1 + tl.arange(0, KT)[:, None]
    within = (k <= K) & (label < C)[None, :]
    place = gradient_ptr + ((b * tl.num_programs(1) + chunk) * K + k - 1) * C + label[None, :]
    tl.store(place, tl.minimum(total, length.to(tl.float64) / k), mask=within)


@labels_last
@triton.jit
def duration_gradient_kernel(
    scores_ptr, sizes, log_window_ptr, messages, bounds_ptr, gradient_ptr, span, CP, KT, G
):
    """Durations of one tile, segments that end in one chunk of `span` positions.

    Program (tile of KT durations, chunk, b); its G groups of warps take a share of the positions
    each. Only ends inside `bounds` (B, 2) count, if given, of which the first is a multiple of
    SPAN. The messages are h and u, as `boundary_kernel` leaves them; writes the chunk's part of
    `gradient` (B, chunks, K, C). Deep scores are in neither, and are looked for only in sequences
    that have some, at cost K per term. Of float32 scores, exponentials are taken in float32, of
    float64 sums, and added up in float64.
    """
    _correlate(
        scores_ptr, sizes, log_window_ptr, messages, bounds_ptr, gradient_ptr, span, CP, KT, G
    )


@labels_last
@triton.jit
def apart_durations_kernel(
    scores_ptr,
    sizes,
    log_window_ptr,
    messages,
    apart_ptr,
    bounds_ptr,
    gradient_ptr,
    span,
    CP,
    KT,
    G,
):
    """`duration_gradient_kernel` of the sequences that are apart."""
    if is_apart(apart_ptr, tl.program_id(2).to(tl.int64)):
        _correlate(
            scores_ptr, sizes, log_window_ptr, messages, bounds_ptr, gradient_ptr, span, CP, KT, G
        )


@labels_last
@triton.jit
def longer_gradient_kernel(
    scores_ptr, sizes, log_window_ptr, tail_ptr, messages, segments_ptr, beyond_ptr, CP
):
    """Expected numbers of segments longer than K and of their positions beyond the K-th, (B, C).

    Program (b,); messages as for `duration_gradient_kernel`. R and M are kept in float64, relative
    to the largest term that they hold.
    """
    b = tl.program_id(0).to(tl.int64)
    T, C, K = sizes.T, sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    has_deep = tl.load(messages.has_deep + b)
    length, log_z = feasible(sizes, messages.log_z, b)
    tail = tl.load(tail_ptr + label)
    level = tl.load(log_window_ptr + K * CP + label)
    level = tl.where(tail > float("-inf"), level - log_z, float("-inf"))
    rate = tl.where(tail > float("-inf"), tail, 0.0)
    row = b * T * C
    born = tl.zeros([CP], tl.int32)
    newest_deep = -(1 << 30)
    peak = tl.full([CP], float("-inf"), tl.float64)
    number = tl.zeros([CP], tl.float64)
    moment = tl.zeros([CP], tl.float64)
    segments = tl.zeros([CP], tl.float64)
    beyond = tl.zeros([CP], tl.float64)
    for first in range(0, length, _UNROLL):
        scores = ()
        sources = ()
        outputs = ()
        for i in tl.static_range(_UNROLL):
            p = first + i
            here = inside & (p < length)
            place = row + p * C + label
            scores = scores + (tl.load(scores_ptr + place, mask=here, other=float("-inf")),)
            outputs = outputs + (tl.load(messages.forward + place, mask=here, other=float("-inf")),)
            here = here & (p >= K)
            sources = sources + (tl.load(messages.backward + place - K * C, mask=here, other=0.0),)
        for i in tl.static_range(_UNROLL):
            p = first + i
            x = scores[i]
            born = tl.where(allowed(x), born, p + 1)
            h = sources[i]
            deep = tl.zeros([CP], tl.float64)
            if has_deep != 0:
                if newest_deep >= p - K:
                    h += deep_window(scores_ptr + row, p, K, label, C, CP)
                top = tl.max(x, 0)
                mask = is_deep(x, top)
                deep = tl.where(mask, settled(x, top), 0.0)
                newest_deep = tl.where(tl.max(mask.to(tl.int32), 0) == 1, p, newest_deep)
            h = tl.where(p - K >= born, h, float("-inf"))  # none before the K-th position
            peak = tl.where(born <= p, peak, float("-inf"))
            high = tl.maximum(peak, h)
            safe = finite(high)
            scale = exp_wide(peak - safe)
            number = number * scale + exp_wide(h - safe)
            moment = moment * scale + number
            peak = high + rate + deep
            weight = exp_wide(tl.minimum(peak + level + outputs[i], 700.0))
            segments += number * weight
            beyond += moment * weight
    tl.store(segments_ptr + b * C + label, segments, mask=inside)
    tl.store(beyond_ptr + b * C + label, beyond, mask=inside)

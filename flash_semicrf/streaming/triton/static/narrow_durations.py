"""Gradient by the duration scores without arithmetic in float64.

The same sum as in `duration_gradient`, of the packed h and u that `narrow_boundary_kernel` leaves.
A term is three integers and three fractions that add up to a logarithm: exact where the terms are
large and cancel, float32 where they do not. Sums are compensated. Cost T K C.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.fixed import (
    DEAD,
    exp_pair,
    fixed_of,
    pack,
    unpack,
)
from flash_semicrf.streaming.triton.numerics import allowed, finite
from flash_semicrf.streaming.triton.static.apart import is_apart
from flash_semicrf.streaming.triton.static.plan import SPAN

__all__ = ["narrow_durations_kernel"]

_UNROLL = tl.constexpr(8)
_SPAN = tl.constexpr(SPAN)


@triton.jit
def _packed(row_ptr, mask):
    """Packed logarithms, in memory of float64."""
    x = tl.load(row_ptr, mask=mask, other=0.0).to(tl.int64, bitcast=True)
    return unpack(tl.where(mask, x, DEAD))  # which packed is itself


@labels_last
@triton.jit
def narrow_durations_kernel(
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
    """As `duration_gradient_kernel`, of the sequences that are not apart; a float32 `gradient`."""
    ROWS: tl.constexpr = G * KT
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    T, C, K = sizes.T, sizes.C, sizes.K
    label = tl.arange(0, CP)
    inside = label < C
    k = tl.program_id(0) * KT + 1 + tl.arange(0, ROWS)[:, None]
    if G > 1:
        k = tl.program_id(0) * KT + 1 + (tl.arange(0, ROWS) % KT)[:, None]
    log_z = tl.load(messages.log_z + b)
    mine = is_apart(apart_ptr, b) == 0
    within = (k <= K) & inside[None, :] & mine
    length = tl.load(sizes.lengths + b).to(tl.int32)
    bias = tl.load(log_window_ptr + k * CP + label[None, :], mask=within, other=float("-inf"))
    bias = tl.where(log_z > float("-inf"), bias, float("-inf"))
    bias = tl.where(allowed(bias), fixed_of(bias) - fixed_of(finite(log_z)), DEAD)
    bias_whole, bias_rest = unpack(pack(bias))
    begin = chunk * span
    stop = tl.minimum(begin + span, length)
    if bounds_ptr is not None:
        begin = tl.maximum(begin, tl.load(bounds_ptr + 2 * b).to(tl.int32))
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * b + 1).to(tl.int32))
    stop = tl.where(mine, stop, begin)
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
    total = tl.zeros([ROWS, CP], tl.float32)
    lost = tl.zeros([ROWS, CP], tl.float32)
    for first in range(steps_from, steps_to, _UNROLL):
        part = tl.zeros([ROWS, CP], tl.float32)
        for i in tl.static_range(_UNROLL):
            p = first + i
            if G > 1:
                p = begin + p
            here = inside & (p < last)
            x = tl.load(scores_ptr + row + p * C + column, mask=here, other=float("-inf"))
            u_whole, u_rest = _packed(messages.forward + row + p * C + column, here)
            born = tl.where(allowed(x), born, p + 1)
            source = p + 1 - k
            live = within & (source >= born)
            place = messages.backward + row + source * C + label[None, :]
            h_whole, h_rest = _packed(place, live)
            part += exp_pair(h_whole + bias_whole + u_whole, h_rest + bias_rest + u_rest)
        # What the sum cannot hold of the part is subtracted from the next one.
        part -= lost
        new = total + part
        lost = (new - total) - part
        total = new
    if G > 1:
        total = tl.sum(tl.reshape(total, [G, KT, CP]), 0)
    k = tl.program_id(0) * KT + 1 + tl.arange(0, KT)[:, None]
    within = (k <= K) & (label < C)[None, :] & mine
    place = gradient_ptr + ((b * tl.num_programs(1) + chunk) * K + k - 1) * C + label[None, :]
    tl.store(place, tl.minimum(total, length.to(tl.float32) / k.to(tl.float32)), mask=within)

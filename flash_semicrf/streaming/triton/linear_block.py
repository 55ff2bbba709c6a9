"""One block of R steps of a pass, in linear float64: no exp or log on the chain from step to step.

Accumulator i holds exp(log alpha of step i, less closing score), relative to the block's offset, of the
segments taken up so far, their content up to the present position included. A step multiplies the
accumulators by exp(score), reads one as alpha, multiplies it by exp(A) into the next source and
adds that source, times W, to the later accumulators. Sources before the block come in R x R tiles of
multiply-adds; each older block is scaled by the product of the scores and of the rescaling since.

A block certifies itself: every value that something feeds lies in [`LOW`, `HIGH`], and what
underflow may have dropped, followed through the rescaling, is far below `LOW`. Whoever gets False
redoes the block in the log domain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import (
    allowed,
    exp_wide,
    exponent_of,
    power_of_two,
    round_whole,
)

__all__ = ["far_window", "linear_steps", "load_tile", "score_factors"]

LOW = tl.constexpr(1e-200)
HIGH = tl.constexpr(1e60)
_DROPPED = tl.constexpr(1e-300)  # bound of what one block can lose to underflow
_HARMLESS = tl.constexpr(1e-220)
_SMALLEST_FACTOR = tl.constexpr(1e-100)


@triton.jit
def score_factors(x, R: tl.constexpr):
    """(exp(x_i - v_i), v_i, ok) with whole v_i near the largest score of each row."""
    factors = ()
    shifts = ()
    ok = x[0] == x[0]
    for i in tl.static_range(R):
        top = tl.max(x[i], 0).to(tl.float64)
        shift = round_whole(tl.where(allowed(top), top, 0.0))
        live = allowed(x[i])
        factor = exp_wide(tl.where(live, x[i].to(tl.float64) - shift, -1000.0))
        ok = ok & ((factor > _SMALLEST_FACTOR) | (live == 0))
        factors = factors + (factor,)
        shifts = shifts + (shift,)
    return factors, shifts, ok


@triton.jit
def load_tile(
    window_ptr, sources_ptr, rates_ptr, block, back, ring, label, CP: tl.constexpr, R: tl.constexpr
):
    """(rate, the R shortest durations of the tile, its R sources) of the block `back` before."""
    back = tl.maximum(back, 1)
    slot = (block + ring - back) % ring
    rate = tl.load(rates_ptr + slot * CP + label)
    row = window_ptr + (R * (back - 1) + 2) * CP + label
    source_row = sources_ptr + slot * R * CP + label
    older = ()
    sources = ()
    for m in tl.static_range(R):
        older = older + (tl.load(row + m * CP),)
        sources = sources + (tl.load(source_row + m * CP),)
    return rate, older, sources


@triton.jit
def far_window(
    window_ptr, sources_ptr, rates_ptr, block, blocks, ring, label,
    CP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """What the sources of the last `blocks` blocks give to the R outputs of this one.

    Returns
    -------
    sums : tuple of R tensors of shape (CP,)
    lost : Tensor of shape (CP,)
        Bound of what underflow dropped.
    """
    sums = ()
    newer = ()  # W of the R - 1 longest durations of the tile
    for _i in tl.static_range(R):
        sums = sums + (tl.zeros([CP], tl.float64),)
    row = window_ptr + (R * blocks + 2) * CP + label
    for m in tl.static_range(R - 1):
        newer = newer + (tl.load(row + m * CP),)
    lost = tl.zeros([CP], tl.float64)
    rate, older, sources = load_tile(
        window_ptr, sources_ptr, rates_ptr, block, blocks, ring, label, CP, R
    )
    for back in range(blocks, 0, -1):
        lost = lost * rate + _DROPPED
        tile = older + newer
        scaled = ()
        for i in tl.static_range(R):
            scaled = scaled + (sums[i] * rate,)
        sums = scaled
        current = sources
        # The next tile is under way while this one is multiplied.
        rate, older, sources = load_tile(
            window_ptr, sources_ptr, rates_ptr, block, back - 1, ring, label, CP, R
        )
        for r in tl.static_range(R):
            added = ()
            for i in tl.static_range(R):
                added = added + (sums[i] + current[r] * tile[i - r + R - 1],)
            sums = added
        newer = tile[: R - 1]
    return sums, lost


@triton.jit
def _at_least(value, exempt):
    """Whether a value is in range, or is zero by right."""
    return (value <= HIGH) & ((value >= LOW) | exempt)


@triton.jit
def linear_steps(
    g, sums, near, factors, shifts, matrix, opening, closing, x,
    step, length, K, newest, born, final_row, final_offset, offset,
    message_row, offset_row, source_row, direction, stride, C, label,
    HAS_BOUNDARY: tl.constexpr, KEEP: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Run the R steps after `step`.

    Parameters
    ----------
    g : Tensor of shape (CP,)
        Source of `step`, without its opening score, relative to `offset`.
    sums, near, factors, shifts, opening, closing, x : tuples of R
    matrix : Tensor of shape (CP dst, CP src)
        exp(A).
    newest, born : int32 Tensors of shape (CP,)
        Step of the newest live source; first step whose source no forbidden position cut off.
    final_row, final_offset
        The last message so far asked for: that of step `length`.

    Returns
    -------
    The state after the block, its scaled sources being written to `source_row`, and `ok`.
    """
    ok = g == g
    sources = ()
    for i in tl.static_range(R):
        here = step + i
        if HAS_BOUNDARY:
            source = g * opening[i]
            ok = ok & _at_least(source, (g == 0) | (opening[i] == 0))
        else:
            source = g
        sources = sources + (source,)
        newest = tl.where(source > 0, here, newest)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (sums[j],)
            else:
                pushed = pushed + ((sums[j] + source * near[j - i]) * factors[i],)
        sums = pushed
        born = tl.where(allowed(x[i]), born, here + 1)
        alpha = sums[i]
        dead = (newest < born) | (newest <= here - K)
        ok = ok & _at_least(alpha, dead)
        if HAS_BOUNDARY:
            ok = ok & _at_least(alpha * closing[i], dead | (closing[i] == 0))
            alpha = alpha * closing[i]
        offset += shifts[i]
        if KEEP:
            inside = here < length
            place = (i * direction) * stride
            tl.store(message_row + place + label, alpha, mask=inside & (label < C))
            tl.store(offset_row + i * direction, offset, mask=inside)
        last = here + 1 == length
        final_row = tl.where(last, alpha, final_row)
        final_offset = tl.where(last, offset, final_offset)
        g = tl.sum(matrix * alpha[None, :], 1)
        ok = ok & _at_least(g, g == 0)

    top = tl.max(g, 0)
    exponent = tl.where(top > 0, exponent_of(top), 0)
    scale = power_of_two(-exponent)
    suffix = scale
    for r in tl.static_range(R):
        suffix = suffix * factors[R - 1 - r]
        tl.store(source_row + (R - 1 - r) * CP + label, sources[R - 1 - r] * suffix)
    return g * scale, sources, newest, born, final_row, final_offset, offset, exponent, suffix, ok

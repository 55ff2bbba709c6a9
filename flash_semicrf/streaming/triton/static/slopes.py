"""Steady changes of the duration scores, found on the device; see `flash_semicrf.streaming.tilt`.

The passes take window sums of exp(D_k - a·k) and add a label's slope a to its score of every
position, which leaves every segment its score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.tilt import STEEP
from flash_semicrf.streaming.triton.numerics import allowed, finite, wide

__all__ = ["find_slopes"]

_STEEP = tl.constexpr(STEEP)


@triton.jit
def _range(bias_ptr, slope, label, C, K, CP, ROWS):
    """Largest less smallest of D_k - slope·k of each label, among those that do not forbid."""
    high = tl.full([CP], float("-inf"), tl.float64)
    low = tl.full([CP], float("inf"), tl.float64)
    for first in range(1, K + 1, ROWS):
        k = first + tl.arange(0, ROWS)[:, None]
        inside = (k <= K) & (label < C)[None, :]
        place = bias_ptr + (k - 1) * C + label[None, :]
        bias = wide(tl.load(place, mask=inside, other=float("-inf")))
        x = bias - slope[None, :] * k
        high = tl.maximum(high, tl.max(x, 0))
        low = tl.minimum(low, tl.min(tl.where(allowed(bias), x, float("inf")), 0))
    return tl.where(high > low, high - low, 0.0)


@triton.jit
def _keys(bias_ptr, first, label, C, K, CP, ROWS):
    """D_{k+1} - D_k of ROWS durations from `first` on as whole numbers in [0, 2^32), which order as
    float32 do; 2^32 where one of them forbids."""
    k = first + tl.arange(0, ROWS)[:, None]
    inside = (k < K) & (label < C)[None, :]
    place = bias_ptr + (k - 1) * C + label[None, :]
    here = wide(tl.load(place, mask=inside, other=float("-inf")))
    after = wide(tl.load(place + C, mask=inside, other=float("-inf")))
    both = allowed(here) & allowed(after)
    change = tl.where(both, after - here, 0.0).to(tl.float32)
    bits = change.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -1 - bits.to(tl.int64) - 0x80000000, bits.to(tl.int64)) + 0x80000000
    return tl.where(both, key, 1 << 32)


@triton.jit
def _count(bias_ptr, bound, label, C, K, CP, ROWS):
    """Number of keys below `bound` (CP,)."""
    total = tl.zeros([CP], tl.int32)
    for first in range(1, K, ROWS):
        key = _keys(bias_ptr, first, label, C, K, CP, ROWS)
        total += tl.sum((key < bound[None, :]).to(tl.int32), 0)
    return total


@triton.jit
def _growth(bias_ptr, label, C, K, CP, ROWS):
    """Largest D_k / k of all labels and durations, 0 where nothing is allowed."""
    best = tl.full([CP], float("-inf"), tl.float64)
    for first in range(1, K + 1, ROWS):
        k = first + tl.arange(0, ROWS)[:, None]
        inside = (k <= K) & (label < C)[None, :]
        place = bias_ptr + (k - 1) * C + label[None, :]
        bias = wide(tl.load(place, mask=inside, other=float("-inf")))
        best = tl.maximum(best, tl.max(bias / k, 0))
    return finite(tl.max(best, 0))


@triton.jit
def find_slopes(bias_ptr, label, C, K, CP, ROWS):
    """Slopes of the labels (CP,) float64, as `flash_semicrf.streaming.tilt.slopes_of` has them, and
    what the best segment gets for each of its positions, or 0 where all slopes are.

    The median is that of the changes from one duration to the next, where both are allowed; to
    float32, since every slope leaves the same sums. Where D is flat it is looked at once.
    """
    slope = tl.zeros([CP], tl.float64)
    growth = tl.zeros([], tl.float64)
    before = _range(bias_ptr, slope, label, C, K, CP, ROWS)
    if tl.max(before, 0) > _STEEP:
        key = tl.zeros([CP], tl.int64)
        wanted = (_count(bias_ptr, key + (1 << 32), label, C, K, CP, ROWS) + 1) // 2
        for i in range(32):  # the largest number that fewer keys than wanted are below
            further = key + (tl.full([], 1, tl.int64) << (31 - i))
            fewer = _count(bias_ptr, further, label, C, K, CP, ROWS) < wanted
            key = tl.where(fewer, further, key)
        key -= 0x80000000
        bits = tl.where(key < 0, -1 - (key + 0x80000000), key).to(tl.int32)
        median = bits.to(tl.float32, bitcast=True).to(tl.float64)
        median = tl.where((wanted > 0) & (tl.abs(median) < 1e37), median, 0.0)
        after = _range(bias_ptr, median, label, C, K, CP, ROWS)
        slope = tl.where((before > _STEEP) & (after < 0.5 * before), median, 0.0)
        if tl.max(tl.abs(slope), 0) > 0.0:
            growth = _growth(bias_ptr, label, C, K, CP, ROWS)
    return slope, growth

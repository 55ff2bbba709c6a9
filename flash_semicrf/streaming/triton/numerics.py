"""Scalar helpers of the kernels: what forbids, and how messages are written.

A message is a nonnegative number times exp(offset), the offset being common to all labels of its
row: exact zero where nothing reaches the label, else its value. Rows of blocks that were computed
in the log domain hold log value - 1 in its place, with an offset not below any of them, so that the
sign tells the two forms apart and no range is too wide for either.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "allowed",
    "common_part",
    "decode_linear",
    "decode_log",
    "encode_log",
    "exp_rows",
    "exp_wide",
    "exponent_of",
    "finite",
    "high_word",
    "is_deep",
    "power_of_two",
    "probability",
    "round_whole",
    "settled",
    "wide",
]

# A little above flash_semicrf.problem.potentials.NEG_INF, which float32 rounds to -0.99999997e38.
_NEG_INF = tl.constexpr(-9.9e37)

# As flash_semicrf.streaming.assembly.HUGE.
_HUGE = tl.constexpr(1e4)


@triton.jit
def wide(x):
    """float64, everything that forbids as -inf."""
    x = x.to(tl.float64)
    return tl.where(x > _NEG_INF, x, float("-inf"))


@triton.jit
def finite(x):
    """0 in place of -inf: for levels that a term of -inf is compared with."""
    return tl.where(x > float("-inf"), x, 0.0)


@triton.jit
def allowed(x):
    """Whether a score does not forbid."""
    return x > _NEG_INF


@triton.jit
def common_part(top):
    """Part of all scores of a position that is taken out: the largest, `top`, if huge."""
    return tl.where(allowed(top) & (tl.abs(top) > _HUGE), top, 0.0)


@triton.jit
def settled(x, top):
    """Scores of a position less their common part, float64, -inf where they forbid."""
    rest = x.to(tl.float64) - common_part(top).to(tl.float64)
    return tl.where(allowed(x), rest, float("-inf"))


@triton.jit
def is_deep(x, top):
    """Whether a score is so far below the largest that a running sum which took it in would lose
    the digits of all others: a mask that is not -inf."""
    return allowed(x) & (x < top - _HUGE)


@triton.jit
def round_whole(x):
    """Nearest whole number of a float64 below 2^51 in size."""
    magic = 6755399441055744.0
    return (x + magic) - magic


@triton.jit
def power_of_two(exponent):
    """2^exponent as float64, for an integer exponent in [-1000, 1000]."""
    bits = (exponent.to(tl.int64) + 1023) << 52
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def exp_wide(x, SHORT: tl.constexpr = False):
    """exp(x) for float64 x < 709 without branches; 0 below -708.

    Relative error 1e-15, with SHORT 1e-11: far below the rounding of float32 inputs.
    """
    # exp(x) = 2^n exp(r), |r| <= log(2)/2; the sum with 1.5 * 2^52 holds n in its low bits.
    magic = 6755399441055744.0
    shifted = x * 1.4426950408889634 + magic
    n = shifted - magic
    r = x - n * 6.93147180369123816490e-01
    r = r - n * 1.90821492927058770002e-10
    if SHORT:
        p = r * 2.7557319223985893e-06 + 2.48015873015873e-05
    else:
        p = r * 2.08767569878681e-09 + 2.505210838544172e-08
        p = p * r + 2.7557319223985893e-07
        p = p * r + 2.7557319223985893e-06
        p = p * r + 2.48015873015873e-05
    p = p * r + 1.984126984126984e-04
    p = p * r + 1.388888888888889e-03
    p = p * r + 8.333333333333333e-03
    p = p * r + 4.1666666666666664e-02
    p = p * r + 1.6666666666666666e-01
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    bits = p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)
    return tl.where(x > -708.0, bits.to(tl.float64, bitcast=True), 0.0)


@triton.jit
def probability(x):
    """exp(x), at most 1; 0 for NaN, which rows of no position hold."""
    return exp_wide(tl.where(x > 0.0, 0.0, x))


@triton.jit
def exp_rows(rows, SHORT, R):
    """exp_wide of R = 4 or 8 rows: written once, for the compiler's sake, and run on all."""
    tl.static_assert((R == 4) or (R == 8))
    first = tl.join(tl.join(rows[0], rows[1]), tl.join(rows[2], rows[3]))
    if R == 4:
        x01, x23 = tl.split(exp_wide(first, SHORT))
        found = tl.split(x01) + tl.split(x23)
    else:
        second = tl.join(tl.join(rows[4], rows[5]), tl.join(rows[6], rows[7]))
        low, high = tl.split(exp_wide(tl.join(first, second), SHORT))
        x01, x23 = tl.split(low)
        x45, x67 = tl.split(high)
        found = tl.split(x01) + tl.split(x23) + tl.split(x45) + tl.split(x67)
    return found


@triton.jit
def high_word(x):
    """Sign, exponent and leading bits of a float64 as int32, which order as x >= 0 does."""
    return (x.to(tl.int64, bitcast=True) >> 32).to(tl.int32)


@triton.jit
def exponent_of(x):
    """Integer e with 2^e <= x < 2^(e+1) for a positive normal float64; clamped to [-1000, 1000]."""
    e = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
    return tl.minimum(tl.maximum(e, -1000), 1000).to(tl.int32)


@triton.jit
def decode_linear(value):
    """Value of a stored message, relative to its offset."""
    return tl.where(value < 0, tl.exp(value + 1.0), value)


@triton.jit
def decode_log(value):
    """Logarithm of a stored message, relative to its offset; -inf for zero."""
    positive = value > 0
    log = tl.where(positive, tl.log(tl.where(positive, value, 1.0)), value + 1.0)
    return tl.where(value == 0, float("-inf"), log)


@triton.jit
def encode_log(log):
    """Stored form of a logarithm <= 0, relative to its offset."""
    return tl.where(log > _NEG_INF, log - 1.0, 0.0)

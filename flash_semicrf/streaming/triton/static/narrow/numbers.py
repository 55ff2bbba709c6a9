"""Numbers of float32 mantissas and int32 exponents, by whole-number instructions.

Labels drift apart by thousands of powers of two within a window, and float32 holds 126 of them, so
that every label has an exponent of its own. Contents, running sums of scores, are fixed-point
numbers of powers of two, whole + fraction / 2^30: they are summed without any rounding, so that
both directions give each segment the same content.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "ALIVE",
    "FARTHEST",
    "LN2",
    "LOW",
    "LOWEST",
    "NOTHING",
    "NOWHERE",
    "advance",
    "as_float64",
    "factor_of",
    "is_usable",
    "normal",
    "parts_of",
    "power",
    "powers",
]

NOTHING = tl.constexpr(-(1 << 29))
"""Exponent of zero."""

NOWHERE = tl.constexpr(-(1 << 30))
"""Exponent below that of zero."""

ALIVE = tl.constexpr(-(1 << 28))
"""Exponents of numbers are above."""

FARTHEST = tl.constexpr(1 << 26)
"""Size that contents and the exponents of messages may not reach."""

LOWEST = tl.constexpr(-(1 << 26))
"""Exponent at which those of tables end."""

LOW = tl.constexpr(2.0**-80)
"""Sums from here on, relative to their largest possible term, have lost nothing that counts: terms
below 2^-126 are dropped, and there are fewer than 2^16."""

LN2 = tl.constexpr(0.6931471805599453)

_LARGEST = tl.constexpr(5e3)  # less than half of HUGE: no score is deep below another
_UNIT = tl.constexpr(1 << 30)
_HALF = tl.constexpr(1 << 29)


@triton.jit
def power(exponent):
    """2^exponent as float32 for exponents up to 127; 0 below -126."""
    return ((tl.maximum(exponent, -127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def normal(x, exponent):
    """Mantissa in [1, 2) and exponent of x 2^exponent; 0 and NOTHING for 0. x is not subnormal."""
    bits = x.to(tl.int32, bitcast=True)
    positive = bits > 0
    mantissa = tl.where(positive, (bits & 0x7FFFFF) | 0x3F800000, 0)
    exponent = tl.where(positive, exponent + (bits >> 23) - 127, NOTHING)
    return mantissa.to(tl.float32, bitcast=True), exponent


@triton.jit
def as_float64(mantissa, exponent):
    """mantissa 2^exponent, for a normal mantissa and exponents above -1000; 0 for 0."""
    bits = mantissa.to(tl.int32, bitcast=True)
    wide = ((exponent + 1023).to(tl.int64) << 52) | ((bits & 0x7FFFFF).to(tl.int64) << 29)
    return tl.where(bits > 0, wide, 0).to(tl.float64, bitcast=True)


@triton.jit
def is_usable(x):
    """Whether a score is of ordinary size; what forbids is not asked."""
    return tl.abs(x) <= _LARGEST


@triton.jit
def parts_of(x):
    """Whole and fraction of x log2(e), int32, for a usable float32 x."""
    n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0  # 1.5 * 2^23: the nearest whole number
    r = x - n * 0.693359375  # log(2) in 9 bits and the rest: the first product is exact
    r = r + n * 2.12194440054690582767e-04
    return n.to(tl.int32), (r * 1549082004.6798701).to(tl.int32)  # log2(e) * 2^30


@triton.jit
def advance(whole, fraction, more_whole, more_fraction):
    """Sum of two fixed-point numbers, with the fraction in [-1/2, 1/2]."""
    fraction = fraction + more_fraction
    carry = (fraction + _HALF) >> 30
    return whole + more_whole + carry, fraction - carry * _UNIT


@triton.jit
def powers(fraction):
    """2^f and 2^-f of a fraction f: even and odd part of one series."""
    y = fraction.to(tl.float32) * 6.455436167865482e-10  # log(2) / 2^30
    z = y * y
    even = z * 2.48015873015873e-05 + 1.388888888888889e-03
    even = (even * z + 4.1666666666666664e-02) * z + 0.5
    odd = z * 1.984126984126984e-04 + 8.333333333333333e-03
    odd = ((odd * z + 1.6666666666666666e-01) * z) * y + y
    even = even * z
    return 1.0 + (even + odd), 1.0 + (even - odd)


@triton.jit
def factor_of(x, allowed):
    """exp(x) as float32 and exponent; 0 and 0 where it is not allowed."""
    whole, fraction = parts_of(tl.where(allowed, x, 0.0))
    up, _down = powers(fraction)
    return tl.where(allowed, up, 0.0), whole

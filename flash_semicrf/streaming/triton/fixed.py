"""Logarithms to base 2 in fixed point, for devices that are slow in float64.

A logarithm is an int64, 32 bits of it the fraction: sums are exact, and are integer instructions.
Natural logarithms up to 2^24 in size, and what is far below them, are meant; `fixed_of` keeps
larger ones beyond 2^27, and `DEAD` stands for the logarithm of zero. Linear numbers are float32.
Nothing here is an instruction on float64: its bits are taken apart as those of an integer.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "DEAD",
    "exp_fixed",
    "exp_pair",
    "fixed_log",
    "fixed_message",
    "fixed_of",
    "pack",
    "unpack",
    "whole_of",
]

DEAD = tl.constexpr(-(1 << 60))
"""Logarithm of zero, packed or not. Several may be added, and what else is in the sum is small
beside it."""

_HALF = tl.constexpr(1 << 31)
_UNIT = tl.constexpr(2.0**-32)
_LOG2_E = tl.constexpr(0xB8AA3B295C17F0BC)  # times 2^63
_FIXED_LOG2_E = tl.constexpr(6196328019)  # times 2^32


@triton.jit
def fixed_of(x):
    """log2(e) x of a float32 or float64, to 2^-31."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        exponent = ((bits >> 52) & 0x7FF).to(tl.int32) - 1023
        mantissa = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
        negative = bits < 0
    else:
        short = x.to(tl.float32).to(tl.int32, bitcast=True)
        exponent = ((short >> 23) & 0xFF) - 127
        mantissa = ((short & 0x7FFFFF) | 0x800000).to(tl.int64) << 29
        negative = short < 0
    exponent = tl.minimum(tl.maximum(exponent, -35), 27)
    size = (mantissa << 8) >> (28 - exponent).to(tl.int64)
    size = tl.umulhi(size.to(tl.uint64), tl.full([], _LOG2_E, tl.uint64)).to(tl.int64) << 1
    return tl.where(negative, -size, size)


@triton.jit
def _fixed_log_of(exponent, fraction):
    """log2 of a number by its exponent and the 23 bits after it, rounded: up to 2^23, inclusive."""
    x = (fraction + 0x3F800000).to(tl.float32, bitcast=True)
    above = x > 1.4142135
    x = tl.where(above, 0.5 * x, x)
    exponent += above.to(tl.int32)
    rest = (tl.log2(x) * 2147483648.0).to(tl.int32)
    return (exponent.to(tl.int64) << 32) + (rest.to(tl.int64) << 1)


@triton.jit
def fixed_log(x):
    """log2 of a normal, positive float32."""
    bits = x.to(tl.int32, bitcast=True)
    return _fixed_log_of((bits >> 23) - 127, bits & 0x7FFFFF)


@triton.jit
def fixed_message(value, IN_LOGS):
    """log2 of a stored message, relative to its offset; see `numerics`.

    Without IN_LOGS the message is of a row in linear numbers.
    """
    bits = value.to(tl.int64, bitcast=True)
    high = (bits >> 32).to(tl.int32)
    low = bits.to(tl.int32)
    fraction = ((high & 0xFFFFF) << 3) + (((low >> 28) & 0xF) + 1 >> 1)
    log = _fixed_log_of(((high >> 20) & 0x7FF) - 1023, fraction)
    if IN_LOGS:
        log = tl.where(high < 0, fixed_of(value) + _FIXED_LOG2_E, log)
    return tl.where((bits << 1) == 0, DEAD, log)


@triton.jit
def whole_of(x):
    """Nearest whole number, int32."""
    return ((x + _HALF) >> 32).to(tl.int32)


@triton.jit
def exp_pair(whole, rest):
    """2^(whole + rest) in float32, rest within 3; 0 below 2^-120."""
    bits = tl.exp2(rest).to(tl.int32, bitcast=True) + (whole << 23)
    return tl.where(whole < -120, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def exp_fixed(x):
    """2^x in float32, x below 100; 0 below 2^-120."""
    return exp_pair(whole_of(x), x.to(tl.int32).to(tl.float32) * _UNIT)


@triton.jit
def pack(x):
    """The whole number nearest to x and what is left as float32, in the bits of an int64.

    Both parts of a sum are the sums of the parts: one integer addition and one in float32.
    """
    rest = x.to(tl.int32).to(tl.float32) * _UNIT
    return (whole_of(x).to(tl.int64) << 32) | (
        rest.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    )


@triton.jit
def unpack(packed):
    """Parts of a packed logarithm: int32, and float32 within 1/2."""
    return (packed >> 32).to(tl.int32), packed.to(tl.int32).to(tl.float32, bitcast=True)

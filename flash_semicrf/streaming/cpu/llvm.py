"""LLVM code of vectors of eight float64, for the intrinsics that the kernels are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

__all__ = [
    "CONTRACT",
    "EXP_FLOOR",
    "F64",
    "I32",
    "I64",
    "INTEGERS",
    "LANES",
    "VECTOR",
    "across",
    "add",
    "constant",
    "exp",
    "integer",
    "load",
    "log",
    "max_plus",
    "maximum",
    "minimum",
    "multiply_add",
    "pointer",
    "polynomial",
    "splat",
    "store",
    "total",
]

LANES = 8
"""float64 per vector; rows are padded to a multiple of it."""

F64, I64, I32 = ir.DoubleType(), ir.IntType(64), ir.IntType(32)
VECTOR, INTEGERS = ir.VectorType(F64, LANES), ir.VectorType(I64, LANES)
CONTRACT = ("contract",)


def constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def integer(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * LANES)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(
        one, undefined, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    )


def load(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=8)


def store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, VECTOR.as_pointer()), align=8)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)


def max_plus(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    both = builder.fadd(a, b)
    return builder.select(builder.fcmp_ordered(">", both, c), both, c)


def maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def pointer(context, builder, array_type, array, offset) -> ir.Value:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


def polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: list[float]) -> ir.Value:
    """Sum of coefficients[i] * x**i by Estrin's scheme: short dependency chains."""
    terms = [constant(value) for value in coefficients]
    power = x
    while len(terms) > 1:
        paired = [
            multiply_add(builder, terms[i + 1], power, terms[i]) if i + 1 < len(terms) else terms[i]
            for i in range(0, len(terms), 2)
        ]
        terms, power = paired, builder.fmul(power, power)
    return terms[0]


_LN2_HIGH = float.fromhex("0x1.62e42fefa0000p-1")
_LN2_LOW = (math.log(2) - _LN2_HIGH) + 2.3190468138462996e-17  # beyond float64's log(2)
_ROUND = 1.5 * 2.0**52
EXP_FLOOR = -650.0
_EXP_CEILING = 700.0
_EXP_SERIES = [1.0 / math.factorial(i) for i in range(14)]
_LOG_SERIES = [2.0 / (2 * i + 1) for i in range(12)]


def exp(
    builder: ir.IRBuilder,
    x: ir.Value,
    floor: float = EXP_FLOOR,
    ceiling: float = _EXP_CEILING,
) -> ir.Value:
    """exp(x) = 2**n * exp(r), |r| <= log(2)/2; 0 below the floor, never above exp(ceiling)."""
    keep = builder.fcmp_ordered(">", x, constant(floor))
    x = builder.select(keep, x, constant(0.0))
    x = builder.select(builder.fcmp_ordered("<", x, constant(ceiling)), x, constant(ceiling))
    shifted = builder.fadd(builder.fmul(x, constant(1.0 / math.log(2))), constant(_ROUND))
    n = builder.fsub(shifted, constant(_ROUND))
    r = multiply_add(builder, n, constant(-_LN2_HIGH), x)
    r = multiply_add(builder, n, constant(-_LN2_LOW), r)
    value = polynomial(builder, r, _EXP_SERIES)
    exponent = builder.shl(builder.bitcast(shifted, INTEGERS), integer(52))
    scaled = builder.bitcast(builder.add(builder.bitcast(value, INTEGERS), exponent), VECTOR)
    return builder.select(keep, scaled, constant(0.0))


def log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(x) = n log 2 + 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)); x > 0, normal."""
    bits = builder.bitcast(x, INTEGERS)
    # Adding (1 - sqrt(1/2))'s mantissa carries into the exponent exactly when m >= sqrt(2).
    carry = integer(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
    biased = builder.add(bits, carry)
    n = builder.sub(builder.lshr(biased, integer(52)), integer(1023))
    mantissa = builder.add(
        builder.and_(biased, integer(0x000FFFFFFFFFFFFF)), integer(0x3FE6A09E667F3BCD)
    )
    m = builder.bitcast(mantissa, VECTOR)
    s = builder.fdiv(builder.fsub(m, constant(1.0)), builder.fadd(m, constant(1.0)))
    series = builder.fmul(s, polynomial(builder, builder.fmul(s, s), _LOG_SERIES))
    exponent = builder.sitofp(n, VECTOR)
    low = multiply_add(builder, exponent, constant(_LN2_LOW), series)
    return multiply_add(builder, exponent, constant(_LN2_HIGH), low)


def minimum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def across(builder: ir.IRBuilder, vector: ir.Value, pick: Callable) -> ir.Value:
    """Reduce the lanes of a vector to a scalar by halving."""
    width = LANES
    while width > 1:
        width //= 2
        upper = ir.Constant(ir.VectorType(I32, LANES), [(j + width) % LANES for j in range(LANES)])
        vector = pick(builder, vector, builder.shuffle_vector(vector, vector, upper))
    return builder.extract_element(vector, I32(0))


def total(builder: ir.IRBuilder, *terms: ir.Value) -> ir.Value:
    total = terms[0]
    for term in terms[1:]:
        total = builder.fadd(total, term)
    return total

"""LLVM code of vectors of eight float64, for the intrinsics that the kernels are made of.

`routine` makes an intrinsic of a function that writes code, `loop` writes a loop; the others write
one operation each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""float64 per vector; rows are padded to a multiple of it."""

F64, I64, I32, I8 = ir.DoubleType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
VECTOR, INTEGERS = ir.VectorType(F64, LANES), ir.VectorType(I64, LANES)
CONTRACT = ("contract",)


def routine(returned: types.Type) -> Callable[[Callable], Callable]:
    """Decorator: an intrinsic from the function that writes its code.

    ``write(builder, *arguments)`` gets an array as the pointer to its data, a tuple as a list, and
    returns the result, or None where `returned` is void. Numbers in tuples are int64; every other
    number is int64 or float64, as it is in the call.
    """

    def decorate(write: Callable) -> Callable:
        def codegen(context, builder, signature, values):
            arguments = [
                context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else cgutils.unpack_tuple(builder, value)
                if isinstance(kind, types.BaseTuple)
                else value
                for kind, value in zip(signature.args, values, strict=True)
            ]
            result = write(builder, *arguments)
            return context.get_dummy_value() if result is None else result

        @intrinsic
        @functools.wraps(write)
        def called(typing_context, *given):
            return returned(*map(_argument_type, given)), codegen

        return called

    return decorate


def _argument_type(given: types.Type) -> types.Type:
    if isinstance(given, types.Array):
        return given
    if isinstance(given, types.BaseTuple):
        return types.UniTuple(types.int64, len(given))
    return types.int64 if isinstance(given, types.Integer) else types.float64


def loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    step: int,
    carried: Sequence[ir.Value],
    body: Callable,
    at_least_once: bool = False,
) -> list[ir.Value]:
    """Write ``for i in range(0, count, step)``; return the carried values after its last round.

    ``body(i, *carried)`` writes one round and returns the new values. With `at_least_once` the
    count is positive, which is not checked.
    """
    entry = builder.block
    inside, done = (builder.append_basic_block(name) for name in ("loop", "done"))
    starts = [I64(0), *carried]
    if at_least_once:
        builder.branch(inside)
    else:
        builder.cbranch(builder.icmp_signed(">", count, I64(0)), inside, done)
    builder.position_at_end(inside)
    values = [builder.phi(start.type) for start in starts]
    new = [builder.add(values[0], I64(step)), *body(*values)]
    last = builder.block
    builder.cbranch(builder.icmp_signed("<", new[0], count), inside, done)
    builder.position_at_end(done)
    ends = [] if at_least_once else [builder.phi(start.type) for start in starts]
    for phi, start, value in zip(values + ends, 2 * starts, 2 * new, strict=False):
        phi.add_incoming(start, entry)
        phi.add_incoming(value, last)
    return (ends or new)[1:]


def constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def integer(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * LANES)


def picked(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of the vectors a and b, those of b numbered from `LANES` on."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, LANES), lanes))


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, scalar, I32(0))
    return picked(builder, one, undefined, [0] * LANES)


def _place(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.bitcast(builder.gep(base, [offset]), VECTOR.as_pointer())


def load(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return builder.load(_place(builder, base, offset), align=8)


def store(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: ir.Value) -> None:
    builder.store(value, _place(builder, base, offset), align=8)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)


def max_plus(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    both = builder.fadd(a, b)
    return builder.select(builder.fcmp_ordered(">", both, c), both, c)


def maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


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
    builder: ir.IRBuilder, x: ir.Value, floor: float = EXP_FLOOR, ceiling: float = _EXP_CEILING
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
        upper = [(j + width) % LANES for j in range(LANES)]
        vector = pick(builder, vector, picked(builder, vector, vector, upper))
    return builder.extract_element(vector, I32(0))

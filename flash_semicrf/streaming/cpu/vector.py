"""Vector building blocks of the CPU kernels.

Numba's loops over shifted windows are not vectorised by LLVM, so the three inner loops that take
nearly all the time are given to it as explicit vectors of eight float64, which it lowers to
whatever the machine has (AVX-512, AVX2, SSE2, NEON):

- `multiply_tile`, `max_tile`: ``out[j] (+)= sum_i x[i] * y[i + j]`` in registers, with any strides:
  the window sum, its gradient and the products with the transition matrix are all of this form;
- `exp_row`, `log_row`: exponential and logarithm of a row, to about 1e-16 relative;
- `log_sum_row` and its like: a step's arithmetic on rows of a workspace, with the minimum or
  maximum
  that tells whether all went well.

All take flat float64 arrays and offsets in elements. Nothing is bounds-checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flash_semicrf.streaming.cpu.jit import inlined

__all__ = [
    "LANES",
    "TILE",
    "add_to",
    "difference_row",
    "exp_row",
    "exp_shifted_row",
    "factor_row",
    "fill",
    "exp_sum_row",
    "log_row",
    "log_scaled_row",
    "log_sum_row",
    "max_row",
    "max_tile",
    "multiply_tile",
    "multiply_tile8",
    "push_rows",
    "scale_row",
]

LANES = 8
"""float64 per vector; rows are padded to a multiple of it."""

TILE = 16
"""Outputs that `multiply_tile` and `max_tile` keep in registers."""

_F64, _I64, _I32 = ir.DoubleType(), ir.IntType(64), ir.IntType(32)
_VEC, _IVEC = ir.VectorType(_F64, LANES), ir.VectorType(_I64, LANES)
_CONTRACT = ("contract",)


def _const(value: float) -> ir.Constant:
    return ir.Constant(_VEC, [value] * LANES)


def _iconst(value: int) -> ir.Constant:
    return ir.Constant(_IVEC, [value] * LANES)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VEC, ir.Undefined)
    one = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(
        one, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _load(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(pointer, _VEC.as_pointer()), align=8)


def _store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    builder.store(value, builder.bitcast(pointer, _VEC.as_pointer()), align=8)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _max_plus(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    both = builder.fadd(a, b)
    return builder.select(builder.fcmp_ordered(">", both, c), both, c)


def _max(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _pointer(context, builder, array_type, array, offset) -> ir.Value:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


@inlined
def fill(values, first, count, value):
    """``values[first : first + count] = value``; a slice would take seconds to compile."""
    for i in range(first, first + count):
        values[i] = value


@inlined
def add_to(values, first, count, value):
    """``values[first : first + count] += value``."""
    for i in range(first, first + count):
        values[i] += value


def _tile(width: int, step: Callable, join: Callable) -> Callable:
    """Make the intrinsic of a register tile of `width` outputs.

    Sources are taken two at a time into two sets of accumulators, so that the latency of one
    multiply-add is hidden behind the other's.
    """
    vectors = width // LANES

    @intrinsic
    def tile(typingctx, x, x_offset, x_stride, y, y_offset, y_stride, count, out, out_offset):
        signature = types.void(
            x, types.int64, types.int64, y, types.int64, types.int64, types.int64, out, types.int64
        )

        def codegen(context, builder, signature, args):
            x_pointer = _pointer(context, builder, signature.args[0], args[0], args[1])
            y_pointer = _pointer(context, builder, signature.args[3], args[3], args[4])
            out_pointer = _pointer(context, builder, signature.args[7], args[7], args[8])
            x_stride, y_stride, count = args[2], args[5], args[6]

            def add_source(index: ir.Value, accumulators: list[ir.Value]) -> list[ir.Value]:
                source = _splat(
                    builder, builder.load(builder.gep(x_pointer, [builder.mul(index, x_stride)]))
                )
                row = builder.gep(y_pointer, [builder.mul(index, y_stride)])
                return [
                    step(builder, source, _load(builder, builder.gep(row, [_I64(v * LANES)])), a)
                    for v, a in enumerate(accumulators)
                ]

            outputs = [builder.gep(out_pointer, [_I64(v * LANES)]) for v in range(vectors)]
            even = [_load(builder, pointer) for pointer in outputs]
            neutral = _const(0.0) if step is _fma else _const(-math.inf)
            odd = [neutral] * vectors
            pairs = builder.ashr(count, _I64(1))

            entry = builder.block
            loop = builder.append_basic_block("tile.pairs")
            after = builder.append_basic_block("tile.after")
            single = builder.append_basic_block("tile.single")
            done = builder.append_basic_block("tile.done")

            builder.cbranch(builder.icmp_signed(">", pairs, _I64(0)), loop, after)
            builder.position_at_end(loop)
            pair = builder.phi(_I64)
            phis = [builder.phi(_VEC) for _ in range(2 * vectors)]
            first = builder.shl(pair, _I64(1))
            new_even = add_source(first, phis[:vectors])
            new_odd = add_source(builder.add(first, _I64(1)), phis[vectors:])
            following = builder.add(pair, _I64(1))
            pair.add_incoming(_I64(0), entry)
            pair.add_incoming(following, loop)
            for phi, start, new in zip(phis, even + odd, new_even + new_odd, strict=True):
                phi.add_incoming(start, entry)
                phi.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)

            builder.position_at_end(after)
            ends = [builder.phi(_VEC) for _ in range(2 * vectors)]
            for phi, start, new in zip(ends, even + odd, new_even + new_odd, strict=True):
                phi.add_incoming(start, entry)
                phi.add_incoming(new, loop)
            totals = [
                join(builder, a, b) for a, b in zip(ends[:vectors], ends[vectors:], strict=True)
            ]
            is_odd = builder.trunc(count, ir.IntType(1))
            builder.cbranch(is_odd, single, done)
            builder.position_at_end(single)
            with_last = add_source(builder.sub(count, _I64(1)), totals)
            builder.branch(done)

            builder.position_at_end(done)
            final = [builder.phi(_VEC) for _ in range(vectors)]
            for phi, total, last in zip(final, totals, with_last, strict=True):
                phi.add_incoming(total, after)
                phi.add_incoming(last, single)
            for value, pointer in zip(final, outputs, strict=True):
                _store(builder, value, pointer)
            return context.get_dummy_value()

        return signature, codegen

    return tile


def _fadd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


multiply_tile = _tile(TILE, _fma, _fadd)
"""``out[j] += sum_{i < count} x[i * x_stride] * y[i * y_stride + j]`` for 16 j."""

multiply_tile8 = _tile(LANES, _fma, _fadd)
"""The same for 8 j."""

max_tile = _tile(TILE, _max_plus, _max)
"""``out[j] = max(out[j], max_{i < count} x[i * x_stride] + y[i * y_stride + j])`` for 16 j."""


def _polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: list[float]) -> ir.Value:
    """Sum of coefficients[i] * x**i by Estrin's scheme: short dependency chains."""
    terms = [_const(value) for value in coefficients]
    power = x
    while len(terms) > 1:
        paired = [
            _fma(builder, terms[i + 1], power, terms[i]) if i + 1 < len(terms) else terms[i]
            for i in range(0, len(terms), 2)
        ]
        terms, power = paired, builder.fmul(power, power)
    return terms[0]


_LN2_HIGH = float.fromhex("0x1.62e42fefa0000p-1")
_LN2_LOW = (math.log(2) - _LN2_HIGH) + 2.3190468138462996e-17  # beyond float64's log(2)
_ROUND = 1.5 * 2.0**52
_EXP_FLOOR = -650.0
_EXP_CEILING = 700.0
_EXP_SERIES = [1.0 / math.factorial(i) for i in range(14)]
_LOG_SERIES = [2.0 / (2 * i + 1) for i in range(12)]


def _exp(
    builder: ir.IRBuilder,
    x: ir.Value,
    floor: float = _EXP_FLOOR,
    ceiling: float = _EXP_CEILING,
) -> ir.Value:
    """exp(x) = 2**n * exp(r), |r| <= log(2)/2; 0 below the floor, never above exp(ceiling)."""
    keep = builder.fcmp_ordered(">", x, _const(floor))
    x = builder.select(keep, x, _const(0.0))
    x = builder.select(builder.fcmp_ordered("<", x, _const(ceiling)), x, _const(ceiling))
    shifted = builder.fadd(builder.fmul(x, _const(1.0 / math.log(2))), _const(_ROUND))
    n = builder.fsub(shifted, _const(_ROUND))
    r = _fma(builder, n, _const(-_LN2_HIGH), x)
    r = _fma(builder, n, _const(-_LN2_LOW), r)
    value = _polynomial(builder, r, _EXP_SERIES)
    exponent = builder.shl(builder.bitcast(shifted, _IVEC), _iconst(52))
    scaled = builder.bitcast(builder.add(builder.bitcast(value, _IVEC), exponent), _VEC)
    return builder.select(keep, scaled, _const(0.0))


def _log(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """log(x) = n log 2 + 2 artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2)); x > 0, normal."""
    bits = builder.bitcast(x, _IVEC)
    # Adding (1 - sqrt(1/2))'s mantissa carries into the exponent exactly when m >= sqrt(2).
    carry = _iconst(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
    biased = builder.add(bits, carry)
    n = builder.sub(builder.lshr(biased, _iconst(52)), _iconst(1023))
    mantissa = builder.add(
        builder.and_(biased, _iconst(0x000FFFFFFFFFFFFF)), _iconst(0x3FE6A09E667F3BCD)
    )
    m = builder.bitcast(mantissa, _VEC)
    s = builder.fdiv(builder.fsub(m, _const(1.0)), builder.fadd(m, _const(1.0)))
    series = builder.fmul(s, _polynomial(builder, builder.fmul(s, s), _LOG_SERIES))
    exponent = builder.sitofp(n, _VEC)
    low = _fma(builder, exponent, _const(_LN2_LOW), series)
    return _fma(builder, exponent, _const(_LN2_HIGH), low)


def _map(function: Callable) -> Callable:
    """Make the intrinsic that applies `function` to ``count`` (a multiple of 8) elements."""

    @intrinsic
    def row(typingctx, x, x_offset, out, out_offset, count):
        signature = types.void(x, types.int64, out, types.int64, types.int64)

        def codegen(context, builder, signature, args):
            source = _pointer(context, builder, signature.args[0], args[0], args[1])
            target = _pointer(context, builder, signature.args[2], args[2], args[3])
            entry = builder.block
            loop = builder.append_basic_block("row.loop")
            done = builder.append_basic_block("row.done")
            builder.cbranch(builder.icmp_signed(">", args[4], _I64(0)), loop, done)
            builder.position_at_end(loop)
            i = builder.phi(_I64)
            value = function(builder, _load(builder, builder.gep(source, [i])))
            _store(builder, value, builder.gep(target, [i]))
            following = builder.add(i, _I64(LANES))
            i.add_incoming(_I64(0), entry)
            i.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[4]), loop, done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return signature, codegen

    return row


exp_row = _map(_exp)
"""``out[i] = exp(x[i])``; exactly 0 below -650, so that products of two stay normal numbers."""

log_row = _map(_log)
"""``out[i] = log(x[i])`` of positive normal numbers; other elements get a finite or NaN value."""


def _row(body: Callable, reduce: str | None = None) -> Callable:
    """Make the intrinsic of one operation on rows of a workspace.

    Its call is ``op(work, a, b, c, s, out, count)``: a, b, c and out are offsets of rows of `count`
    (a multiple of 8) elements in the flat array `work`, s a float. ``body(builder, a, b, c, s)``
    gets vectors (functions that load them, so that unused rows are not touched) and returns the
    vector to write, or None, and the one to reduce, or None. The call returns the minimum or
    maximum of the latter, or 0.
    """

    @intrinsic
    def row(typingctx, work, a, b, c, s, out, count):
        integers = (types.int64,) * 3
        signature = types.float64(work, *integers, types.float64, types.int64, types.int64)

        def codegen(context, builder, signature, args):
            rows = [
                _pointer(context, builder, signature.args[0], args[0], args[i])
                for i in (1, 2, 3, 5)
            ]
            scalar = _splat(builder, args[4])
            neutral = _const(math.inf if reduce == "min" else -math.inf)
            entry = builder.block
            loop = builder.append_basic_block("row.loop")
            done = builder.append_basic_block("row.done")
            builder.cbranch(builder.icmp_signed(">", args[6], _I64(0)), loop, done)
            builder.position_at_end(loop)
            i, extreme = builder.phi(_I64), builder.phi(_VEC)
            inputs = [lambda p=p: _load(builder, builder.gep(p, [i])) for p in rows[:3]]
            value, watched = body(builder, *inputs, scalar)
            if value is not None:
                _store(builder, value, builder.gep(rows[3], [i]))
            following = builder.add(i, _I64(LANES))
            new = extreme
            if watched is not None:
                pick = _max if reduce == "max" else _min
                new = pick(builder, watched, extreme)
            i.add_incoming(_I64(0), entry)
            i.add_incoming(following, loop)
            extreme.add_incoming(neutral, entry)
            extreme.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[6]), loop, done)
            builder.position_at_end(done)
            final = builder.phi(_VEC)
            final.add_incoming(neutral, entry)
            final.add_incoming(new, loop)
            if reduce is None:
                return context.get_constant(types.float64, 0.0)
            return _across(builder, final, _max if reduce == "max" else _min)

        return signature, codegen

    return row


def _min(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _across(builder: ir.IRBuilder, vector: ir.Value, pick: Callable) -> ir.Value:
    """Reduce the lanes of a vector to a scalar by halving."""
    width = LANES
    while width > 1:
        width //= 2
        upper = ir.Constant(ir.VectorType(_I32, LANES), [(j + width) % LANES for j in range(LANES)])
        vector = pick(builder, vector, builder.shuffle_vector(vector, vector, upper))
    return builder.extract_element(vector, _I32(0))


exp_shifted_row = _row(lambda builder, a, b, c, s: (_exp(builder, builder.fsub(a(), s)), None))
"""``out = exp(a - s)``, 0 where that is below e^-650."""

factor_row = _row(
    lambda builder, a, b, c, s: (_exp(builder, builder.fsub(a(), s), -350.0, 340.0), None)
)
"""``out = exp(a - s)``, 0 where that is below e^-350: no product of two is subnormal (slow)."""


def _add(builder: ir.IRBuilder, *terms: ir.Value) -> ir.Value:
    total = terms[0]
    for term in terms[1:]:
        total = builder.fadd(total, term)
    return total


def _log_sum(builder, a, b, c, s):
    sums = c()
    return _add(builder, a(), b(), _log(builder, sums)), sums


log_sum_row = _row(_log_sum, "min")
"""``out = a + b + log(c)``; returns min(c)."""


def _log_scaled(builder, a, b, c, s):
    sums = c()
    return _add(builder, a(), s, _log(builder, sums)), sums


log_scaled_row = _row(_log_scaled, "min")
"""``out = a + s + log(c)``; returns min(c)."""

max_row = _row(lambda builder, a, b, c, s: (None, a()), "max")
"""Returns max(a)."""


def _exp_sum(builder, a, b, c, s):
    total = _add(builder, a(), b(), s)
    return _exp(builder, total), total


exp_sum_row = _row(_exp_sum, "max")
"""``out = exp(a + b + s)``; returns max(a + b + s)."""


def _difference(builder, a, b, c, s):
    value = builder.fsub(a(), b())
    return value, value


difference_row = _row(_difference, "max")
"""``out = a - b``; returns its maximum."""


def _scaled(builder, a, b, c, s):
    value = builder.fmul(a(), s)
    keep = builder.fcmp_ordered(">", value, _const(math.exp(_EXP_FLOOR)))
    return builder.select(keep, value, _const(0.0)), None


scale_row = _row(_scaled)
"""``out = a * s`` for a >= 0, and 0 where that is below e^-650: nothing becomes subnormal."""


@intrinsic
def push_rows(typingctx, work, source, weights, weight_offset, out, padded, count):
    """``work[out + r * padded + c] += work[source + c] * weights[weight_offset + r * padded + c]``.

    For r < count, c < padded: one source added to `count` rows of sums, each with its weights.
    """
    signature = types.void(work, types.int64, weights, *(types.int64,) * 4)

    def codegen(context, builder, signature, args):
        row = _pointer(context, builder, signature.args[0], args[0], args[1])
        weight = _pointer(context, builder, signature.args[2], args[2], args[3])
        target = _pointer(context, builder, signature.args[0], args[0], args[4])
        padded, count = args[5], args[6]
        entry = builder.block
        columns = builder.append_basic_block("push.columns")
        inner = builder.append_basic_block("push.inner")
        next_column = builder.append_basic_block("push.next")
        done = builder.append_basic_block("push.done")
        builder.cbranch(builder.icmp_signed(">", count, _I64(0)), columns, done)
        builder.position_at_end(columns)
        c = builder.phi(_I64)
        value = _load(builder, builder.gep(row, [c]))
        builder.branch(inner)
        builder.position_at_end(inner)
        r, offset = builder.phi(_I64), builder.phi(_I64)
        place = builder.gep(target, [offset])
        factor = _load(builder, builder.gep(weight, [offset]))
        _store(builder, _fma(builder, value, factor, _load(builder, place)), place)
        r_next, offset_next = builder.add(r, _I64(1)), builder.add(offset, padded)
        for phi, first, following in ((r, _I64(0), r_next), (offset, c, offset_next)):
            phi.add_incoming(first, columns)
            phi.add_incoming(following, inner)
        builder.cbranch(builder.icmp_signed("<", r_next, count), inner, next_column)
        builder.position_at_end(next_column)
        c_next = builder.add(c, _I64(LANES))
        c.add_incoming(_I64(0), entry)
        c.add_incoming(c_next, next_column)
        builder.cbranch(builder.icmp_signed("<", c_next, padded), columns, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen

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

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.jit import inlined
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = [
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


TILE = 16
"""Outputs that `multiply_tile` and `max_tile` keep in registers."""


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
            x_pointer = llvm.pointer(context, builder, signature.args[0], args[0], args[1])
            y_pointer = llvm.pointer(context, builder, signature.args[3], args[3], args[4])
            out_pointer = llvm.pointer(context, builder, signature.args[7], args[7], args[8])
            x_stride, y_stride, count = args[2], args[5], args[6]

            def add_source(index: ir.Value, accumulators: list[ir.Value]) -> list[ir.Value]:
                source = llvm.splat(
                    builder, builder.load(builder.gep(x_pointer, [builder.mul(index, x_stride)]))
                )
                row = builder.gep(y_pointer, [builder.mul(index, y_stride)])
                return [
                    step(
                        builder,
                        source,
                        llvm.load(builder, builder.gep(row, [llvm.I64(v * LANES)])),
                        a,
                    )
                    for v, a in enumerate(accumulators)
                ]

            outputs = [builder.gep(out_pointer, [llvm.I64(v * LANES)]) for v in range(vectors)]
            even = [llvm.load(builder, pointer) for pointer in outputs]
            neutral = llvm.constant(0.0) if step is llvm.multiply_add else llvm.constant(-math.inf)
            odd = [neutral] * vectors
            pairs = builder.ashr(count, llvm.I64(1))

            entry = builder.block
            loop = builder.append_basic_block("tile.pairs")
            after = builder.append_basic_block("tile.after")
            single = builder.append_basic_block("tile.single")
            done = builder.append_basic_block("tile.done")

            builder.cbranch(builder.icmp_signed(">", pairs, llvm.I64(0)), loop, after)
            builder.position_at_end(loop)
            pair = builder.phi(llvm.I64)
            phis = [builder.phi(llvm.VECTOR) for _ in range(2 * vectors)]
            first = builder.shl(pair, llvm.I64(1))
            new_even = add_source(first, phis[:vectors])
            new_odd = add_source(builder.add(first, llvm.I64(1)), phis[vectors:])
            following = builder.add(pair, llvm.I64(1))
            pair.add_incoming(llvm.I64(0), entry)
            pair.add_incoming(following, loop)
            for phi, start, new in zip(phis, even + odd, new_even + new_odd, strict=True):
                phi.add_incoming(start, entry)
                phi.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)

            builder.position_at_end(after)
            ends = [builder.phi(llvm.VECTOR) for _ in range(2 * vectors)]
            for phi, start, new in zip(ends, even + odd, new_even + new_odd, strict=True):
                phi.add_incoming(start, entry)
                phi.add_incoming(new, loop)
            totals = [
                join(builder, a, b) for a, b in zip(ends[:vectors], ends[vectors:], strict=True)
            ]
            is_odd = builder.trunc(count, ir.IntType(1))
            builder.cbranch(is_odd, single, done)
            builder.position_at_end(single)
            with_last = add_source(builder.sub(count, llvm.I64(1)), totals)
            builder.branch(done)

            builder.position_at_end(done)
            final = [builder.phi(llvm.VECTOR) for _ in range(vectors)]
            for phi, total, last in zip(final, totals, with_last, strict=True):
                phi.add_incoming(total, after)
                phi.add_incoming(last, single)
            for value, pointer in zip(final, outputs, strict=True):
                llvm.store(builder, value, pointer)
            return context.get_dummy_value()

        return signature, codegen

    return tile


multiply_tile = _tile(TILE, llvm.multiply_add, llvm.add)
"""``out[j] += sum_{i < count} x[i * x_stride] * y[i * y_stride + j]`` for 16 j."""

multiply_tile8 = _tile(LANES, llvm.multiply_add, llvm.add)
"""The same for 8 j."""

max_tile = _tile(TILE, llvm.max_plus, llvm.maximum)
"""``out[j] = max(out[j], max_{i < count} x[i * x_stride] + y[i * y_stride + j])`` for 16 j."""


def _map(function: Callable) -> Callable:
    """Make the intrinsic that applies `function` to ``count`` (a multiple of 8) elements."""

    @intrinsic
    def row(typingctx, x, x_offset, out, out_offset, count):
        signature = types.void(x, types.int64, out, types.int64, types.int64)

        def codegen(context, builder, signature, args):
            source = llvm.pointer(context, builder, signature.args[0], args[0], args[1])
            target = llvm.pointer(context, builder, signature.args[2], args[2], args[3])
            entry = builder.block
            loop = builder.append_basic_block("row.loop")
            done = builder.append_basic_block("row.done")
            builder.cbranch(builder.icmp_signed(">", args[4], llvm.I64(0)), loop, done)
            builder.position_at_end(loop)
            i = builder.phi(llvm.I64)
            value = function(builder, llvm.load(builder, builder.gep(source, [i])))
            llvm.store(builder, value, builder.gep(target, [i]))
            following = builder.add(i, llvm.I64(LANES))
            i.add_incoming(llvm.I64(0), entry)
            i.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[4]), loop, done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return signature, codegen

    return row


exp_row = _map(llvm.exp)
"""``out[i] = exp(x[i])``; exactly 0 below -650, so that products of two stay normal numbers."""

log_row = _map(llvm.log)
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
                llvm.pointer(context, builder, signature.args[0], args[0], args[i])
                for i in (1, 2, 3, 5)
            ]
            scalar = llvm.splat(builder, args[4])
            neutral = llvm.constant(math.inf if reduce == "min" else -math.inf)
            entry = builder.block
            loop = builder.append_basic_block("row.loop")
            done = builder.append_basic_block("row.done")
            builder.cbranch(builder.icmp_signed(">", args[6], llvm.I64(0)), loop, done)
            builder.position_at_end(loop)
            i, extreme = builder.phi(llvm.I64), builder.phi(llvm.VECTOR)
            inputs = [lambda p=p: llvm.load(builder, builder.gep(p, [i])) for p in rows[:3]]
            value, watched = body(builder, *inputs, scalar)
            if value is not None:
                llvm.store(builder, value, builder.gep(rows[3], [i]))
            following = builder.add(i, llvm.I64(LANES))
            new = extreme
            if watched is not None:
                pick = llvm.maximum if reduce == "max" else llvm.minimum
                new = pick(builder, watched, extreme)
            i.add_incoming(llvm.I64(0), entry)
            i.add_incoming(following, loop)
            extreme.add_incoming(neutral, entry)
            extreme.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[6]), loop, done)
            builder.position_at_end(done)
            final = builder.phi(llvm.VECTOR)
            final.add_incoming(neutral, entry)
            final.add_incoming(new, loop)
            if reduce is None:
                return context.get_constant(types.float64, 0.0)
            return llvm.across(builder, final, llvm.maximum if reduce == "max" else llvm.minimum)

        return signature, codegen

    return row


exp_shifted_row = _row(lambda builder, a, b, c, s: (llvm.exp(builder, builder.fsub(a(), s)), None))
"""``out = exp(a - s)``, 0 where that is below e^-650."""

factor_row = _row(
    lambda builder, a, b, c, s: (llvm.exp(builder, builder.fsub(a(), s), -350.0, 340.0), None)
)
"""``out = exp(a - s)``, 0 where that is below e^-350: no product of two is subnormal (slow)."""


def _log_sum(builder, a, b, c, s):
    sums = c()
    return llvm.total(builder, a(), b(), llvm.log(builder, sums)), sums


log_sum_row = _row(_log_sum, "min")
"""``out = a + b + log(c)``; returns min(c)."""


def _log_scaled(builder, a, b, c, s):
    sums = c()
    return llvm.total(builder, a(), s, llvm.log(builder, sums)), sums


log_scaled_row = _row(_log_scaled, "min")
"""``out = a + s + log(c)``; returns min(c)."""

max_row = _row(lambda builder, a, b, c, s: (None, a()), "max")
"""Returns max(a)."""


def _exp_sum(builder, a, b, c, s):
    total = llvm.total(builder, a(), b(), s)
    return llvm.exp(builder, total), total


exp_sum_row = _row(_exp_sum, "max")
"""``out = exp(a + b + s)``; returns max(a + b + s)."""


def _difference(builder, a, b, c, s):
    value = builder.fsub(a(), b())
    return value, value


difference_row = _row(_difference, "max")
"""``out = a - b``; returns its maximum."""


def _scaled(builder, a, b, c, s):
    value = builder.fmul(a(), s)
    keep = builder.fcmp_ordered(">", value, llvm.constant(math.exp(llvm.EXP_FLOOR)))
    return builder.select(keep, value, llvm.constant(0.0)), None


scale_row = _row(_scaled)
"""``out = a * s`` for a >= 0, and 0 where that is below e^-650: nothing becomes subnormal."""


@intrinsic
def push_rows(typingctx, work, source, weights, weight_offset, out, padded, count):
    """``work[out + r * padded + c] += work[source + c] * weights[weight_offset + r * padded + c]``.

    For r < count, c < padded: one source added to `count` rows of sums, each with its weights.
    """
    signature = types.void(work, types.int64, weights, *(types.int64,) * 4)

    def codegen(context, builder, signature, args):
        row = llvm.pointer(context, builder, signature.args[0], args[0], args[1])
        weight = llvm.pointer(context, builder, signature.args[2], args[2], args[3])
        target = llvm.pointer(context, builder, signature.args[0], args[0], args[4])
        padded, count = args[5], args[6]
        entry = builder.block
        columns = builder.append_basic_block("push.columns")
        inner = builder.append_basic_block("push.inner")
        next_column = builder.append_basic_block("push.next")
        done = builder.append_basic_block("push.done")
        builder.cbranch(builder.icmp_signed(">", count, llvm.I64(0)), columns, done)
        builder.position_at_end(columns)
        c = builder.phi(llvm.I64)
        value = llvm.load(builder, builder.gep(row, [c]))
        builder.branch(inner)
        builder.position_at_end(inner)
        r, offset = builder.phi(llvm.I64), builder.phi(llvm.I64)
        place = builder.gep(target, [offset])
        factor = llvm.load(builder, builder.gep(weight, [offset]))
        llvm.store(
            builder, llvm.multiply_add(builder, value, factor, llvm.load(builder, place)), place
        )
        r_next, offset_next = builder.add(r, llvm.I64(1)), builder.add(offset, padded)
        for phi, first, following in ((r, llvm.I64(0), r_next), (offset, c, offset_next)):
            phi.add_incoming(first, columns)
            phi.add_incoming(following, inner)
        builder.cbranch(builder.icmp_signed("<", r_next, count), inner, next_column)
        builder.position_at_end(next_column)
        c_next = builder.add(c, llvm.I64(LANES))
        c.add_incoming(llvm.I64(0), entry)
        c.add_incoming(c_next, next_column)
        builder.cbranch(builder.icmp_signed("<", c_next, padded), columns, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen

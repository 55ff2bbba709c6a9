"""Vector building blocks of the CPU kernels.

Numba's loops over shifted windows are not vectorised by LLVM, so the three inner loops that take
nearly all the time are given to it as explicit vectors of eight float64, which it lowers to
whatever the machine has (AVX-512, AVX2, SSE2, NEON):

- `multiply_tile`, `max_tile`: ``out[j] (+)= sum_i x[i] * y[i + j]`` in registers, with any strides:
  the window sum, its gradient and the products with the transition matrix are all of this form;
- `exp_row`, `log_row`: exponential and logarithm of a row, to about 1e-16 relative;
- `log_sum_row` and its like: a step's arithmetic on rows of a workspace, with the minimum or
  maximum that shows whether all went well.

All take flat float64 arrays and offsets in elements. Nothing is bounds-checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import inlined

__all__ = [
    "TILE",
    "add_to",
    "difference_row",
    "exp_row",
    "exp_shifted_row",
    "exp_sum",
    "exp_sums",
    "factor_row",
    "fill",
    "log_row",
    "log_scaled_row",
    "log_sum_row",
    "max_row",
    "max_sum",
    "max_tile",
    "multiply_row",
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
    columns = [llvm.I64(j) for j in range(0, width, LANES)]
    neutral = llvm.constant(0.0 if step is llvm.multiply_add else -math.inf)

    @llvm.routine(types.void)
    def tile(builder, x, x_offset, x_stride, y, y_offset, y_stride, count, out, out_offset):
        x, y, out = (
            builder.gep(base, [offset])
            for base, offset in ((x, x_offset), (y, y_offset), (out, out_offset))
        )

        def add_source(index: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            source = builder.load(builder.gep(x, [builder.mul(index, x_stride)]))
            source = llvm.splat(builder, source)
            row = builder.gep(y, [builder.mul(index, y_stride)])
            return [
                step(builder, source, llvm.load(builder, row, column), sum_)
                for column, sum_ in zip(columns, sums, strict=True)
            ]

        def add_two(pair: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            first = builder.shl(pair, llvm.I64(1))
            even = add_source(first, sums[: len(columns)])
            return even + add_source(builder.add(first, llvm.I64(1)), sums[len(columns) :])

        def add_last(_: ir.Value, *sums: ir.Value) -> list[ir.Value]:
            return add_source(builder.sub(count, llvm.I64(1)), sums)

        starts = [llvm.load(builder, out, column) for column in columns]
        pairs = builder.ashr(count, llvm.I64(1))
        sums = llvm.loop(builder, pairs, 1, [*starts, *[neutral] * len(columns)], add_two)
        even, odd = sums[: len(columns)], sums[len(columns) :]
        sums = [join(builder, a, b) for a, b in zip(even, odd, strict=True)]
        sums = llvm.loop(builder, builder.and_(count, llvm.I64(1)), 1, sums, add_last)
        for value, column in zip(sums, columns, strict=True):
            llvm.store(builder, value, out, column)

    return tile


multiply_tile = _tile(TILE, llvm.multiply_add, ir.IRBuilder.fadd)
"""``out[j] += sum_{i < count} x[i * x_stride] * y[i * y_stride + j]`` for 16 j."""

multiply_tile8 = _tile(LANES, llvm.multiply_add, ir.IRBuilder.fadd)
"""The same for 8 j."""

max_tile = _tile(TILE, llvm.max_plus, llvm.maximum)
"""``out[j] = max(out[j], max_{i < count} x[i * x_stride] + y[i * y_stride + j])`` for 16 j."""


def _map(function: Callable) -> Callable:
    """Make the intrinsic that applies `function` to ``count`` (a multiple of 8) elements."""

    @llvm.routine(types.void)
    def row(builder, x, x_offset, out, out_offset, count):
        x, out = builder.gep(x, [x_offset]), builder.gep(out, [out_offset])

        def apply(i: ir.Value) -> list[ir.Value]:
            llvm.store(builder, function(builder, llvm.load(builder, x, i)), out, i)
            return []

        llvm.loop(builder, count, LANES, [], apply)

    return row


exp_row = _map(llvm.exp)
"""``out[i] = exp(x[i])``; exactly 0 below -650, so that products of two stay normal numbers."""

log_row = _map(llvm.log)
"""``out[i] = log(x[i])`` of positive normal numbers; other elements get a finite or NaN value."""


def _row(body: Callable, pick: Callable | None = None) -> Callable:
    """Make the intrinsic of one operation on rows of a workspace.

    Its call is ``op(work, a, b, c, s, out, count)``: a, b, c and out are offsets of rows of `count`
    (a multiple of 8) elements in the flat array `work`, s a float. ``body(builder, a, b, c, s)``
    gets vectors and returns the one to write, or None, and the one to reduce by `pick`,
    `llvm.minimum` or `llvm.maximum`. The call returns the minimum or maximum of the latter, or 0.
    """
    neutral = llvm.constant(math.inf if pick is llvm.minimum else -math.inf)

    @llvm.routine(types.float64)
    def row(builder, work, a, b, c, s, out, count):
        *inputs, out = (builder.gep(work, [offset]) for offset in (a, b, c, out))
        scalar = llvm.splat(builder, s)

        def apply(i: ir.Value, *extreme: ir.Value) -> list[ir.Value]:
            value, watched = body(builder, *(llvm.load(builder, x, i) for x in inputs), scalar)
            if value is not None:
                llvm.store(builder, value, out, i)
            return [pick(builder, watched, old) for old in extreme]

        extreme = llvm.loop(builder, count, LANES, [neutral] if pick else [], apply)
        return llvm.across(builder, *extreme, pick) if pick else llvm.F64(0.0)

    return row


exp_shifted_row = _row(lambda builder, a, b, c, s: (llvm.exp(builder, builder.fsub(a, s)), None))
"""``out = exp(a - s)``, 0 where that is below e^-650."""

factor_row = _row(
    lambda builder, a, b, c, s: (llvm.exp(builder, builder.fsub(a, s), -350.0, 340.0), None)
)
"""``out = exp(a - s)``, 0 where that is below e^-350: no product of two is subnormal (slow)."""

log_sum_row = _row(
    lambda builder, a, b, c, s: (builder.fadd(builder.fadd(a, b), llvm.log(builder, c)), c),
    llvm.minimum,
)
"""``out = a + b + log(c)``; returns min(c)."""

log_scaled_row = _row(
    lambda builder, a, b, c, s: (builder.fadd(builder.fadd(a, s), llvm.log(builder, c)), c),
    llvm.minimum,
)
"""``out = a + s + log(c)``; returns min(c)."""

max_row = _row(lambda builder, a, b, c, s: (None, a), llvm.maximum)
"""Returns max(a)."""

difference_row = _row(lambda builder, a, b, c, s: 2 * (builder.fsub(a, b),), llvm.maximum)
"""``out = a - b``; returns its maximum."""


def _scaled(builder, a, b, c, s):
    value = builder.fmul(a, s)
    keep = builder.fcmp_ordered(">", value, llvm.constant(math.exp(llvm.EXP_FLOOR)))
    return builder.select(keep, value, llvm.constant(0.0)), None


scale_row = _row(_scaled)
"""``out = a * s`` for a >= 0, and 0 where that is below e^-650: nothing becomes subnormal."""


_TOGETHER = 4
"""Vectors that the reductions of sums take at once, to hide latencies."""


def _sums(builder, x, x_offset, y, y_offset) -> Callable:
    """A function from an index to the `_TOGETHER` vectors ``x + y`` from there, or fewer."""
    x, y = builder.gep(x, [x_offset]), builder.gep(y, [y_offset])

    def added(i: ir.Value, count: int) -> list[ir.Value]:
        places = [builder.add(i, llvm.I64(LANES * j)) for j in range(count)]
        return [builder.fadd(llvm.load(builder, x, j), llvm.load(builder, y, j)) for j in places]

    return added


def _reduce(builder, count: ir.Value, starts: Sequence[ir.Value], step: Callable) -> list[ir.Value]:
    """``step(i, vectors, *carried)`` over `count` elements, a multiple of 8, by vectors."""
    wide = LANES * _TOGETHER
    most = builder.and_(count, llvm.I64(-wide))
    found = llvm.loop(builder, most, wide, starts, lambda i, *carried: step(i, _TOGETHER, *carried))
    return llvm.loop(
        builder,
        builder.sub(count, most),
        LANES,
        found,
        lambda i, *carried: step(builder.add(i, most), 1, *carried),
    )


@llvm.routine(types.float64)
def max_sum(builder, x, x_offset, y, y_offset, count):
    """Return ``max_{i < count} x[x_offset + i] + y[y_offset + i]``, count a multiple of 8."""
    added = _sums(builder, x, x_offset, y, y_offset)

    def step(i: ir.Value, vectors: int, *tops: ir.Value) -> list[ir.Value]:
        new = [llvm.maximum(builder, a, b) for a, b in zip(added(i, vectors), tops, strict=False)]
        return [*new, *tops[vectors:]]

    tops = _reduce(builder, count, [llvm.constant(-math.inf)] * _TOGETHER, step)
    top = functools.reduce(functools.partial(llvm.maximum, builder), tops)
    return llvm.across(builder, top, llvm.maximum)


def _if_any_counts(builder: ir.IRBuilder, terms: list[ir.Value], total: ir.Value) -> ir.Value:
    """`total` plus the exponentials of the vectors `terms`, unless all are below e^-45."""
    largest = functools.reduce(functools.partial(llvm.maximum, builder), terms)
    counts = builder.fcmp_ordered(">", largest, llvm.constant(-45.0))
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", builder.bitcast(counts, llvm.I8), llvm.I8(0))):
        more = functools.reduce(builder.fadd, [llvm.exp(builder, term) for term in terms], total)
        inside = builder.block
    joined = builder.phi(llvm.VECTOR)
    joined.add_incoming(total, before)
    joined.add_incoming(more, inside)
    return joined


@llvm.routine(types.float64)
def exp_sum(builder, x, x_offset, y, y_offset, top, count):
    """Return ``sum_{i < count} exp(x[x_offset + i] + y[y_offset + i] - top)``.

    The count is a multiple of 8; vectors without a term of at least e^-45 are passed over.
    """
    added = _sums(builder, x, x_offset, y, y_offset)
    top = llvm.splat(builder, top)

    def step(i: ir.Value, vectors: int, total: ir.Value) -> list[ir.Value]:
        terms = [builder.fsub(value, top) for value in added(i, vectors)]
        return [_if_any_counts(builder, terms, total)]

    (total,) = _reduce(builder, count, [llvm.constant(0.0)], step)
    return llvm.across(builder, total, ir.IRBuilder.fadd)


@llvm.routine(types.void)
def exp_sums(builder, x, x_offset, y, y_offset, y_stride, count, tops, out, place):
    """``out[place + j] = sum_{i < count} exp(x[i] + y[i * y_stride + j] - tops[place + j])``, 8 j.

    `x` and `y` are read from their offsets on. A term below e^-45 may be passed over.
    """
    x, y = builder.gep(x, [x_offset]), builder.gep(y, [y_offset])
    top = llvm.load(builder, tops, place)

    def step(i: ir.Value, total: ir.Value) -> list[ir.Value]:
        source = llvm.splat(builder, builder.load(builder.gep(x, [i])))
        term = builder.fadd(source, llvm.load(builder, y, builder.mul(i, y_stride)))
        return [_if_any_counts(builder, [builder.fsub(term, top)], total)]

    (total,) = llvm.loop(builder, count, 1, [llvm.constant(0.0)], step)
    llvm.store(builder, total, out, place)


@inlined
def multiply_row(x, x_place, x_stride, y, y_place, length, count, out, out_place):
    """Add the product of `count` factors with a matrix, rows of `length` whole vectors, to a row.

    ``out[out_place + j] += sum_i x[x_place + i * x_stride] * y[y_place + i * length + j]``
    """
    for j in range(0, length - LANES, TILE):
        multiply_tile(x, x_place, x_stride, y, y_place + j, length, count, out, out_place + j)
    if length % TILE:
        j = length - LANES
        multiply_tile8(x, x_place, x_stride, y, y_place + j, length, count, out, out_place + j)


@llvm.routine(types.void)
def push_rows(builder, work, source, weights, weight_offset, out, padded, count):
    """``work[out + r * padded + c] += work[source + c] * weights[weight_offset + r * padded + c]``.

    For r < count, c < padded: one source added to `count` rows of sums, each with its weights.
    """
    weights, out = builder.gep(weights, [weight_offset]), builder.gep(work, [out])
    source = builder.gep(work, [source])

    def push_column(c: ir.Value) -> list[ir.Value]:
        value = llvm.load(builder, source, c)

        def push(_: ir.Value, place: ir.Value) -> list[ir.Value]:
            factor, before = (llvm.load(builder, base, place) for base in (weights, out))
            llvm.store(builder, llvm.multiply_add(builder, value, factor, before), out, place)
            return [builder.add(place, padded)]

        llvm.loop(builder, count, 1, [c], push, at_least_once=True)
        return []

    with builder.if_then(builder.icmp_signed(">", count, llvm.I64(0))):
        llvm.loop(builder, padded, LANES, [], push_column, at_least_once=True)

"""Products of blocks of positions for eight sequences at once, sums in registers.

Places are as in `flash_semicrf.streaming.cpu.lanes.rows`. A vector that is loaded serves for up to
`STEPS` multiply-adds: the windows are larger than a first-level cache, and a sum that waited for
the one before it would take four times as long.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = [
    "STEPS",
    "WIDTH",
    "add_correlation",
    "add_pair_outer",
    "add_products",
    "add_single_outer",
    "sum_narrow_tile",
    "sum_tile",
]

STEPS = 8
"""Positions of a block, and outputs whose sums are kept in registers."""

WIDTH = 4
"""Outputs of the narrower tile: rows of factors are padded to a multiple of it."""


def _splat_at(builder: ir.IRBuilder, x: ir.Value, i: int) -> ir.Value:
    """Element i of x in all lanes."""
    return llvm.splat(builder, builder.load(builder.gep(x, [llvm.I64(i)])))


def _row_of(builder: ir.IRBuilder, place: list[ir.Value], j: ir.Value) -> ir.Value:
    """Offset of row j of a place (offset, step of j, ...)."""
    return builder.add(place[0], builder.mul(j, place[1]))


def _tile(width: int) -> Callable:
    """Make the intrinsic of a tile of `width` outputs."""

    @llvm.routine(types.void)
    def tile(builder, x, x_place, y, y_place, out_place, count, rows):
        def sum_row(j: ir.Value) -> list[ir.Value]:
            x_start, y_start, out = (_row_of(builder, p, j) for p in (x_place, y_place, out_place))

            def add(_: ir.Value, x_at: ir.Value, y_at: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                vector, factors = llvm.load(builder, y, y_at), builder.gep(x, [x_at])
                new = [
                    llvm.multiply_add(builder, _splat_at(builder, factors, i), vector, total)
                    for i, total in enumerate(sums)
                ]
                return [builder.add(x_at, x_place[2]), builder.add(y_at, y_place[2]), *new]

            zeros = [llvm.constant(0.0)] * width
            _, _, *sums = llvm.loop(builder, count, 1, [x_start, y_start, *zeros], add)
            for i, total in enumerate(sums):
                place = builder.add(out, builder.mul(out_place[2], llvm.I64(i)))
                llvm.store(builder, total, y, place)
            return []

        llvm.loop(builder, rows, 1, [], sum_row)

    return tile


sum_tile = _tile(STEPS)
"""``out[r, j] = sum_{i < count} x[r, i + j] * y[r, i]`` for 8 j and r < rows, x of numbers.

`x_place`, `y_place` and `out_place` are (offset, step of r, step of i or j); those of j in x
follow each other. y and out are vectors of one workspace.
"""

sum_narrow_tile = _tile(WIDTH)
"""The same for 4 j."""


@llvm.routine(types.void)
def add_products(builder, x, x_place, y, y_place, out, count, length):
    """``out[j] += sum_{i < length} x[j, i] * y[j, i]``, x of numbers, y and out of vectors.

    `x_place` and `y_place` are (offset, step of j, step of i), `out` the offset in y of a row of
    `count` vectors. `count` and `length` are at least 1.
    """

    def add_row(j: ir.Value) -> list[ir.Value]:
        target = builder.add(out, builder.mul(j, llvm.I64(LANES)))

        def add(_: ir.Value, x_at: ir.Value, y_at: ir.Value, total: ir.Value) -> list[ir.Value]:
            factor = _splat_at(builder, builder.gep(x, [x_at]), 0)
            total = llvm.multiply_add(builder, factor, llvm.load(builder, y, y_at), total)
            return [builder.add(x_at, x_place[2]), builder.add(y_at, y_place[2]), total]

        starts = [_row_of(builder, place, j) for place in (x_place, y_place)]
        before = llvm.load(builder, y, target)
        sums = llvm.loop(builder, length, 1, [*starts, before], add, at_least_once=True)
        llvm.store(builder, sums[-1], y, target)
        return []

    llvm.loop(builder, count, 1, [], add_row, at_least_once=True)


@llvm.routine(types.void)
def add_correlation(builder, work, weights, source, row, out, out_row, labels, tiles):
    """``out[c, i] += sum_{j < 8} weights[j, c] * source[j - i, c]`` for i < 8 * tiles, c < labels.

    `weights` and `source` are offsets of row 0; rows of vectors follow each other by `row`, those
    of `source` before row 0, too. `out_row` is the step of c in out.
    """
    step = llvm.I64(LANES)

    def of_label(c: ir.Value) -> list[ir.Value]:
        column = builder.mul(c, step)
        rows = [builder.add(column, builder.mul(row, llvm.I64(j))) for j in range(STEPS)]
        factors = [llvm.load(builder, work, builder.add(weights, place)) for place in rows]
        start = builder.add(out, builder.mul(c, out_row))

        def of_tile(_: ir.Value, newest: ir.Value, target: ir.Value) -> list[ir.Value]:
            places = [builder.add(target, llvm.I64(LANES * i)) for i in range(STEPS)]
            sums = [llvm.load(builder, work, place) for place in places]
            for apart in range(1 - STEPS, STEPS):  # the sums are in the order of j
                at = builder.add(newest, builder.mul(row, llvm.I64(apart)))
                vector = llvm.load(builder, work, at)
                for i in range(max(0, -apart), min(STEPS, STEPS - apart)):
                    sums[i] = llvm.multiply_add(builder, factors[i + apart], vector, sums[i])
            for value, place in zip(sums, places, strict=True):
                llvm.store(builder, value, work, place)
            before = builder.sub(newest, builder.mul(row, llvm.I64(STEPS)))
            return [before, builder.add(target, llvm.I64(STEPS * LANES))]

        newest = builder.add(source, column)
        llvm.loop(builder, tiles, 1, [newest, start], of_tile, at_least_once=True)
        return []

    llvm.loop(builder, labels, 1, [], of_label, at_least_once=True)


def _outer(width: int) -> Callable:
    """Make the intrinsic of outer products for `width` rows of the result at a time."""

    @llvm.routine(types.void)
    def add_outer(builder, work, x, y, row, out, first, groups, labels):
        step = llvm.I64(LANES)
        rows = [builder.mul(row, llvm.I64(j)) for j in range(STEPS)]

        def of_group(group: ir.Value) -> list[ir.Value]:
            begin = builder.add(first, builder.mul(group, llvm.I64(width)))
            labels_here = [builder.add(begin, llvm.I64(i)) for i in range(width)]
            factors = []
            for label in labels_here:
                column = builder.add(x, builder.mul(label, step))
                factors.append([llvm.load(builder, work, builder.add(column, j)) for j in rows])
            targets = [builder.mul(builder.mul(label, labels), step) for label in labels_here]

            def of_label(c: ir.Value) -> list[ir.Value]:
                column = builder.mul(c, step)
                places = [builder.add(out, builder.add(t, column)) for t in targets]
                sums = [llvm.load(builder, work, place) for place in places]
                for j, at in enumerate(rows):
                    vector = llvm.load(builder, work, builder.add(y, builder.add(at, column)))
                    sums = [
                        llvm.multiply_add(builder, own[j], vector, total)
                        for own, total in zip(factors, sums, strict=True)
                    ]
                for value, place in zip(sums, places, strict=True):
                    llvm.store(builder, value, work, place)
                return []

            llvm.loop(builder, labels, 1, [], of_label, at_least_once=True)
            return []

        llvm.loop(builder, groups, 1, [], of_group)

    return add_outer


add_pair_outer = _outer(2)
"""``out[c', c] += sum_{j < 8} x[j, c'] * y[j, c]``, all of vectors.

For every c < labels and the c' of that many groups of two from `first` on. `x` and `y` are offsets
of row 0; rows follow each other by `row`.
"""

add_single_outer = _outer(1)
"""The same for groups of one."""

"""Rows of eight sequences put side by side, and taken apart again.

Of arrays (B, ..., C) in order, in which a lane's numbers begin at `firsts[lane]`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = ["gather_row", "scatter_row", "scatter_sums"]


def _places(builder: ir.IRBuilder, values: ir.Value, starts: ir.Value) -> list[ir.Value]:
    """Where the numbers of each lane begin, from a vector of indices."""
    indices = [builder.extract_element(starts, llvm.I32(lane)) for lane in range(LANES)]
    return [builder.gep(values, [index]) for index in indices]


def _integers(builder: ir.IRBuilder, array: ir.Value) -> ir.Value:
    """The eight int64 of an array."""
    return builder.load(builder.bitcast(array, llvm.INTEGERS.as_pointer()), align=8)


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """An int64 in all lanes."""
    undefined = ir.Constant(llvm.INTEGERS, ir.Undefined)
    one = builder.insert_element(undefined, number, llvm.I32(0))
    return llvm.picked(builder, one, undefined, [0] * LANES)


def _rows_of(builder, firsts, lengths, position, pace) -> tuple[ir.Value, ir.Value]:
    """Indices of the rows of a position, and which of the sequences have it."""
    alive = builder.icmp_signed("<", _spread(builder, position), _integers(builder, lengths))
    moved = _spread(builder, builder.mul(position, pace))
    return builder.add(_integers(builder, firsts), moved), alive


@llvm.routine(types.void)
def gather_row(builder, work, place, values, firsts, lengths, position, pace, count):
    """``work[place + c, lane] = values[firsts[lane] + position * pace + c]`` for c < count.

    `work` is of rows of vectors, `place` an offset in it; 0 for lanes that have ended before
    the position.
    """
    rows, alive = _rows_of(builder, firsts, lengths, position, pace)
    # Those that have ended read what begins the array.
    places = _places(builder, values, builder.select(alive, rows, llvm.integer(0)))
    wide, narrow = llvm.VECTOR, ir.VectorType(values.type.pointee, LANES)

    def of_label(c: ir.Value, at: ir.Value) -> list[ir.Value]:
        vector = ir.Constant(narrow, ir.Undefined)
        for lane, start in enumerate(places):
            number = builder.load(builder.gep(start, [c]))
            vector = builder.insert_element(vector, number, llvm.I32(lane))
        vector = vector if narrow == wide else builder.fpext(vector, wide)
        llvm.store(builder, builder.select(alive, vector, llvm.constant(0.0)), work, at)
        return [builder.add(at, llvm.I64(LANES))]

    llvm.loop(builder, count, 1, [place], of_label, at_least_once=True)


@llvm.routine(types.void)
def scatter_row(builder, work, place, values, firsts, lengths, position, count):
    """``values[firsts[lane] + position * count + c] = work[place + c, lane]``, brought to [0, 1].

    Of the lanes that have the position; the last one does.
    """
    rows, alive = _rows_of(builder, firsts, lengths, position, count)
    # What others have goes where the last one then writes.
    last = _spread(builder, builder.extract_element(rows, llvm.I32(LANES - 1)))
    places = _places(builder, values, builder.select(alive, rows, last))
    wide, narrow = llvm.VECTOR, ir.VectorType(values.type.pointee, LANES)

    def of_label(c: ir.Value, at: ir.Value) -> list[ir.Value]:
        vector = llvm.maximum(builder, llvm.load(builder, work, at), llvm.constant(0.0))
        vector = llvm.minimum(builder, vector, llvm.constant(1.0))
        vector = vector if narrow == wide else builder.fptrunc(vector, narrow)
        for lane, start in enumerate(places):
            number = builder.extract_element(vector, llvm.I32(lane))
            builder.store(number, builder.gep(start, [c]))
        return [builder.add(at, llvm.I64(LANES))]

    llvm.loop(builder, count, 1, [place], of_label, at_least_once=True)


@llvm.routine(types.void)
def scatter_sums(builder, work, place, factors, factor_place, values, firsts, shape, spoiled):
    """``values[firsts[lane] + i, j] = work[place + i, j, lane] * factors[i, j]``.

    For ``shape = (rows, columns)``, `values` flat; `place` and `factor_place` are (offset, step of
    i, step of j). What is not finite makes the vector at offset `spoiled` of `work` NaN.
    """
    places = _places(builder, values, _integers(builder, firsts))
    rows, columns = shape

    def of_row(i: ir.Value, poison: ir.Value) -> list[ir.Value]:
        starts = [builder.add(p[0], builder.mul(i, p[1])) for p in (place, factor_place)]
        row = builder.mul(i, columns)

        def of_column(j: ir.Value, at: ir.Value, factor: ir.Value, poison: ir.Value) -> list:
            number = llvm.splat(builder, builder.load(builder.gep(factors, [factor])))
            vector = builder.fmul(llvm.load(builder, work, at), number)
            index = builder.add(row, j)
            for lane, start in enumerate(places):
                number = builder.extract_element(vector, llvm.I32(lane))
                builder.store(number, builder.gep(start, [index]))
            poison = llvm.multiply_add(builder, vector, llvm.constant(0.0), poison)
            return [builder.add(at, place[2]), builder.add(factor, factor_place[2]), poison]

        inner = llvm.loop(builder, columns, 1, [*starts, poison], of_column, at_least_once=True)
        return [inner[-1]]

    before = llvm.load(builder, work, spoiled)
    (poison,) = llvm.loop(builder, rows, 1, [before], of_row, at_least_once=True)
    llvm.store(builder, poison, work, spoiled)

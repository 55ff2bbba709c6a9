"""Inverse of a cumulative sum of products, in vectors and without branches that chance decides."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = ["count_below"]

_MASK_BITS = ir.IntType(LANES)


def _running_sum(builder: ir.IRBuilder, vector: ir.Value, before: ir.Value) -> ir.Value:
    """Cumulative sum over the lanes, after the last lane of `before`."""
    zero = llvm.constant(0.0)
    distance = 1
    while distance < LANES:
        moved = [LANES] * distance + list(range(LANES - distance))
        vector = builder.fadd(vector, llvm.picked(builder, vector, zero, moved))
        distance *= 2
    return builder.fadd(vector, llvm.picked(builder, before, before, [LANES - 1] * LANES))


@llvm.routine(types.int64)
def count_below(builder, x, x_offset, y, y_offset, count, bound):
    """Number of the sums ``x[0] y[0] + ... + x[i] y[i]``, i < count, that are at most `bound`.

    Of products >= 0 that is the first index whose sum exceeds `bound`, or `count`, a multiple of 8,
    if none does.
    """
    x, y = builder.gep(x, [x_offset]), builder.gep(y, [y_offset])
    limit = llvm.splat(builder, bound)
    count_ones = builder.module.declare_intrinsic("llvm.ctpop", [_MASK_BITS])

    def add(i: ir.Value, total: ir.Value, sums: ir.Value) -> list[ir.Value]:
        products = builder.fmul(*(llvm.load(builder, base, i) for base in (x, y)))
        sums = _running_sum(builder, products, sums)
        below = builder.bitcast(builder.fcmp_ordered("<=", sums, limit), _MASK_BITS)
        ones = builder.zext(builder.call(count_ones, [below]), llvm.I64)
        return [builder.add(total, ones), sums]

    return llvm.loop(builder, count, LANES, [llvm.I64(0), llvm.constant(0.0)], add)[0]

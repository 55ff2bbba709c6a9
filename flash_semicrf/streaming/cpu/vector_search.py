"""Inverse of a cumulative sum of products, in vectors and without branches that chance decides."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = ["count_below"]

_MASK_BITS = ir.IntType(LANES)


def _picked(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Lanes of the vectors a and b, those of b numbered from `LANES` on."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(llvm.I32, LANES), lanes))


def _running_sum(builder: ir.IRBuilder, vector: ir.Value, before: ir.Value) -> ir.Value:
    """Cumulative sum over the lanes, after the last lane of `before`."""
    zero = llvm.constant(0.0)
    distance = 1
    while distance < LANES:
        moved = [LANES] * distance + list(range(LANES - distance))
        vector = builder.fadd(vector, _picked(builder, vector, zero, moved))
        distance *= 2
    return builder.fadd(vector, _picked(builder, before, before, [LANES - 1] * LANES))


@intrinsic
def count_below(typingctx, x, x_offset, y, y_offset, count, bound):
    """How many of the sums ``x[0] y[0] + ... + x[i] y[i]``, i < count, are at most `bound`.

    Of products >= 0 that is the first index whose sum exceeds `bound`, or `count`, a multiple of 8,
    if none does.
    """
    signature = types.int64(x, types.int64, y, types.int64, types.int64, types.float64)

    def codegen(context, builder, signature, args):
        left = llvm.pointer(context, builder, signature.args[0], args[0], args[1])
        right = llvm.pointer(context, builder, signature.args[2], args[2], args[3])
        splat = builder.insert_element(ir.Constant(llvm.VECTOR, ir.Undefined), args[5], llvm.I32(0))
        limit = _picked(builder, splat, splat, [0] * LANES)
        count_ones = builder.module.declare_intrinsic("llvm.ctpop", [_MASK_BITS])
        entry = builder.block
        loop = builder.append_basic_block("count.loop")
        done = builder.append_basic_block("count.done")
        builder.cbranch(builder.icmp_signed(">", args[4], llvm.I64(0)), loop, done)
        builder.position_at_end(loop)
        i, total, sums = builder.phi(llvm.I64), builder.phi(llvm.I64), builder.phi(llvm.VECTOR)
        factors = (llvm.load(builder, builder.gep(p, [i])) for p in (left, right))
        new_sums = _running_sum(builder, builder.fmul(*factors), sums)
        below = builder.fcmp_ordered("<=", new_sums, limit)
        ones = builder.call(count_ones, [builder.bitcast(below, _MASK_BITS)])
        new_total = builder.add(total, builder.zext(ones, llvm.I64))
        following = builder.add(i, llvm.I64(LANES))
        for phi, start, new in (
            (i, llvm.I64(0), following),
            (total, llvm.I64(0), new_total),
            (sums, llvm.constant(0.0), new_sums),
        ):
            phi.add_incoming(start, entry)
            phi.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[4]), loop, done)
        builder.position_at_end(done)
        result = builder.phi(llvm.I64)
        result.add_incoming(llvm.I64(0), entry)
        result.add_incoming(new_total, loop)
        return result

    return signature, codegen

"""Vector building blocks for eight sequences at once: one to each lane of a vector.

Where a row of `flash_semicrf.streaming.cpu.vector` holds the labels of one sequence, here a
*vector* holds one number of `LANES` sequences and a *row* is one such vector for every label, so
that no operation crosses lanes and no label is padding. All arrays are flat and float64, offsets
are in elements, and nothing is bounds-checked.

Operations made by `_operation` are called as ``op(work, offsets, count)``: `offsets` is a tuple, an
operand is a row of `count` vectors or one vector for all of them, and the last operands are
*carried*: read once, updated by every vector of the rows, written at the end. Numbers that must be
exact zeros or within range are *watched* by two of those, the smallest and the largest seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = [
    "EXPONENT",
    "FRAME",
    "GAP",
    "HIGH",
    "LOW",
    "add_products",
    "close_forward",
    "close_backward",
    "exp_below",
    "exp_within",
    "largest",
    "normalise",
    "peak_of",
    "posterior_scale",
    "settle_peak",
    "sum_products",
    "take_forward",
    "take_backward",
    "total_window",
]

LOW, HIGH = 1e-100, 1e100
"""Range of what is watched, other than 0."""

FRAME = 1e50
"""Frames are kept within ``[1 / FRAME, FRAME]``."""

GAP = 92.0
"""Largest difference of scores at one position: a factor of 1e-40."""

EXPONENT = 138.0
"""Largest other exponent: factors of 1e-60 to 1e60."""


def _operation(steps: tuple[int, ...], body: Callable, carried: int) -> Callable:
    """Make the intrinsic of one operation on rows of vectors.

    Parameters
    ----------
    steps : tuple of {0, 1}
        For each operand that is not carried: 1 for a row, 0 for a vector.
    body : callable
        ``body(builder, operands, carries)``, operands as functions that load them, returns the
        vectors to write, {operand: vector}, and the new carries.
    carried : int
        Number of carried operands.
    """
    size = len(steps) + carried

    @intrinsic
    def operation(typingctx, work, offsets, count):
        signature = types.void(work, types.UniTuple(types.int64, size), types.int64)

        def codegen(context, builder, signature, args):
            base = llvm.pointer(context, builder, signature.args[0], args[0], llvm.I64(0))
            places = [builder.gep(base, [builder.extract_value(args[1], i)]) for i in range(size)]
            kept = places[len(steps) :]
            starts = [llvm.load(builder, place) for place in kept]
            entry = builder.block
            loop = builder.append_basic_block("lanes.loop")
            done = builder.append_basic_block("lanes.done")
            builder.branch(loop)
            builder.position_at_end(loop)
            j = builder.phi(llvm.I64)
            carries = [builder.phi(llvm.VECTOR) for _ in kept]
            rows = [
                builder.gep(place, [j]) if step else place
                for place, step in zip(places, steps, strict=False)
            ]
            loads = [lambda row=row: llvm.load(builder, row) for row in rows]
            stores, new = body(builder, loads, carries)
            for operand, value in stores.items():
                llvm.store(builder, value, rows[operand])
            following = builder.add(j, llvm.I64(LANES))
            for phi, start, value in zip(
                [j, *carries], [llvm.I64(0), *starts], [following, *new], strict=True
            ):
                phi.add_incoming(start, entry)
                phi.add_incoming(value, loop)
            stop = builder.mul(args[2], llvm.I64(LANES))
            builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
            builder.position_at_end(done)
            for place, value in zip(kept, new, strict=True):
                llvm.store(builder, value, place)
            return context.get_dummy_value()

        return signature, codegen

    return operation


def _product(builder: ir.IRBuilder, *factors: ir.Value) -> ir.Value:
    total = factors[0]
    for factor in factors[1:]:
        total = builder.fmul(total, factor)
    return total


def _watch(builder: ir.IRBuilder, value: ir.Value, lowest: ir.Value, highest: ir.Value) -> list:
    """New smallest and largest of the numbers that are not 0."""
    is_zero = builder.fcmp_ordered("==", value, llvm.constant(0.0))
    shown = builder.select(is_zero, llvm.constant(1.0), value)
    return [llvm.minimum(builder, shown, lowest), llvm.maximum(builder, value, highest)]


def _astray(builder: ir.IRBuilder, frame: ir.Value, before: ir.Value) -> ir.Value:
    """1 where a frame is out of range."""
    inside = builder.and_(
        builder.fcmp_ordered(">=", frame, llvm.constant(1 / FRAME)),
        builder.fcmp_ordered("<=", frame, llvm.constant(FRAME)),
    )
    return builder.select(inside, before, llvm.constant(1.0))


def _peak_of(builder, operands, carries):
    return {}, [llvm.maximum(builder, operands[0](), carries[0])]


peak_of = _operation((1,), _peak_of, 1)
"""(x; peak): ``peak = max(peak, x)``."""


def _settle_peak(builder, operands, carries):
    peak = operands[0]()
    some = builder.fcmp_ordered(">", peak, llvm.constant(NEG_INF))
    peak = builder.select(some, peak, llvm.constant(0.0))
    return {0: peak}, [builder.fadd(carries[0], peak)]


settle_peak = _operation((0,), _settle_peak, 1)
"""(peak; offset): a peak that is -inf becomes 0; ``offset += peak``."""


def _exp_within(low: float, high: float) -> Callable:
    def body(builder, operands, carries):
        x = operands[0]()
        shifted = builder.fsub(x, operands[1]())
        allowed = builder.fcmp_ordered(">", x, llvm.constant(NEG_INF))
        inside = builder.and_(
            builder.fcmp_ordered(">=", shifted, llvm.constant(low)),
            builder.fcmp_ordered("<=", shifted, llvm.constant(high)),
        )
        value = llvm.exp(builder, builder.select(inside, shifted, llvm.constant(-math.inf)))
        lost = builder.and_(allowed, builder.not_(inside))
        return {0: value}, [builder.select(lost, llvm.constant(-1.0), carries[0])]

    return body


exp_below = _operation((1, 0), _exp_within(-GAP, 0.0), 1)
"""(x, peak; lowest): ``x = exp(x - peak)``, 0 where x is forbidden; what is below -GAP is seen."""

exp_within = _operation((1, 0), _exp_within(-EXPONENT, EXPONENT), 1)
"""The same for differences within +-EXPONENT."""


def _take_forward(builder, operands, carries):
    source = _product(builder, operands[0](), operands[1]())
    frame, factor = operands[2](), operands[3]()
    start = _product(builder, operands[0](), operands[5](), operands[6]())
    inside = builder.fadd(operands[7](), start)
    stores = {
        2: builder.fmul(frame, factor),
        3: inside,
        4: builder.fdiv(source, frame),
        5: start,
        7: inside,
    }
    return stores, _watch(builder, source, *carries)


take_forward = _operation((1, 1, 1, 1, 1, 1, 0, 1), _take_forward, 2)
"""(gamma, opening, frame, factor, E, sink, q, inside; lowest, highest): take up the sources.

``E = gamma opening / frame``, ``frame *= factor``; sink becomes the marginal of starts
``gamma sink q``, inside increases by it, and factor becomes a copy of inside.
"""


def _take_backward(builder, operands, carries):
    source = _product(builder, operands[0](), operands[1]())
    frame = operands[2]()
    stores = {
        2: builder.fmul(frame, operands[3]()),
        4: builder.fdiv(source, frame),
        5: source,
    }
    return stores, _watch(builder, source, *carries)


take_backward = _operation((1, 1, 1, 1, 1, 1), _take_backward, 2)
"""(beta, opening, frame, factor, E, source; lowest, highest): the same of the backward pass."""


def _total_window(builder, operands, carries):
    total = _product(builder, operands[0](), operands[1]())
    lowest, highest = _watch(builder, total, *carries[:2])
    return {0: total}, [lowest, highest, llvm.maximum(builder, total, carries[2])]


total_window = _operation((1, 1), _total_window, 3)
"""(sums, frame; lowest, highest, top): ``sums *= frame``, ``top = max(top, sums)``."""


def _normalise(builder, operands, carries):
    top = carries[1]
    bits = builder.and_(builder.bitcast(top, llvm.INTEGERS), llvm.integer(0x7FF0000000000000))
    exponent = builder.sitofp(
        builder.sub(builder.lshr(bits, llvm.integer(52)), llvm.integer(1023)), llvm.VECTOR
    )
    inverse = builder.bitcast(builder.sub(llvm.integer(2046 << 52), bits), llvm.VECTOR)
    empty = builder.fcmp_ordered("==", top, llvm.constant(0.0))
    factor = builder.select(empty, llvm.constant(1.0), inverse)
    exponent = builder.select(empty, llvm.constant(0.0), exponent)
    return {0: factor}, [builder.fadd(carries[0], exponent), llvm.constant(0.0)]


normalise = _operation((0,), _normalise, 2)
"""(factor; scale, top): factor is the power of two that brings top to [1, 2), and scale is
increased by minus its exponent. Where top is 0 nothing changes. top becomes 0."""


def _close_backward(builder, operands, carries):
    factor = operands[3]()
    frame = builder.fmul(operands[1](), factor)
    sink = _product(builder, operands[0](), factor, operands[2]())
    watched = _watch(builder, sink, *carries[:2])
    return {1: frame, 4: sink}, [*watched, _astray(builder, frame, carries[2])]


close_backward = _operation((1, 1, 1, 0, 1), _close_backward, 3)
"""(sums, frame, closing, factor, sink; lowest, highest, astray): outputs of the backward pass.

``frame *= factor``, ``sink = sums factor closing``; astray is 1 where a frame has left its range.
"""


def _close_forward(builder, operands, carries):
    factor, scale, sink = operands[3](), operands[5](), operands[4]()
    frame = builder.fmul(operands[1](), factor)
    total = builder.fmul(operands[0](), factor)
    output = builder.fmul(total, operands[2]())
    end = _product(builder, total, sink, scale)
    stores = {
        0: builder.fmul(output, scale),
        1: frame,
        4: end,
        6: builder.fsub(operands[6](), end),
        7: output,
        8: _product(builder, frame, sink, scale),
    }
    watched = _watch(builder, output, *carries[:2])
    return stores, [*watched, _astray(builder, frame, carries[2])]


close_forward = _operation((1, 1, 1, 0, 1, 0, 1, 1, 1), _close_forward, 3)
"""(sums, frame, closing, factor, sink, q, inside, alpha, weight; lowest, highest, astray).

``frame *= factor``, ``alpha = sums factor closing``, ``sums = alpha q``; sink becomes the marginal
of ends ``sums factor sink q``, inside decreases by it, and ``weight = frame sink q`` is what the
window's sources have to be multiplied by for their posterior.
"""


def _posterior_scale(builder, operands, carries):
    exponent = builder.fsub(builder.fadd(operands[1](), operands[2]()), operands[3]())
    some = builder.fcmp_ordered(">", exponent, llvm.constant(-1000.0))
    large = builder.fcmp_ordered(">", exponent, llvm.constant(400.0))
    exponent = builder.select(builder.and_(some, builder.not_(large)), exponent, llvm.constant(0.0))
    whole = builder.fptosi(exponent, llvm.INTEGERS)
    bits = builder.shl(builder.add(whole, llvm.integer(1023)), llvm.integer(52))
    value = builder.fmul(builder.bitcast(bits, llvm.VECTOR), operands[4]())
    value = builder.select(some, value, llvm.constant(0.0))
    highest = llvm.maximum(builder, value, carries[0])
    return {0: value}, [builder.select(large, llvm.constant(math.inf), highest)]


posterior_scale = _operation((0, 0, 0, 0, 0), _posterior_scale, 1)
"""(q, forward, backward, total, inverse; highest): ``q = 2^(forward + backward - total) inverse``,
0 where that is below 2^-1000."""


@intrinsic
def largest(typingctx, work, offset):
    """Largest number of a vector."""
    signature = types.float64(work, types.int64)

    def codegen(context, builder, signature, args):
        vector = llvm.load(
            builder, llvm.pointer(context, builder, signature.args[0], args[0], args[1])
        )
        values = [builder.extract_element(vector, ir.IntType(32)(i)) for i in range(LANES)]
        while len(values) > 1:
            values = [
                builder.select(builder.fcmp_ordered(">", a, b), a, b)
                for a, b in zip(values[::2], values[1::2], strict=True)
            ]
        return values[0]

    return signature, codegen


@intrinsic
def sum_products(typingctx, x, x_place, y, y_place, out, count, length):
    """``out[j] = sum_{i < length} x[j, i] * y[j, i]``, x of numbers, y and out of vectors.

    `x_place` and `y_place` are (offset, step of j, step of i), `out` the offset in y of a row of
    `count` vectors. `length` is at least 1.
    """
    place = types.UniTuple(types.int64, 3)
    signature = types.void(x, place, y, place, types.int64, types.int64, types.int64)

    def codegen(context, builder, signature, args):
        x_base = llvm.pointer(context, builder, signature.args[0], args[0], llvm.I64(0))
        y_base = llvm.pointer(context, builder, signature.args[2], args[2], llvm.I64(0))
        x_first, x_row, x_step = (builder.extract_value(args[1], i) for i in range(3))
        y_first, y_row, y_step = (builder.extract_value(args[3], i) for i in range(3))
        out, count, length = args[4:]
        entry = builder.block
        outer = builder.append_basic_block("sum.outer")
        inner = builder.append_basic_block("sum.inner")
        close = builder.append_basic_block("sum.close")
        done = builder.append_basic_block("sum.done")
        builder.branch(outer)
        builder.position_at_end(outer)
        j = builder.phi(llvm.I64)
        x_start = builder.add(x_first, builder.mul(j, x_row))
        y_start = builder.add(y_first, builder.mul(j, y_row))
        builder.branch(inner)
        builder.position_at_end(inner)
        i, x_at, y_at = (builder.phi(llvm.I64) for _ in range(3))
        total = builder.phi(llvm.VECTOR)
        factor = llvm.splat(builder, builder.load(builder.gep(x_base, [x_at])))
        new = llvm.multiply_add(
            builder, factor, llvm.load(builder, builder.gep(y_base, [y_at])), total
        )
        following = builder.add(i, llvm.I64(1))
        for phi, start, value in (
            (i, llvm.I64(0), following),
            (x_at, x_start, builder.add(x_at, x_step)),
            (y_at, y_start, builder.add(y_at, y_step)),
            (total, llvm.constant(0.0), new),
        ):
            phi.add_incoming(start, outer)
            phi.add_incoming(value, inner)
        builder.cbranch(builder.icmp_signed("<", following, length), inner, close)
        builder.position_at_end(close)
        target = builder.add(out, builder.mul(j, llvm.I64(LANES)))
        llvm.store(builder, new, builder.gep(y_base, [target]))
        j_next = builder.add(j, llvm.I64(1))
        j.add_incoming(llvm.I64(0), entry)
        j.add_incoming(j_next, close)
        builder.cbranch(builder.icmp_signed("<", j_next, count), outer, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_products(typingctx, work, x, y_place, out_place, count, length):
    """``out[j, i] += x[j] * y[j, i]`` of vectors, j < count, i < length.

    `x` is the offset of a row, `y_place` and `out_place` are (offset, step of j, step of i).
    """
    place = types.UniTuple(types.int64, 3)
    signature = types.void(work, types.int64, place, place, types.int64, types.int64)

    def codegen(context, builder, signature, args):
        base = llvm.pointer(context, builder, signature.args[0], args[0], llvm.I64(0))
        x, count, length = args[1], args[4], args[5]
        y_first, y_row, y_step = (builder.extract_value(args[2], i) for i in range(3))
        out_first, out_row, out_step = (builder.extract_value(args[3], i) for i in range(3))
        entry = builder.block
        outer = builder.append_basic_block("add.outer")
        inner = builder.append_basic_block("add.inner")
        close = builder.append_basic_block("add.close")
        done = builder.append_basic_block("add.done")
        builder.branch(outer)
        builder.position_at_end(outer)
        j = builder.phi(llvm.I64)
        factor = llvm.load(
            builder, builder.gep(base, [builder.add(x, builder.mul(j, llvm.I64(LANES)))])
        )
        y_start = builder.add(y_first, builder.mul(j, y_row))
        out_start = builder.add(out_first, builder.mul(j, out_row))
        builder.branch(inner)
        builder.position_at_end(inner)
        i, y_at, out_at = (builder.phi(llvm.I64) for _ in range(3))
        target = builder.gep(base, [out_at])
        value = llvm.load(builder, builder.gep(base, [y_at]))
        llvm.store(
            builder, llvm.multiply_add(builder, factor, value, llvm.load(builder, target)), target
        )
        following = builder.add(i, llvm.I64(1))
        for phi, start, new in (
            (i, llvm.I64(0), following),
            (y_at, y_start, builder.add(y_at, y_step)),
            (out_at, out_start, builder.add(out_at, out_step)),
        ):
            phi.add_incoming(start, outer)
            phi.add_incoming(new, inner)
        builder.cbranch(builder.icmp_signed("<", following, length), inner, close)
        builder.position_at_end(close)
        j_next = builder.add(j, llvm.I64(1))
        j.add_incoming(llvm.I64(0), entry)
        j.add_incoming(j_next, close)
        builder.cbranch(builder.icmp_signed("<", j_next, count), outer, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen

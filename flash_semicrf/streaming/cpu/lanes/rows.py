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

import functools
import math
from collections.abc import Callable

from llvmlite import ir
from numba import types

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming.cpu import llvm
from flash_semicrf.streaming.cpu.llvm import LANES

LOW, HIGH = 1e-100, 1e100
"""Range of what is watched, other than 0."""

FRAME = 1e50
"""Frames are kept within ``[1 / FRAME, FRAME]``."""

STRAYED = 1e25
"""Frames beyond it, or its inverse, are brought back before a block."""

SMALLEST, _OUTWEIGHS = FRAME**-3, 1e-70
"""A source below the first is dropped if the newest one of its label is above the second: with
W >= 1e-60 that gives 1e20 times as much to every output that both reach."""

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
        ``body(builder, *operands)``, those carried last, returns the vectors to write,
        {operand: vector}, and the new carried ones.
    carried : int
        Number of carried operands.
    """
    size = len(steps) + carried

    @llvm.routine(types.void)
    def operation(builder, work, offsets, count):
        places = [builder.gep(work, [offsets[i]]) for i in range(size)]
        kept, zero = places[len(steps) :], llvm.I64(0)

        def apply(j: ir.Value, *carries: ir.Value) -> list[ir.Value]:
            at = [(place, j if step else zero) for place, step in zip(places, steps, strict=False)]
            stores, new = body(builder, *(llvm.load(builder, *place) for place in at), *carries)
            for operand, value in stores.items():
                llvm.store(builder, value, *at[operand])
            return new

        starts = [llvm.load(builder, place, zero) for place in kept]
        stop = builder.mul(count, llvm.I64(LANES))
        ends = llvm.loop(builder, stop, LANES, starts, apply, at_least_once=True)
        for place, value in zip(kept, ends, strict=True):
            llvm.store(builder, value, place, zero)

    return operation


@llvm.routine(types.void)
def spread(builder, work, offset, count, value):
    """Set `count` elements of whole vectors to a number."""
    vector = llvm.splat(builder, value)

    def write(i: ir.Value) -> list[ir.Value]:
        llvm.store(builder, vector, work, builder.add(offset, i))
        return []

    llvm.loop(builder, count, LANES, [], write)


def _product(builder: ir.IRBuilder, *factors: ir.Value) -> ir.Value:
    return functools.reduce(builder.fmul, factors)


def _watch(builder: ir.IRBuilder, value: ir.Value, lowest: ir.Value, highest: ir.Value) -> list:
    """New smallest and largest of the numbers that are not 0."""
    is_zero = builder.fcmp_ordered("==", value, llvm.constant(0.0))
    shown = builder.select(is_zero, llvm.constant(1.0), value)
    return [llvm.minimum(builder, shown, lowest), llvm.maximum(builder, value, highest)]


def _within(builder: ir.IRBuilder, value: ir.Value, low: float, high: float) -> ir.Value:
    return builder.and_(
        builder.fcmp_ordered(">=", value, llvm.constant(low)),
        builder.fcmp_ordered("<=", value, llvm.constant(high)),
    )


def _astray(builder: ir.IRBuilder, frame: ir.Value, before: ir.Value) -> ir.Value:
    """1 where a frame is out of range."""
    return builder.select(_within(builder, frame, 1 / FRAME, FRAME), before, llvm.constant(1.0))


copy = _operation((1, 1), lambda builder, x, _: ({1: x}, []), 0)
"""(x, y): ``y = x``, done from the first vector on."""


peak_of = _operation((1,), lambda builder, x, peak: ({}, [llvm.maximum(builder, x, peak)]), 1)
"""(x; peak): ``peak = max(peak, x)``."""


_ROUND = 1.5 * 2.0**52
"""A number of less than 2^51 is rounded to a whole one where this is added and taken off."""


def _settle_peak(builder, peak, _, offset):
    some = builder.fcmp_ordered(">", peak, llvm.constant(NEG_INF))
    peak = builder.fadd(builder.select(some, peak, llvm.constant(0.0)), llvm.constant(_ROUND))
    peak = builder.fsub(peak, llvm.constant(_ROUND))
    offset = builder.fadd(offset, peak)
    return {0: peak, 1: offset}, [offset]


settle_peak = _operation((0, 0), _settle_peak, 1)
"""(peak, sum; offset): a peak becomes a whole number, 0 where it is -inf; ``offset += peak``, of
which sum becomes a copy. Whole numbers add up exactly."""


def _exp_within(low: float, high: float) -> Callable:
    def body(builder, x, peak, lowest):
        shifted = builder.fsub(x, peak)
        allowed = builder.fcmp_ordered(">", x, llvm.constant(NEG_INF))
        inside = _within(builder, shifted, low, high)
        value = llvm.exp(builder, builder.select(inside, shifted, llvm.constant(-math.inf)))
        lost = builder.and_(allowed, builder.not_(inside))
        return {0: value}, [builder.select(lost, llvm.constant(-1.0), lowest)]

    return body


exp_below = _operation((1, 0), _exp_within(-GAP, 1.0), 1)
"""(x, peak; lowest): ``x = exp(x - peak)``, 0 where x is forbidden; lowest = -1 below -GAP."""

exp_within = _operation((1, 0), _exp_within(-EXPONENT, EXPONENT), 1)
"""The same for differences within +-EXPONENT."""


def _take_forward(builder, gamma, opening, frame, factor, _, sink, q, inside, counted, *others):
    *_, lowest, highest = others
    source = _product(builder, gamma, opening)
    start = _product(builder, gamma, sink, q)
    inside = builder.fadd(inside, start)
    frames = builder.fmul(frame, factor)
    begun = builder.fmul(sink, counted)
    stores = {2: frames, 4: builder.fdiv(source, frame), 7: inside}
    return {**stores, 9: begun, 10: start, 11: inside}, _watch(builder, source, lowest, highest)


take_forward = _operation((1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1), _take_forward, 2)
"""(gamma, opening, frame, factor, E, sink, q, inside, counted, begun, start, covered; lowest,
highest): take up the sources.

``E = gamma opening / frame``, ``frame *= factor``, ``begun = sink counted``; start becomes the
marginal of starts ``gamma sink q``, inside increases by it, and covered becomes a copy of inside.
"""


def _take_backward(builder, beta, opening, frame, factor, _, __, *watched):
    source = builder.fmul(beta, opening)
    stores = {2: builder.fmul(frame, factor), 4: builder.fdiv(source, frame), 5: source}
    return stores, _watch(builder, source, *watched)


take_backward = _operation((1, 1, 1, 1, 1, 1), _take_backward, 2)
"""(beta, opening, frame, factor, E, source; lowest, highest): the same of the backward pass."""


def _total_window(builder, sums, frame, lowest, highest, top):
    total = builder.fmul(sums, frame)
    watched = _watch(builder, total, lowest, highest)
    return {0: total}, [*watched, llvm.maximum(builder, total, top)]


total_window = _operation((1, 1), _total_window, 3)
"""(sums, frame; lowest, highest, top): ``sums *= frame``, ``top = max(top, sums)``."""


def _normalise(builder, _, scale, top):
    bits = builder.and_(builder.bitcast(top, llvm.INTEGERS), llvm.integer(0x7FF0000000000000))
    exponent = builder.sub(builder.lshr(bits, llvm.integer(52)), llvm.integer(1023))
    exponent = builder.sitofp(exponent, llvm.VECTOR)
    inverse = builder.bitcast(builder.sub(llvm.integer(2046 << 52), bits), llvm.VECTOR)
    empty = builder.fcmp_ordered("==", top, llvm.constant(0.0))
    factor = builder.select(empty, llvm.constant(1.0), inverse)
    exponent = builder.select(empty, llvm.constant(0.0), exponent)
    return {0: factor}, [builder.fadd(scale, exponent), llvm.constant(0.0)]


normalise = _operation((0,), _normalise, 2)
"""(factor; scale, top): factor is the power of two that brings top to [1, 2), and scale is
increased by minus its exponent. Where top is 0 nothing changes. top becomes 0."""


def _split_frame(builder, frame, _, newest, __, highest):
    bits = builder.and_(builder.bitcast(frame, llvm.INTEGERS), llvm.integer(0x7FF0000000000000))
    shift = builder.bitcast(bits, llvm.VECTOR)
    none = builder.fcmp_ordered("==", shift, llvm.constant(0.0))
    lost = builder.and_(none, builder.fcmp_ordered(">", frame, llvm.constant(0.0)))
    frame = builder.select(none, llvm.constant(1.0), builder.fdiv(frame, shift))
    some = builder.fcmp_ordered(">=", builder.fmul(newest, shift), llvm.constant(_OUTWEIGHS))
    outweighed = builder.select(some, llvm.constant(1.0), llvm.constant(0.0))
    highest = builder.select(lost, llvm.constant(math.inf), highest)
    return {0: frame, 1: shift, 3: outweighed}, [highest]


split_frame = _operation((0, 0, 0, 0), _split_frame, 1)
"""(frame, shift, newest, outweighed; highest): a frame of [1, 2) and the power of two that it is
less; outweighed is 1 where the source `newest`, moved by it, is large enough for others to be
dropped. A frame of 0 becomes 1, by a shift of 0."""


def _strays(builder, frame, astray):
    near = _within(builder, frame, 1 / STRAYED, STRAYED)
    return {}, [builder.select(near, astray, llvm.constant(1.0))]


strays = _operation((1,), _strays, 1)
"""(frame; astray): astray is 1 where a frame would have little room for a block of positions."""


@llvm.routine(types.void)
def move_rows(builder, work, place, count, smallest, shift, outweighed, highest):
    """Multiply `count` vectors at ``place = (offset, step)`` by `shift`, a vector.

    What falls below `smallest` becomes 0; where not `outweighed`, or where a result is too large,
    highest becomes infinite. The last three are offsets.
    """
    factor, heavy = llvm.load(builder, work, shift), llvm.load(builder, work, outweighed)
    zero, least = llvm.constant(0.0), llvm.splat(builder, smallest)
    most = builder.fdiv(llvm.constant(1.0), least)
    shifts = builder.fcmp_ordered("!=", factor, zero)
    light = builder.fcmp_ordered("==", heavy, zero)

    def move(_: ir.Value, at: ir.Value, top: ir.Value) -> list[ir.Value]:
        before = llvm.load(builder, work, at)
        value = builder.fmul(before, factor)
        some = builder.and_(builder.fcmp_unordered("!=", before, zero), shifts)
        small = builder.and_(some, builder.fcmp_unordered("<", value, least))
        lost = builder.or_(builder.and_(small, light), builder.fcmp_unordered(">", value, most))
        llvm.store(builder, builder.select(small, zero, value), work, at)
        top = builder.select(lost, llvm.constant(math.inf), top)
        return [builder.add(at, place[1]), top]

    starts = [place[0], llvm.load(builder, work, highest)]
    _, top = llvm.loop(builder, count, 1, starts, move)
    llvm.store(builder, top, work, highest)


def _close_backward(builder, sums, frame, closing, factor, _, lowest, highest, astray):
    frame = builder.fmul(frame, factor)
    sink = _product(builder, sums, factor, closing)
    watched = _watch(builder, sink, lowest, highest)
    return {1: frame, 4: sink}, [*watched, _astray(builder, frame, astray)]


close_backward = _operation((1, 1, 1, 0, 1), _close_backward, 3)
"""(sums, frame, closing, factor, sink; lowest, highest, astray): outputs of the backward pass.

``frame *= factor``, ``sink = sums factor closing``; astray is 1 where a frame has left its range.
"""


def _close_forward(builder, sums, frame, closing, factor, sink, q, inside, counted, *others):
    *_, lowest, highest, astray = others
    frame = builder.fmul(frame, factor)
    total = builder.fmul(sums, factor)
    alpha = builder.fmul(total, closing)
    end = _product(builder, total, sink, q)
    weight = _product(builder, frame, sink, q, counted)
    inside = builder.fsub(inside, end)
    ended = builder.fmul(alpha, q)
    stores = {1: frame, 6: inside, 8: alpha, 9: weight, 10: ended, 11: end}
    watched = _watch(builder, alpha, lowest, highest)
    return stores, [*watched, _astray(builder, frame, astray)]


close_forward = _operation((1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1), _close_forward, 3)
"""(sums, frame, closing, factor, sink, q, inside, counted, alpha, weight, ended, end; lowest,
highest, astray): outputs of the forward pass.

``frame *= factor``, ``alpha = sums factor closing``, ``ended = alpha q``; end becomes the marginal
of ends ``sums factor sink q``, inside decreases by it, and ``weight = frame sink q counted`` is
what the window's sources have to be multiplied by for their posterior.
"""


def _posterior_scale(builder, _, forward, backward, total, inverse, highest):
    exponent = builder.fsub(builder.fadd(forward, backward), total)
    some = builder.fcmp_ordered(">", exponent, llvm.constant(-1000.0))
    large = builder.fcmp_ordered(">", exponent, llvm.constant(400.0))
    exponent = builder.select(builder.and_(some, builder.not_(large)), exponent, llvm.constant(0.0))
    whole = builder.fptosi(exponent, llvm.INTEGERS)
    bits = builder.shl(builder.add(whole, llvm.integer(1023)), llvm.integer(52))
    value = builder.fmul(builder.bitcast(bits, llvm.VECTOR), inverse)
    value = builder.select(some, value, llvm.constant(0.0))
    highest = llvm.maximum(builder, value, highest)
    return {0: value}, [builder.select(large, llvm.constant(math.inf), highest)]


posterior_scale = _operation((0, 0, 0, 0, 0), _posterior_scale, 1)
"""(q, forward, backward, total, inverse; highest): ``q = 2^(forward + backward - total) inverse``,
0 where that is below 2^-1000."""


@llvm.routine(types.float64)
def largest(builder, work, offset):
    """Largest number of a vector."""
    vector = llvm.load(builder, work, offset)
    values = [builder.extract_element(vector, llvm.I32(i)) for i in range(LANES)]
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [llvm.maximum(builder, a, b) for a, b in pairs]
    return values[0]

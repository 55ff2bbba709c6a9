"""One block of R steps of the narrow pass: float32 and int32, no exp or log from step to step.

Sources are kept less their contents, so that a segment's content needs no further product. Sums
share an exponent for each label, that of the largest term so far. A step brings the messages of all
labels to the largest exponent among them, multiplies by exp(A), and makes a source of each sum.

A step certifies itself: a sum that something feeds is at least LOW, relative to its largest
possible term, or it is zero because nothing was rounded to zero. A pass that finds one that is not
gives up: the float64 pass does the sequence again.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import allowed
from flash_semicrf.streaming.triton.static.linear_block import across_labels
from flash_semicrf.streaming.triton.static.narrow.far import FAINT
from flash_semicrf.streaming.triton.static.narrow.memory import NarrowState
from flash_semicrf.streaming.triton.static.narrow.numbers import (
    ALIVE,
    FARTHEST,
    LN2,
    LOW,
    NOTHING,
    NOWHERE,
    advance,
    as_float64,
    factor_of,
    is_usable,
    normal,
    parts_of,
    power,
    powers,
)

__all__ = [
    "DITHER",
    "Contents",
    "Factors",
    "Parameters",
    "contents_of",
    "factors_of",
    "narrow_steps",
]

DITHER = tl.constexpr(-410_132_882)
"""Added to the content of every position, in units of 2^-30: minus the square of the golden ratio's
inverse. Where scores repeat, mantissas would too, and be rounded in the same direction for ever."""

_DEEPEST = tl.constexpr(-1000)  # exponent, below the largest, that a stored message may have


class Contents(NamedTuple):
    """What a block's scores make of the contents of the positions before each step."""

    open: tuple  # R tensors (CP,): whether a position does not forbid
    whole: tuple  # R + 1 tensors (CP,) int32, as the following: contents of the positions before
    fraction: tl.tensor  # of the last of those
    up: tuple  # R: 2^fraction after each step
    down: tuple  # R: 2^-fraction before each step
    good: tl.tensor  # whether all scores are usable


class Factors(NamedTuple):
    """Exponentials of the boundary scores of a block."""

    factors: tuple  # R tensors (CP,)
    exponents: tuple  # int32
    good: tl.tensor  # whether all scores are usable


class Parameters(NamedTuple):
    """Tables in registers, tensors (CP,)."""

    near: tuple  # W of durations 1 to R
    near_exponent: tl.tensor
    matrix: tl.tensor
    matrix_exponent: tl.tensor
    sources: tuple  # int32, bits of the labels that precede


@triton.jit
def contents_of(rows, whole, fraction, R):
    """Contents of the positions up to each of R steps; `rows` by `load_rows`, float32."""
    is_open = ()
    wholes = (whole,)
    ups = ()
    _up, down = powers(fraction)
    downs = ()
    good = whole == whole
    for i in tl.static_range(R):
        x = rows[i]
        inside = allowed(x)
        good = good & (is_usable(x) | (inside == 0))
        more_whole, more = parts_of(tl.where(inside, x, 0.0))
        whole, fraction = advance(whole, fraction, more_whole, more + DITHER)
        downs = downs + (down,)
        up, down = powers(fraction)
        is_open = is_open + (inside,)
        wholes = wholes + (whole,)
        ups = ups + (up,)
    good = good & (tl.abs(whole) < FARTHEST)
    return Contents(is_open, wholes, fraction, ups, downs, good)


@triton.jit
def factors_of(rows, R):
    """Factors of R rows of boundary scores."""
    factors = ()
    exponents = ()
    good = tl.full(rows[0].shape, 1, tl.int1)
    for i in tl.static_range(R):
        inside = allowed(rows[i])
        good = good & (is_usable(rows[i]) | (inside == 0))
        factor, exponent = factor_of(rows[i], inside)
        factors = factors + (factor,)
        exponents = exponents + (exponent,)
    return Factors(factors, exponents, good)


@triton.jit
def _labels_with(mantissa, label, WORDS):
    """Bits of the labels whose mantissa is not zero, WORDS whole numbers."""
    words = ()
    for word in tl.static_range(WORDS):
        bit = tl.where((label // 32 == word) & (mantissa > 0), 1 << (label % 32), 0)
        words = words + (tl.sum(bit, 0),)
    return words


@triton.jit
def _store(rows, here, length, top, mantissa, depth, label, C):
    """Message and offset of a step, in the form of `numerics`."""
    if rows.message is not None:
        inside = here < length
        row = rows.message + here * rows.direction * C
        tl.store(row + label, as_float64(mantissa, depth), mask=inside & (label < C))
        level = (top.to(tl.int64) << 30) - (here + 1).to(tl.int64) * DITHER
        offset = level.to(tl.float64) * (LN2 * 2.0**-30)
        tl.store(rows.offset + here * rows.direction, offset, mask=inside)


@triton.jit
def narrow_steps(
    state, sums, given, contents, opening, closing, rows, work, slot, step, length, reach, C, CP, R
):
    """Run the R steps after `step`.

    Parameters
    ----------
    state : NarrowState
    sums : tuple
        What earlier blocks give to the outputs; see `narrow_far_window`.
    given : Parameters
    contents : Contents
    opening, closing : Factors or None
    rows : Rows
    work : NarrowWork
        Its `sources` and `exponents` get the block's.
    reach : int
        Longest duration.

    Returns
    -------
    NarrowState
    """
    WORDS: tl.constexpr = (CP + 31) // 32
    label = tl.arange(0, CP)
    mantissa, exponent, _whole, _fraction, newest, born, rounded, good, last, last_exponent = state
    found, level, may_round = sums
    rounded = tl.where(may_round, step, rounded)
    good = good & contents.good
    if opening is not None:
        good = good & opening.good & closing.good
    sources = ()
    exponents = ()
    for i in tl.static_range(R):
        here = step + i
        source = mantissa * contents.down[i]
        source_exponent = exponent - contents.whole[i]
        if opening is not None:
            source = source * opening.factors[i]
            source_exponent += opening.exponents[i]
        live = source > 0
        newest = tl.where(live, here, newest)
        source_exponent = tl.where(live, source_exponent, NOTHING)
        sources = sources + (source,)
        exponents = exponents + (source_exponent,)

        term = tl.maximum(source_exponent + given.near_exponent, NOTHING)
        top = tl.maximum(level, term)
        may_round = ((level > ALIVE) & (level - top < FAINT)) | (
            (term > ALIVE) & (term - top < FAINT)
        )
        rounded = tl.where(may_round, here, rounded)
        scale = power(level - top)
        new = source * tl.where(term > ALIVE, power(term - top), 0.0)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (found[j],)
            else:
                pushed = pushed + (found[j] * scale + new * given.near[j - i],)
        found = pushed
        is_open = contents.open[i]
        born = tl.where(is_open, born, here + 1)
        # Below the exponent of zero: what was summed before a forbidden position is scaled to zero.
        level = tl.where(is_open, top, NOWHERE)
        rounded = tl.where(is_open, rounded, NOWHERE)
        total = found[i]
        dead = (newest < born) | (newest <= here - reach)
        empty = (total == 0) & (rounded <= here - reach)
        good = good & ((total >= LOW) | dead | empty)
        message = tl.where(is_open & (dead == 0), total, 0.0) * contents.up[i]
        message_exponent = level + contents.whole[i + 1]
        if closing is not None:
            message = message * closing.factors[i]
            message_exponent += closing.exponents[i]

        message, message_exponent = normal(message, message_exponent)
        highest = tl.max(message_exponent, 0)
        highest = tl.where(highest > ALIVE, highest, 0)
        depth = message_exponent - highest
        good = good & (tl.abs(highest) < FARTHEST)
        good = good & ((depth > _DEEPEST) | (message_exponent <= ALIVE))
        _store(rows, here, length, highest, message, depth, label, C)
        is_last = here + 1 == length
        last = tl.where(is_last, message, last)
        last_exponent = tl.where(is_last, message_exponent, last_exponent)

        product = across_labels(given.matrix, message * power(depth), CP)
        words = _labels_with(message, label, WORDS)
        fed = (words[0] & given.sources[0]) != 0
        for word in tl.static_range(1, WORDS):
            fed = fed | ((words[word] & given.sources[word]) != 0)
        good = good & ((product >= LOW) | (fed == 0))
        product = tl.where(fed, product, 0.0)
        mantissa, exponent = normal(product, highest + given.matrix_exponent)

    largest = tl.full([CP], NOTHING, tl.int32)
    kept = ()
    for i in tl.static_range(R):
        exponent_of_source = tl.where(born <= step + i, exponents[i], NOTHING)
        kept = kept + (exponent_of_source,)
        largest = tl.maximum(largest, exponent_of_source)
    source_row = work.sources + slot * R * CP + label
    for i in tl.static_range(R):
        alive = kept[i] > ALIVE
        shift = kept[i] - largest
        rounded = tl.where(alive & (shift < FAINT), step + R - 1, rounded)
        scaled = tl.where(alive, sources[i] * power(shift), 0.0)
        tl.store(source_row + i * CP, scaled)
    tl.store(work.exponents + slot * CP + label, largest)
    return NarrowState(
        mantissa,
        exponent,
        contents.whole[R],
        contents.fraction,
        newest,
        born,
        rounded,
        good,
        last,
        last_exponent,
    )

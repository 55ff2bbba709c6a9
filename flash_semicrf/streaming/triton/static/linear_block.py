"""One block of R steps of a pass, in linear float64: no exp or log on the chain from step to step.

Accumulator i holds exp(log alpha of step i, less closing score), relative to the block's offset, of
the segments taken up so far, their content up to the present position included. A step multiplies
the accumulators by exp(score), reads one as alpha, multiplies it by exp(A) into the next source and
adds that source, times W, to the later accumulators. Sources before the block come in R x R tiles
of multiply-adds; each older block is scaled by the product of exp(scores) and rescaling since.

A block certifies itself: every value that something feeds lies in [LOW, HIGH], and what
underflow may have dropped, followed through the rescaling, is far below LOW. Whoever gets False
redoes the block in the log domain.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.numerics import (
    allowed,
    common_part,
    exp_rows,
    exponent_of,
    high_word,
    power_of_two,
    round_whole,
    settled,
)

__all__ = [
    "CHAINS",
    "Block",
    "Rows",
    "across_labels",
    "in_range",
    "linear_steps",
    "load_matrix",
    "load_rows",
    "score_factors",
]

CHAINS = tl.constexpr(4)
"""Sums over source labels that run side by side."""

# High words of LOW = 1e-200 and HIGH = 1e60: whole numbers compare faster, and on other units.
_LOW = tl.constexpr(0x16687E92)
_HIGH = tl.constexpr(0x4C63E9E4)
_SMALLEST_FACTOR = tl.constexpr(0x2B2BFF2E)  # high word of 1e-100


class Block(NamedTuple):
    """Scores of a block, tuples of R tensors (CP,); factors are exponentials."""

    x: tuple  # less the common part of their position, with the slopes of the durations
    factors: tuple  # of x less the shifts
    shifts: tuple
    opening: tuple | None  # factors of the boundary scores
    closing: tuple | None


class Rows(NamedTuple):
    """Rows of the first position of a pass; the others follow in `direction`, 1 or -1."""

    score: Tensor
    opening: Tensor | None
    closing: Tensor | None
    message: Tensor | None
    offset: Tensor | None
    direction: int


@triton.jit
def load_rows(row_ptr, step, length, direction, label, C, R, outside=float("-inf")):
    """Rows of the R positions after `step`, at least float32; `outside` where there are none."""
    rows = ()
    first = row_ptr + step * direction * C + label
    within = label < C
    for i in tl.static_range(R):
        inside = (i < length - step) & within
        row = tl.load(first + i * direction * C, mask=inside, other=outside)
        if row.dtype.primitive_bitwidth < 32:
            row = row.to(tl.float32)
        rows = rows + (row,)
    return rows


@triton.jit
def score_factors(x, slope, growth, R):
    """Scores of R rows as factors.

    Parameters
    ----------
    x : tuple of R tensors
    slope : Tensor of shape (CP,)
        What every score has in addition.
    growth : scalar
        What messages grow by in a step, beside the scores.

    Returns
    -------
    rows : tuple of R tensors
        The scores less the common part of their row, by `settled`, with the slopes; float64.
    factors, shifts : tuples of R
        exp(rows - shift), with a whole shift near the largest of each row.
    common : scalar
        Sum of the common parts.
    ok : Tensor
        False where a factor is too small to be told from what underflow drops.
    """
    rows = ()
    exponents = ()
    shifts = ()
    common = tl.zeros([], tl.float64)
    for i in tl.static_range(R):
        top = tl.max(x[i], 0)
        out = common_part(top)
        row = settled(x[i], top) + slope
        shift = tl.where(allowed(top), top - out, 0.0).to(tl.float64)
        shift = round_whole(shift + growth)
        common += out.to(tl.float64)
        rows = rows + (row,)
        exponents = exponents + (tl.where(allowed(row), row - shift, -1000.0),)
        shifts = shifts + (shift,)
    factors = exp_rows(exponents, x[0].dtype == tl.float32, R)
    ok = rows[0] == rows[0]
    for i in tl.static_range(R):
        ok = ok & ((high_word(factors[i]) > _SMALLEST_FACTOR) | (allowed(rows[i]) == 0))
    return rows, factors, shifts, common, ok


@triton.jit
def load_matrix(matrix_ptr, unit, CP):
    """A (CP src, CP dst) table as (CP dst, CP src), labels dst one to a lane.

    `unit` is 1: a stride that the compiler does not know keeps it from giving a lane two labels.
    """
    label = tl.arange(0, CP)
    return tl.load(matrix_ptr + label[:, None] * CP + label[None, :] * unit)


@triton.jit
def across_labels(matrix, row, CP):
    """Matrix times row; CHAINS sums run side by side, since each addition waits for the last."""
    product = tl.reshape(matrix * row[:, None], [CHAINS, CP // CHAINS, CP])
    return tl.sum(tl.sum(product, 1), 0)


@triton.jit
def in_range(word, exempt):
    """Whether the value of a high word is in [LOW, HIGH), or is not above HIGH and `exempt`."""
    return (word < _HIGH) & (word >= 0) & ((word > _LOW) | exempt)


@triton.jit
def linear_steps(
    live, sums, near, matrix, block, rows, work, slot, step, length, reach, C, label, CP, R
):
    """Run the R steps after `step`.

    Parameters
    ----------
    live : tuple
        g (CP,), the source of `step` without its opening score, relative to an offset; this offset;
        `newest` and `born` (CP,) int32, the step of the newest live source and the first step whose
        source no forbidden position cut off.
    sums, near : tuples of R tensors
        What earlier sources give to the outputs; W of the R shortest durations.
    matrix : Tensor
        exp(A), by `load_matrix`.
    block : Block
    reach : int or int32 Tensor of shape (CP,)
        Longest duration.
    work : Workspace
        Its `final` gets the message of step `length` and its offset, `sources` the scaled sources.

    Returns
    -------
    The state after the block as `live`, its exponent, the sources, the rate of the block, and `ok`.
    """
    g, offset, newest, born = live
    ok = g == g
    sources = ()
    for i in tl.static_range(R):
        here = step + i
        source = g
        if block.opening is not None:
            source = g * block.opening[i]
            ok = ok & in_range(high_word(source), (high_word(g) == 0) | (block.opening[i] == 0))
        sources = sources + (source,)
        newest = tl.where(high_word(source) != 0, here, newest)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (sums[j],)
            else:
                pushed = pushed + ((sums[j] + source * near[j - i]) * block.factors[i],)
        sums = pushed
        born = tl.where(allowed(block.x[i]), born, here + 1)
        alpha = sums[i]
        dead = (newest < born) | (newest <= here - reach)
        ok = ok & in_range(high_word(alpha), dead)
        if block.closing is not None:
            alpha = alpha * block.closing[i]
            ok = ok & in_range(high_word(alpha), dead | (block.closing[i] == 0))
        offset += block.shifts[i]
        if rows.message is not None:
            inside = here < length
            row = rows.message + here * rows.direction * C
            tl.store(row + label, alpha, mask=inside & (label < C))
            tl.store(rows.offset + here * rows.direction, offset, mask=inside)
        tl.store(work.final + label, alpha, mask=(here + 1 == length) & (label >= 0))
        tl.store(work.final + CP, offset, mask=here + 1 == length)
        g = across_labels(matrix, alpha, CP)
        word = high_word(g)
        ok = ok & in_range(word, word == 0)

    top = tl.max(g, 0)
    exponent = tl.where(top > 0, exponent_of(top), 0)
    scale = power_of_two(-exponent)
    suffix = scale
    source_row = work.sources + slot * R * CP + label
    for r in tl.static_range(R):
        suffix = suffix * block.factors[R - 1 - r]
        tl.store(source_row + (R - 1 - r) * CP, sources[R - 1 - r] * suffix)
    return (g * scale, offset, newest, born), exponent, sources, suffix, ok

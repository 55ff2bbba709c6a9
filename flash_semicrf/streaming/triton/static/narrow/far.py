"""The far window of a block of the narrow pass, in tiles of R sources by R outputs.

A block's sources share an exponent for each label, and so do groups of durations: a tile is plain
float32 multiply-adds, once the exponents are brought to that of the sums so far. What is shifted
out at 2^-126 of the largest does not count where a sum is at least LOW; whether anything may have
been rounded to zero is told for the sums that are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.static.narrow.memory import narrow_work_at
from flash_semicrf.streaming.triton.static.narrow.numbers import ALIVE, NOTHING, NOWHERE, power
from flash_semicrf.streaming.triton.static.narrow.tables import NarrowTables

__all__ = ["FAINT", "narrow_far_kernel", "narrow_far_window", "no_sums"]

FAINT = tl.constexpr(-20)
"""Shifts from here on may make zeros: a mantissa times W, at least 2^-126, has 2^-149 to go."""


@triton.jit
def _load_tile(tables, work, block, back, ring, label, CP, R):
    """Exponents of the sources and of W of the R shorter durations, both, of the block `back`
    before; `back` is at least 1."""
    slot = (block + ring - back) % ring
    row = tables.window + back * R * CP + label
    source_row = work.sources + slot * R * CP + label
    shorter = ()
    sources = ()
    for m in tl.static_range(R):
        shorter = shorter + (tl.load(row + m * CP),)
        sources = sources + (tl.load(source_row + m * CP),)
    exponent = tl.load(work.exponents + slot * CP + label)
    return exponent, tl.load(tables.window_exponent + back * CP + label), shorter, sources


@triton.jit
def no_sums(CP, R):
    """R sums of nothing, their exponent, and no step at which anything was rounded."""
    sums = ()
    for _j in tl.static_range(R):
        sums = sums + (tl.zeros([CP], tl.float32),)
    return sums, tl.full([CP], NOWHERE, tl.int32), tl.zeros([CP], tl.int1)


@triton.jit
def narrow_far_window(tables, work, sums, block, blocks, ring, born, CP, R):
    """Add what the sources of the last `blocks` blocks give to the R outputs of this one.

    Parameters
    ----------
    tables : NarrowTables
        `window` and `window_exponent` begin where the block before this one takes its durations.
    sums : tuple
        R tensors (CP,), their exponent, and whether anything may have been rounded to zero.
    born : int32 Tensor of shape (CP,)

    Returns
    -------
    As `sums`.
    """
    label = tl.arange(0, CP)
    found, exponent, rounded = sums
    back = tl.maximum(blocks, 1)
    row = tables.window + (back + 1) * R * CP + label
    longer = ()
    for m in tl.static_range(R - 1):
        longer = longer + (tl.load(row + m * CP),)
    longer_exponent = tl.load(tables.window_exponent + (back + 1) * CP + label)
    own, shorter_exponent, shorter, sources = _load_tile(
        tables, work, block, back, ring, label, CP, R
    )
    for i in range(blocks):
        live = (own > ALIVE) & (born < (block - blocks + i + 1) * R)
        own = tl.where(live, own, NOTHING)
        low = tl.maximum(own + shorter_exponent, NOTHING)
        high = tl.maximum(own + longer_exponent, NOTHING)
        top = tl.maximum(exponent, tl.maximum(low, high))
        rounded = rounded | ((exponent > ALIVE) & (exponent - top < FAINT))
        rounded = rounded | ((low > ALIVE) & (low - top < FAINT))
        rounded = rounded | ((high > ALIVE) & (high - top < FAINT))
        scale = power(exponent - top)
        scaled = ()
        for j in tl.static_range(R):
            scaled = scaled + (found[j] * scale,)
        found = scaled
        exponent = top
        # Zeros of a dead block come with the exponent of zero: no factor is needed for them.
        to_shorter = tl.where(low > ALIVE, power(low - top), 0.0)
        to_longer = tl.where(high > ALIVE, power(high - top), 0.0)
        current = sources
        tile = shorter + longer
        longer = shorter[: R - 1]
        longer_exponent = shorter_exponent
        # The next tile is under way while this one is multiplied.
        back = tl.maximum(blocks - i - 1, 1)
        own, shorter_exponent, shorter, sources = _load_tile(
            tables, work, block, back, ring, label, CP, R
        )
        for r in tl.static_range(R):
            short = current[r] * to_shorter
            long = current[r] * to_longer
            added = ()
            for j in tl.static_range(R):
                if j <= r:
                    added = added + (found[j] + short * tile[j - r + R - 1],)
                else:
                    added = added + (found[j] + long * tile[j - r + R - 1],)
            found = added
    return found, exponent, rounded


@labels_last
@triton.jit
def narrow_far_kernel(tables, memory, part, CP, R):
    """Contribution of all sources before a part of a pass to the outputs of its blocks.

    Program (block of the part, program of the pass); into the workspace, as the pass reads it.
    """
    ahead = tl.program_id(0)
    program = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    work = narrow_work_at(memory, program, part.ring, CP, R)
    first = part.begin // R
    blocks = tl.maximum(tl.minimum(part.blocks_back - ahead, first), 0)
    tables = NarrowTables(
        tables.window + ahead * R * CP,
        tables.matrix,
        tables.window_exponent + ahead * CP,
        tables.matrix_exponent,
        tables.sources,
    )
    born = tl.load(work.state + 5 * CP + label)
    none = no_sums(CP, R)
    found, exponent, rounded = narrow_far_window(
        tables, work, none, first, blocks, part.ring, born, CP, R
    )
    row = work.older + ahead * R * CP + label
    for j in tl.static_range(R):
        tl.store(row + j * CP, found[j])
    row = work.older_exponents + ahead * 2 * CP + label
    tl.store(row, exponent)
    tl.store(row + CP, rounded.to(tl.int32))

"""Durations beyond K in the passes for static transitions, at O(C) a position.

With a duration tail the windows of the passes reach back to the start of the oldest block of
sources that they keep: the durations above K up to there are written out like the others. What all
older sources give is one number for each label, in logarithms and less the running score S,

    longer(c) = LSE_s [h_s(c) + (e - s) * tail(c)]

over the sources s before step e, the first that is kept: j steps later they add longer(c) + D_K(c)
and one tail for each position beyond the K-th. It changes once in a block, when the oldest block of
sources gives way to a new one. Logarithms have no range to leave, and a running score subtracts
what is common to all of a label's sources: whatever a long segment covers costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import exp_wide, finite, is_deep, settled
from flash_semicrf.streaming.triton.static.sources import source_logs

__all__ = ["add_block", "add_longer", "deep_window"]


@triton.jit(noinline=True)
def add_block(work, tables, score_ptr, first, ring, direction, C, CP, R):
    """Add the R sources from step `first` on, which the window is about to lose, to `longer`.

    There are none where `first` is negative: `longer` is -inf then.

    Parameters
    ----------
    work : Workspace
        Three rows of `longer`: itself; the first step whose source no forbidden position cut off;
        the running score less the offset, which becomes what `longer` adds to a block's first
        output, relative to the offset. The raw sources as `source_logs` reads them.
    tables : Tables
        By `prepare_kernel`.
    score_ptr
        Row of the pass's first position; the others follow in `direction`.
    """
    label = tl.arange(0, CP)
    if first >= 0:
        row = tl.arange(0, R)[:, None]
        inside = (label < C)[None, :]
        slope = tl.load(tables.first + 2 * CP + label)[None, :]
        h = source_logs(work, score_ptr, slope, first, ring, inside, direction, label, C, CP, R)
        born = tl.load(work.longer + CP + label).to(tl.int32)
        tail = tl.load(tables.tail + label)
        h = tl.where(first + row >= born[None, :], h + (R - row) * tail[None, :], float("-inf"))
        longer = tl.load(work.longer + label) + R * tail
        longer = tl.where(born < first, longer, float("-inf"))
        top = finite(tl.maximum(tl.max(h, 0), longer))
        total = exp_wide(longer - top) + tl.sum(exp_wide(h - top[None, :]), 0)
        tl.debug_barrier()
        tl.store(work.longer + label, top + tl.log(total))
        tl.debug_barrier()
    level = tl.load(work.longer + label) + tl.load(tables.tail + CP + label)
    level += tl.load(work.longer + 2 * CP + label)
    tl.debug_barrier()
    tl.store(work.longer + 2 * CP + label, exp_wide(tl.minimum(level, 700.0)))


@triton.jit
def add_longer(alpha, longer, tail_ptr, i, label, CP):
    """LSE of the outputs of the window, less the running score, and what is older than it.

    `i` counts the steps of the block.
    """
    term = longer + tl.load(tail_ptr + CP + label) + i * tl.load(tail_ptr + label)
    term = tl.where(longer > float("-inf"), term, float("-inf"))
    high = tl.maximum(alpha, term)
    low = tl.minimum(alpha, term)
    gap = tl.where(high > float("-inf"), low - high, 0.0)
    return high + tl.log(1.0 + exp_wide(gap))


@triton.jit
def deep_window(scores_ptr, p, K, label, C, CP):
    """Sum of the deep scores among the K positions before p; those before the first count none."""
    total = tl.zeros([CP], tl.float64)
    for back in range(1, tl.minimum(K, p) + 1):
        x = tl.load(scores_ptr + (p - back) * C + label, mask=label < C, other=float("-inf"))
        top = tl.max(x, 0)
        total += tl.where(is_deep(x, top), settled(x, top), 0.0)
    return total

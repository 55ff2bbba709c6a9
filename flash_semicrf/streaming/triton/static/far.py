"""The far window of a block of R steps: its sums, or maxima, over the sources of earlier blocks.

Sources come in tiles of R sources by R outputs; each older block is scaled by its rate, the product
of exp(scores) and rescaling since. In the max pass sums take the place of products, and maxima that
of sums. Long windows make this most of the work of a pass, and unlike the steps it is parallel:
then a kernel sums up what lies before a part of the pass, for all of the part's blocks at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.static.plan import is_done, workspace_at

__all__ = ["far_kernel", "far_window"]

_DROPPED = tl.constexpr(1e-300)  # bound of what one block can lose to underflow


@triton.jit
def _times(x, y, MAX):
    if MAX:
        found = x + y
    else:
        found = x * y
    return found


@triton.jit
def _plus(x, y, MAX):
    if MAX:
        found = tl.maximum(x, y)
    else:
        found = x + y
    return found


@triton.jit
def _load_tile(window_ptr, work, block, back, ring, label, CP, R):
    """(rate, W of the R shortest durations, R sources) of the block `back` before, for each group.

    `back` is (G, 1), at least 1.
    """
    slot = (block + ring - back) % ring
    rate = tl.load(work.rates + slot * CP + label)
    row = window_ptr + (R * (back - 1) + 2) * CP + label
    source_row = work.sources + slot * R * CP + label
    older = ()
    sources = ()
    for m in tl.static_range(R):
        older = older + (tl.load(row + m * CP),)
        sources = sources + (tl.load(source_row + m * CP),)
    return rate, older, sources


@triton.jit
def _newest_durations(window_ptr, back, label, CP, R):
    """W of the R - 1 longest durations of the tile of the block `back` before."""
    row = window_ptr + (R * back + 2) * CP + label
    values = ()
    for m in tl.static_range(R - 1):
        values = values + (tl.load(row + m * CP),)
    return values


@triton.jit
def far_window(window_ptr, work, block, blocks, ring, older_ptr, tail_ptr, MAX, CP, R, G):
    """Contribution of the sources of the last `blocks` blocks to the R outputs of this one.

    G groups of warps take a share of neighbouring blocks each, and are summed at the end. If
    given (with one group), `older_ptr` holds what still older sources give, by `far_kernel`. In
    the max pass with a tail the sources before those blocks come in as one.

    Returns
    -------
    found : tuple of R tensors of shape (CP,)
    lost : Tensor of shape (CP,)
        Bound of what underflow dropped.
    """
    ZERO: tl.constexpr = float("-inf") if MAX else 0.0
    ONE: tl.constexpr = 0.0 if MAX else 1.0
    label = tl.arange(0, CP)[None, :]
    group = tl.arange(0, G)[:, None]
    share = (blocks + G - 1) // G
    found = ()
    lost = tl.zeros([G, CP], tl.float64)
    if older_ptr is not None:
        tl.static_assert(G == 1)
        for j in tl.static_range(R):
            found = found + (tl.load(older_ptr + j * CP + label),)
        if not MAX:
            lost = tl.load(older_ptr + R * CP + label)
    elif MAX and tail_ptr is not None:
        level = tl.load(work.longer + (block - blocks) % ring * CP + label)
        level += tl.load(tail_ptr + CP + label)
        level = tl.where((group == G - 1) & (block > blocks), level, float("-inf"))
        for _j in tl.static_range(R):
            found = found + (level,)
            level = level + tl.load(tail_ptr + label)
    else:
        for _j in tl.static_range(R):
            found = found + (tl.full([G, CP], ZERO, tl.float64),)
    oldest = tl.minimum((group + 1) * share, blocks)  # of the group's share
    back = tl.maximum(oldest, 1)
    newer = _newest_durations(window_ptr, back, label, CP, R)
    rate, older, sources = _load_tile(window_ptr, work, block, back, ring, label, CP, R)
    for i in range(share):
        live = oldest - i > group * share
        rate = tl.where(live, rate, ONE)
        if not MAX:
            lost = lost * rate + _DROPPED
        tile = older + newer
        scaled = ()
        for j in tl.static_range(R):
            scaled = scaled + (_times(found[j], rate, MAX),)
        found = scaled
        current = sources
        # The next tile is under way while this one is multiplied.
        back = tl.maximum(oldest - i - 1, 1)
        rate, older, sources = _load_tile(window_ptr, work, block, back, ring, label, CP, R)
        for r in tl.static_range(R):
            source = tl.where(live, current[r], ZERO)
            added = ()
            for j in tl.static_range(R):
                term = _times(source, tile[j - r + R - 1], MAX)
                added = added + (_plus(found[j], term, MAX),)
            found = added
        newer = tile[: R - 1]
    if G == 1:
        total = ()
        for j in tl.static_range(R):
            total = total + (tl.max(found[j], 0) if MAX else tl.sum(found[j], 0),)
        lost_total = tl.sum(lost, 0)
    else:
        factor = tl.full([G, CP], ONE, tl.float64)
        for newest in range(1, (G - 1) * share + 1):
            slot = (block + ring - tl.minimum(newest, blocks)) % ring
            passed = (newest <= group * share) & (newest <= blocks)
            step_rate = tl.load(work.rates + slot * CP + label)
            factor = _times(factor, tl.where(passed, step_rate, ONE), MAX)
        scaled = ()
        for j in tl.static_range(R):
            scaled = scaled + (_times(found[j], factor, MAX),)
        total, lost_total = _over_groups(scaled, lost * factor, MAX, R)
    return total, lost_total


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _add9(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    low = a0 + b0, a1 + b1, a2 + b2, a3 + b3
    return low + (a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8)


@triton.jit
def _max4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _max8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return _max4(a0, a1, a2, a3, b0, b1, b2, b3) + _max4(a4, a5, a6, a7, b4, b5, b6, b7)


@triton.jit
def _over_groups(x, lost, MAX, R):
    """Sums, or maxima, of R tensors (G, CP) over the groups, and the sum of what was lost, in one
    exchange."""
    tl.static_assert((R == 4) or (R == 8))
    if MAX:
        lost = tl.sum(lost, 0)
        if R == 4:
            found = tl.reduce(x, 0, _max4)
        else:
            found = tl.reduce(x, 0, _max8)
    else:
        if R == 4:
            found = tl.reduce(x + (lost,), 0, _add5)
        else:
            found = tl.reduce(x + (lost,), 0, _add9)
        lost = found[R]
    return found[:R], lost


@labels_last
@triton.jit
def far_kernel(window_ptr, tail_ptr, workspace_ptr, part, done, MAX, CP, R, G):
    """Contribution of all sources before a part of a pass to the outputs of its blocks.

    Program (block of the part, program of the pass); into the workspace, as `far_window` reads it.
    Nothing for sequences that are `done`.
    """
    ahead = tl.program_id(0)
    label = tl.arange(0, CP)
    start = workspace_ptr + tl.program_id(1).to(tl.int64) * part.stride
    work = workspace_at(start, part.ring, MAX, tail_ptr is not None, CP, R)
    older_ptr = work.older + ahead * (R + 1) * CP
    first = part.begin // R
    blocks = tl.maximum(tl.minimum(part.blocks_back - ahead, first), 0)
    if done is not None:
        b = tl.program_id(1) // done.directions
        is_left = is_done(done, b, tl.num_programs(1) // done.directions) == 0
        blocks = tl.where(is_left, blocks, 0)
    row = window_ptr + ahead * R * CP
    found, lost = far_window(row, work, first, blocks, part.ring, None, tail_ptr, MAX, CP, R, G)
    for j in tl.static_range(R):
        tl.store(older_ptr + j * CP + label, found[j])
    if not MAX:
        tl.store(older_ptr + R * CP + label, lost)

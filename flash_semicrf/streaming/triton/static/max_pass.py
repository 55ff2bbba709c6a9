"""The messages of decoding for static transitions: one program per sequence.

    h_s(c)     = max_{c'} [alpha_s(c') + A[c', c]] + start_s(c) - S_s(c)
    alpha_t(c) = S_t(c) + end_{t-1}(c) + max_{k=1..K} [h_{t-k}(c) + D_k(c)]

Blocks of R steps, as in the passes of log Z; sums have no range to leave, so there is one form of
block. With a duration tail all sources before the window come in as one; see
`flash_semicrf.streaming.triton.static.tail`. float64; T(KC + C²) additions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.numerics import allowed, common_part, is_deep, settled, wide
from flash_semicrf.streaming.triton.static.far import far_window
from flash_semicrf.streaming.triton.static.linear_block import CHAINS, load_matrix, load_rows
from flash_semicrf.streaming.triton.static.plan import workspace_at

__all__ = ["MaxMessages", "max_pass_kernel"]


class MaxMessages(NamedTuple):
    """Output of `max_pass_kernel`. Messages leave out the common parts of the scores, and running
    scores the deep ones."""

    alpha: Tensor  # (B, T, C), alpha_{p+1} in row p
    sources: Tensor  # (B, T, C), h_p
    best: Tensor  # (B,)
    masked: Tensor  # (B,), int32: whether there are scores that are deep or forbid


class Block(NamedTuple):
    """Scores of a block, tuples of R tensors (CP,)."""

    x: tuple  # less the common part of their position
    counted: tuple  # those that running scores take in
    opening: tuple | None  # boundary scores
    closing: tuple | None


@triton.jit
def _max_steps(live, maxima, near, matrix, scores, to, base, step, length, C, label, CP, R):
    """Run the R steps after `step`.

    Of `live`, g, the running scores and the last row; returns them for the next block, and the
    block's sources.
    """
    g, prefix, final_row = live
    sources = ()
    for i in tl.static_range(R):
        here = step + i
        source = g
        if scores.opening is not None:
            source = g + scores.opening[i]
        sources = sources + (source,)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (maxima[j],)
            else:
                pushed = pushed + (tl.maximum(maxima[j], source + near[j - i]) + scores.x[i],)
        maxima = pushed
        alpha = maxima[i]
        if scores.closing is not None:
            alpha = alpha + scores.closing[i]
        keep = (label < C) & (here < length)
        place = base + here * C + label
        tl.store(to.sources + place, source - prefix, mask=keep)
        tl.store(to.alpha + place, alpha, mask=keep)
        prefix += scores.counted[i]
        final_row = tl.where(here + 1 == length, alpha, final_row)
        moved = tl.reshape(matrix + alpha[:, None], [CHAINS, CP // CHAINS, CP])
        g = tl.max(tl.max(moved, 1), 0)
    return (g, prefix, final_row), sources


@triton.jit
def _longest(longer, sources, x, rate, tail, R):
    """Best of all sources so far, with one tail for each position since, at the end of a block."""
    longer += rate + R * tail
    since = tl.zeros_like(rate)
    for r in tl.static_range(R):
        since = since + x[R - 1 - r] + tail
        longer = tl.maximum(longer, sources[R - 1 - r] + since)
    return longer


@triton.jit
def _wide_rows(row_ptr, step, length, label, C, R):
    rows = load_rows(row_ptr, step, length, 1, label, C, R)
    values = ()
    for i in tl.static_range(R):
        values = values + (wide(rows[i]),)
    return values


@triton.jit
def _settled_rows(rows, inside, count, R):
    """Settled rows, float64; those that running sums take in; sum of the common parts; any mask.

    A mask is a score that forbids or is deep, of a label `inside` in the first `count` rows.
    """
    values = ()
    counted = ()
    common = tl.zeros([], tl.float64)
    masked = inside != inside
    for i in tl.static_range(R):
        top = tl.max(rows[i], 0)
        row = settled(rows[i], top)
        mask = is_deep(rows[i], top) | (allowed(row) == 0)
        values = values + (row,)
        counted = counted + (tl.where(mask, 0.0, row),)
        common += common_part(top).to(tl.float64)
        masked = masked | (mask & inside & (i < count))
    return values, counted, common, tl.max(masked.to(tl.int32), 0)


@labels_last
@triton.jit
def max_pass_kernel(problem, tables, workspace_ptr, to, part, PARTS, CP, R, G):
    """Run the steps of a part of the pass, in parts as in `pass_kernel`; program (b,)."""
    HAS_BOUNDARY: tl.constexpr = problem.start is not None
    HAS_TAIL: tl.constexpr = tables.tail is not None
    b = tl.program_id(0).to(tl.int64)
    C, ring = problem.sizes.C, part.ring
    label = tl.arange(0, CP)
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    base = b * problem.sizes.T * C
    score_ptr = problem.scores + base
    work = workspace_at(workspace_ptr + b * part.stride, ring, True, HAS_TAIL, CP, R)
    matrix = load_matrix(tables.log_matrix, part.unit, CP)
    near = ()
    for i in tl.static_range(R):
        near = near + (tl.load(tables.log_window + (i + 1) * CP + label),)
    g = tl.load(tables.first + label)
    prefix = tl.zeros([CP], tl.float64)
    final_row = tl.full([CP], float("-inf"), tl.float64)
    common = tl.zeros([], tl.float64)
    masked = tl.zeros([], tl.int32)
    if PARTS:
        if part.begin > 0:
            g = tl.load(work.state + label)
            prefix = tl.load(work.state + CP + label)
            final_row = tl.load(work.state + 2 * CP + label)
            common = tl.load(work.state + 3 * CP)
            masked = tl.load(work.state + 3 * CP + 1).to(tl.int32)
    ahead = load_rows(score_ptr, part.begin, length, 1, label, C, R)
    for step in range(part.begin, tl.minimum(part.end, length), R):
        block = step // R
        slot = block % ring
        x, counted, out, any_mask = _settled_rows(ahead, label < C, length - step, R)
        common += out
        masked = masked | any_mask
        ahead = load_rows(score_ptr, step + R, length, 1, label, C, R)
        opening, closing = None, None
        if HAS_BOUNDARY:
            opening = _wide_rows(problem.start + base, step, length, label, C, R)
            closing = _wide_rows(problem.end + base, step, length, label, C, R)
        known, older_ptr = block, None
        if PARTS:
            known = block - part.begin // R
            older_ptr = work.older + known * (R + 1) * CP
        blocks = tl.minimum(part.blocks_back, known)
        maxima, _ = far_window(
            tables.log_window, work, block, blocks, ring, older_ptr, tables.tail, True, CP, R, G
        )
        live = g, prefix, final_row
        scores = Block(x, counted, opening, closing)
        live, sources = _max_steps(
            live, maxima, near, matrix, scores, to, base, step, length, C, label, CP, R
        )
        g, prefix, final_row = live
        rate = tl.zeros([CP], tl.float64)
        for r in tl.static_range(R):
            rate = rate + x[R - 1 - r]
            row = work.sources + (slot * R + R - 1 - r) * CP
            tl.store(row + label, sources[R - 1 - r] + rate)
        if HAS_TAIL:
            longer = tl.load(work.longer + slot * CP + label)
            longer = tl.where(block > 0, longer, float("-inf"))
            longer = _longest(longer, sources, x, rate, tl.load(tables.tail + label), R)
            tl.debug_barrier()
            tl.store(work.longer + (block + 1) % ring * CP + label, longer)
        tl.store(work.rates + slot * CP + label, rate)
        tl.debug_barrier()
    if PARTS:
        tl.store(work.state + label, g)
        tl.store(work.state + CP + label, prefix)
        tl.store(work.state + 2 * CP + label, final_row)
        tl.store(work.state + 3 * CP, common)
        tl.store(work.state + 3 * CP + 1, masked.to(tl.float64))
    if (part.begin < length) & (part.end >= length):
        best = tl.max(final_row + tl.load(tables.first + CP + label), 0)
        tl.store(to.best + b, best + common)
        tl.store(to.masked + b, masked)

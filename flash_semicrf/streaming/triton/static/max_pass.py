"""The messages of decoding for static transitions: one program per sequence.

    h_s(c)     = max_{c'} [alpha_s(c') + A[c', c]] + start_s(c) - S_s(c)
    alpha_t(c) = S_t(c) + end_{t-1}(c) + max_{k=1..K} [h_{t-k}(c) + D_k(c)]

Blocks of R steps, as in the passes of log Z; sums have no range to leave, so there is one form of
block. With a duration tail all sources before the window come in as one; see
`flash_semicrf.streaming.triton.static.tail`. float64; T(KC + C²) additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.numerics import allowed, common_part, is_deep, settled, wide
from flash_semicrf.streaming.triton.static.linear_block import (
    load_matrix,
    load_tile,
    newest_durations,
)
from flash_semicrf.streaming.triton.static.passes import load_rows

__all__ = ["far_maxima_kernel", "max_pass_kernel"]


@triton.jit
def _far_maxima(
    window_ptr, sources_ptr, rates_ptr, block, blocks, ring, older_ptr, longer_ptr, tail_ptr,
    HAS_OLDER: tl.constexpr, HAS_TAIL: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Best of the sources of the last `blocks` blocks for each of the R outputs of this one.

    As `far_window`, with sums for products and maxima for sums. With a tail the sources before
    those blocks come in as one.
    """
    label = tl.arange(0, CP)[:, None]
    group = tl.arange(0, G)[None, :]
    share = (blocks + G - 1) // G
    maxima = ()
    if HAS_OLDER:
        tl.static_assert(G == 1)
        for j in tl.static_range(R):
            maxima = maxima + (tl.load(older_ptr + j * CP + label),)
    elif HAS_TAIL:
        level = tl.load(longer_ptr + (block - blocks) % ring * CP + label)
        level += tl.load(tail_ptr + CP + label)
        level = tl.where((group == G - 1) & (block > blocks), level, float("-inf"))
        for _j in tl.static_range(R):
            maxima = maxima + (level,)
            level = level + tl.load(tail_ptr + label)
    else:
        for _j in tl.static_range(R):
            maxima = maxima + (tl.full([CP, G], float("-inf"), tl.float64),)
    oldest = tl.minimum((group + 1) * share, blocks)
    back = tl.maximum(oldest, 1)
    newer = newest_durations(window_ptr, back, label, CP, R)
    rate, older, sources = load_tile(
        window_ptr, sources_ptr, rates_ptr, block, back, ring, label, CP, R
    )
    for i in range(share):
        live = oldest - i > group * share
        rate = tl.where(live, rate, 0.0)
        tile = older + newer
        moved = ()
        for j in tl.static_range(R):
            moved = moved + (maxima[j] + rate,)
        maxima = moved
        current = sources
        rate, older, sources = load_tile(
            window_ptr, sources_ptr, rates_ptr, block, tl.maximum(oldest - i - 1, 1), ring, label,
            CP, R,
        )  # fmt: skip
        for r in tl.static_range(R):
            source = tl.where(live, current[r], float("-inf"))
            best = ()
            for j in tl.static_range(R):
                best = best + (tl.maximum(maxima[j], source + tile[j - r + R - 1]),)
            maxima = best
        newer = tile[: R - 1]
    if G == 1:
        found = ()
        for j in tl.static_range(R):
            found = found + (tl.max(maxima[j], 1),)
    else:
        moved_by = tl.zeros([CP, G], tl.float64)
        for newest in range(1, (G - 1) * share + 1):
            slot = (block + ring - tl.minimum(newest, blocks)) % ring
            step_rate = tl.load(rates_ptr + slot * CP + label)
            moved_by += tl.where((newest <= group * share) & (newest <= blocks), step_rate, 0.0)
        moved = ()
        for j in tl.static_range(R):
            moved = moved + (maxima[j] + moved_by,)
        found = _best_of_groups(moved, R)
    return found


@triton.jit
def _max4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _max8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return (
        tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3),
        tl.maximum(a4, b4), tl.maximum(a5, b5), tl.maximum(a6, b6), tl.maximum(a7, b7),
    )  # fmt: skip


@triton.jit
def _best_of_groups(x, R: tl.constexpr):
    """Maxima of R tensors (CP, G) over the groups in one exchange."""
    tl.static_assert((R == 4) or (R == 8))
    if R == 4:
        found = tl.reduce((x[0], x[1], x[2], x[3]), 1, _max4)
    else:
        found = tl.reduce((x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]), 1, _max8)
    return found


@triton.jit
def _max_steps(
    g, prefix, maxima, near, x, counted, opening, closing, matrix, step, length, final_row,
    alpha_row, source_out, source_row, longer, tail_ptr, stride, C, label,
    HAS_BOUNDARY: tl.constexpr, HAS_TAIL: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Run the R steps after `step`.

    Returns g, the running scores, the last row, the rate, and `longer` for the next block: the best
    of all sources so far, with one tail for each position since, at the end of the block.
    """
    inside = label < C
    sources = ()
    for i in tl.static_range(R):
        here = step + i
        source = g
        if HAS_BOUNDARY:
            source = g + opening[i]
        sources = sources + (source,)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (maxima[j],)
            else:
                pushed = pushed + (tl.maximum(maxima[j], source + near[j - i]) + x[i],)
        maxima = pushed
        alpha = maxima[i]
        if HAS_BOUNDARY:
            alpha = alpha + closing[i]
        keep = inside & (here < length)
        tl.store(source_out + i * stride + label, source - prefix, mask=keep)
        tl.store(alpha_row + i * stride + label, alpha, mask=keep)
        prefix += counted[i]
        final_row = tl.where(here + 1 == length, alpha, final_row)
        moved = tl.reshape(matrix + alpha[None, :], [CP, CHAINS, CP // CHAINS])
        g = tl.max(tl.max(moved, 2), 1)
    suffix = tl.zeros([CP], tl.float64)
    for r in tl.static_range(R):
        suffix = suffix + x[R - 1 - r]
        tl.store(source_row + (R - 1 - r) * CP + label, sources[R - 1 - r] + suffix)
    if HAS_TAIL:
        tail = tl.load(tail_ptr + label)
        longer += suffix + R * tail
        since = tl.zeros([CP], tl.float64)
        for r in tl.static_range(R):
            since = since + x[R - 1 - r] + tail
            longer = tl.maximum(longer, sources[R - 1 - r] + since)
    return g, prefix, final_row, suffix, longer


@triton.jit
def _wide_rows(rows, R: tl.constexpr):
    values = ()
    for i in tl.static_range(R):
        values = values + (wide(rows[i]),)
    return values


@triton.jit
def _settled_rows(rows, inside, count, R: tl.constexpr):
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


@kernel
def max_pass_kernel(
    scores_ptr, start_ptr, end_ptr, lengths_ptr, log_window_ptr, log_matrix_ptr, first_ptr,
    tail_ptr, workspace_ptr, alpha_ptr, sources_ptr, best_ptr, masked_ptr,
    T, C, begin, end, blocks_back, ring, workspace_stride, unit,
    HAS_BOUNDARY: tl.constexpr, HAS_TAIL: tl.constexpr, PARTS: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Fill row p of `alpha` and `sources` (B, T, C), alpha_{p+1} and h_p, and `best` (B,).

    Messages leave out the common parts of the scores, and running scores the deep ones; `masked`
    (B,) int32 says whether there are scores that are deep or forbid.
    Steps after `begin` up to `end`, in parts as in `pass_kernel`. Program (b,).
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    base = b * T * C
    ring_ptr = workspace_ptr + b * workspace_stride
    rates_ptr = ring_ptr + ring * R * CP
    state_ptr = rates_ptr + ring * CP
    longer_ptr = state_ptr + 4 * CP
    older_ptr = longer_ptr
    if HAS_TAIL:
        older_ptr += ring * CP
    matrix = load_matrix(log_matrix_ptr, unit, CP)
    near = ()
    for i in tl.static_range(R):
        near = near + (tl.load(log_window_ptr + (i + 1) * CP + label),)
    g = tl.load(first_ptr + label)
    prefix = tl.zeros([CP], tl.float64)
    final_row = tl.full([CP], float("-inf"), tl.float64)
    common = tl.zeros([], tl.float64)
    masked = tl.zeros([], tl.int32)
    if PARTS:
        if begin > 0:
            g = tl.load(state_ptr + label)
            prefix = tl.load(state_ptr + CP + label)
            final_row = tl.load(state_ptr + 2 * CP + label)
            common = tl.load(state_ptr + 3 * CP)
            masked = tl.load(state_ptr + 3 * CP + 1).to(tl.int32)
    ahead = load_rows(scores_ptr + base, begin, length, 1, C, label, C, R)
    for step in range(begin, tl.minimum(end, length), R):
        block = step // R
        slot = block % ring
        x, counted, out, any_mask = _settled_rows(ahead, label < C, length - step, R)
        common += out
        masked = masked | any_mask
        ahead = load_rows(scores_ptr + base, step + R, length, 1, C, label, C, R)
        opening = x
        closing = x
        if HAS_BOUNDARY:
            opening = _wide_rows(load_rows(start_ptr + base, step, length, 1, C, label, C, R), R)
            closing = _wide_rows(load_rows(end_ptr + base, step, length, 1, C, label, C, R), R)
        known = block
        if PARTS:
            known = block - begin // R
        maxima = _far_maxima(
            log_window_ptr, ring_ptr, rates_ptr, block, tl.minimum(blocks_back, known), ring,
            older_ptr + known * R * CP, longer_ptr, tail_ptr, PARTS, HAS_TAIL, CP, R, G,
        )  # fmt: skip
        place = base + step * C
        longer = g
        if HAS_TAIL:
            longer = tl.load(longer_ptr + slot * CP + label)
            longer = tl.where(block > 0, longer, float("-inf"))
        g, prefix, final_row, rate, longer = _max_steps(
            g, prefix, maxima, near, x, counted, opening, closing, matrix, step, length, final_row,
            alpha_ptr + place, sources_ptr + place, ring_ptr + slot * R * CP, longer,
            tail_ptr, C, C, label, HAS_BOUNDARY, HAS_TAIL, CP, R, CHAINS,
        )  # fmt: skip
        if HAS_TAIL:
            tl.debug_barrier()
            tl.store(longer_ptr + (block + 1) % ring * CP + label, longer)
        tl.store(rates_ptr + slot * CP + label, rate)
        tl.debug_barrier()
    if PARTS:
        tl.store(state_ptr + label, g)
        tl.store(state_ptr + CP + label, prefix)
        tl.store(state_ptr + 2 * CP + label, final_row)
        tl.store(state_ptr + 3 * CP, common)
        tl.store(state_ptr + 3 * CP + 1, masked.to(tl.float64))
    if (begin < length) & (end >= length):
        best = tl.max(final_row + tl.load(first_ptr + CP + label), 0)
        tl.store(best_ptr + b, best + common)
        tl.store(masked_ptr + b, masked)


@kernel
def far_maxima_kernel(
    log_window_ptr, tail_ptr, workspace_ptr, begin, blocks_back, ring, workspace_stride,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """As `far_kernel`, for the max pass; program (block of the part, b)."""
    ahead = tl.program_id(0)
    label = tl.arange(0, CP)
    ring_ptr = workspace_ptr + tl.program_id(1).to(tl.int64) * workspace_stride
    rates_ptr = ring_ptr + ring * R * CP
    longer_ptr = rates_ptr + (ring + 4) * CP
    older_ptr = longer_ptr + ahead * R * CP
    if HAS_TAIL:
        older_ptr += ring * CP
    first = begin // R
    blocks = tl.maximum(tl.minimum(blocks_back - ahead, first), 0)
    maxima = _far_maxima(
        log_window_ptr + ahead * R * CP, ring_ptr, rates_ptr, first, blocks, ring, older_ptr,
        longer_ptr, tail_ptr, False, HAS_TAIL, CP, R, G,
    )  # fmt: skip
    for j in tl.static_range(R):
        tl.store(older_ptr + j * CP + label, maxima[j])

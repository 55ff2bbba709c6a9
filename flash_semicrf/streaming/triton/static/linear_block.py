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

import triton
import triton.language as tl

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
    "across_labels",
    "far_window",
    "linear_steps",
    "load_matrix",
    "load_tile",
    "newest_durations",
    "score_factors",
]

# High words of LOW = 1e-200 and HIGH = 1e60: whole numbers compare faster, and on other units.
_LOW = tl.constexpr(0x16687E92)
_HIGH = tl.constexpr(0x4C63E9E4)
_DROPPED = tl.constexpr(1e-300)  # bound of what one block can lose to underflow
_HARMLESS = tl.constexpr(1e-220)
_SMALLEST_FACTOR = tl.constexpr(0x2B2BFF2E)  # high word of 1e-100


@triton.jit
def score_factors(x, R: tl.constexpr):
    """Scores of R rows as factors.

    Returns
    -------
    rows : tuple of R tensors
        The scores less the common part of their row, float64, by `settled`.
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
        row = settled(x[i], top)
        shift = round_whole(tl.where(allowed(top), top - out, 0.0).to(tl.float64))
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
def load_tile(
    window_ptr, sources_ptr, rates_ptr, block, back, ring, label,
    CP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """(rate, W of the R shortest durations, R sources) of the block `back` before, for each group.

    `back` is (1, G), at least 1.
    """
    slot = (block + ring - back) % ring
    rate = tl.load(rates_ptr + slot * CP + label)
    row = window_ptr + (R * (back - 1) + 2) * CP + label
    source_row = sources_ptr + slot * R * CP + label
    older = ()
    sources = ()
    for m in tl.static_range(R):
        older = older + (tl.load(row + m * CP),)
        sources = sources + (tl.load(source_row + m * CP),)
    return rate, older, sources


@triton.jit
def newest_durations(window_ptr, back, label, CP: tl.constexpr, R: tl.constexpr):
    """W of the R - 1 longest durations of the tile of the block `back` before."""
    row = window_ptr + (R * back + 2) * CP + label
    values = ()
    for m in tl.static_range(R - 1):
        values = values + (tl.load(row + m * CP),)
    return values


@triton.jit
def far_window(
    window_ptr, sources_ptr, rates_ptr, block, blocks, ring, older_ptr,
    HAS_OLDER: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """What the sources of the last `blocks` blocks give to the R outputs of this one.

    G groups of warps take a share of neighbouring blocks each, and are summed at the end. With
    HAS_OLDER (and one group), `older_ptr` holds what still older sources give, by `far_kernel`.

    Returns
    -------
    sums : tuple of R tensors of shape (CP,)
    lost : Tensor of shape (CP,)
        Bound of what underflow dropped.
    """
    label = tl.arange(0, CP)[:, None]
    group = tl.arange(0, G)[None, :]
    share = (blocks + G - 1) // G
    sums = ()
    if HAS_OLDER:
        tl.static_assert(G == 1)
        for j in tl.static_range(R):
            sums = sums + (tl.load(older_ptr + j * CP + label),)
        lost = tl.load(older_ptr + R * CP + label)
    else:
        for _j in tl.static_range(R):
            sums = sums + (tl.zeros([CP, G], tl.float64),)
        lost = tl.zeros([CP, G], tl.float64)
    oldest = tl.minimum((group + 1) * share, blocks)  # of the group's share
    back = tl.maximum(oldest, 1)
    newer = newest_durations(window_ptr, back, label, CP, R)
    rate, older, sources = load_tile(
        window_ptr, sources_ptr, rates_ptr, block, back, ring, label, CP, R
    )
    for i in range(share):
        live = oldest - i > group * share
        rate = tl.where(live, rate, 1.0)
        lost = lost * rate + _DROPPED
        tile = older + newer
        scaled = ()
        for j in tl.static_range(R):
            scaled = scaled + (sums[j] * rate,)
        sums = scaled
        current = sources
        # The next tile is under way while this one is multiplied.
        rate, older, sources = load_tile(
            window_ptr, sources_ptr, rates_ptr, block, tl.maximum(oldest - i - 1, 1), ring, label,
            CP, R,
        )  # fmt: skip
        for r in tl.static_range(R):
            source = tl.where(live, current[r], 0.0)
            added = ()
            for j in tl.static_range(R):
                added = added + (sums[j] + source * tile[j - r + R - 1],)
            sums = added
        newer = tile[: R - 1]
    if G == 1:
        total = ()
        for j in tl.static_range(R):
            total = total + (tl.sum(sums[j], 1),)
        lost_total = tl.sum(lost, 1)
    else:
        factor = tl.full([CP, G], 1.0, tl.float64)
        for newest in range(1, (G - 1) * share + 1):
            step_rate = tl.load(
                rates_ptr + (block + ring - tl.minimum(newest, blocks)) % ring * CP + label
            )
            factor = factor * tl.where(
                (newest <= group * share) & (newest <= blocks), step_rate, 1.0
            )
        scaled = ()
        for j in tl.static_range(R):
            scaled = scaled + (sums[j] * factor,)
        total, lost_total = sum_groups(scaled, lost * factor, R)
    return total, lost_total


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _add9(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    return (
        a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8,
    )  # fmt: skip


@triton.jit
def sum_groups(sums, lost, R: tl.constexpr):
    """Sum R + 1 tensors (CP, G) over the groups in one exchange."""
    tl.static_assert((R == 4) or (R == 8))
    if R == 4:
        found = tl.reduce((sums[0], sums[1], sums[2], sums[3], lost), 1, _add5)
    else:
        found = tl.reduce(
            (sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], lost), 1, _add9
        )
    return found[:R], found[R]


@triton.jit
def load_matrix(matrix_ptr, unit, CP: tl.constexpr):
    """A (CP src, CP dst) table as (CP dst, CP src), labels dst one to a lane.

    `unit` is 1: a stride that the compiler does not know keeps it from giving a lane two labels.
    """
    label = tl.arange(0, CP)
    return tl.load(matrix_ptr + label[None, :] * CP + label[:, None] * unit)


@triton.jit
def across_labels(matrix, row, CP: tl.constexpr, CHAINS: tl.constexpr):
    """Matrix times row; CHAINS sums run side by side, since each addition waits for the last."""
    product = tl.reshape(matrix * row[None, :], [CP, CHAINS, CP // CHAINS])
    return tl.sum(tl.sum(product, 2), 1)


@triton.jit
def in_range(word, exempt):
    """Whether the value of a high word is in [LOW, HIGH), or is not above HIGH and `exempt`."""
    return (word < _HIGH) & (word >= 0) & ((word > _LOW) | exempt)


@triton.jit
def linear_steps(
    g, sums, near, factors, shifts, matrix, opening, closing, x,
    step, length, reach, newest, born, final_ptr, offset, message_row, offset_row, source_row,
    direction, stride, C, label,
    HAS_BOUNDARY: tl.constexpr, KEEP: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Run the R steps after `step`.

    Parameters
    ----------
    g : Tensor of shape (CP,)
        Source of `step`, without its opening score, relative to `offset`.
    sums, near, factors, shifts, opening, closing, x : tuples of R
    matrix : Tensor
        exp(A), by `load_matrix`.
    reach : int or int32 Tensor of shape (CP,)
        Longest duration.
    newest, born : int32 Tensors of shape (CP,)
        Step of the newest live source; first step whose source no forbidden position cut off.
    final_ptr
        Gets the message of step `length` and its offset.

    Returns
    -------
    The state after the block, its scaled sources being written to `source_row`, and `ok`.
    """
    ok = g == g
    sources = ()
    for i in tl.static_range(R):
        here = step + i
        if HAS_BOUNDARY:
            source = g * opening[i]
            ok = ok & in_range(high_word(source), (high_word(g) == 0) | (opening[i] == 0))
        else:
            source = g
        sources = sources + (source,)
        newest = tl.where(high_word(source) != 0, here, newest)
        pushed = ()
        for j in tl.static_range(R):
            if j < i:
                pushed = pushed + (sums[j],)
            else:
                pushed = pushed + ((sums[j] + source * near[j - i]) * factors[i],)
        sums = pushed
        born = tl.where(allowed(x[i]), born, here + 1)
        alpha = sums[i]
        dead = (newest < born) | (newest <= here - reach)
        ok = ok & in_range(high_word(alpha), dead)
        if HAS_BOUNDARY:
            alpha = alpha * closing[i]
            ok = ok & in_range(high_word(alpha), dead | (closing[i] == 0))
        offset += shifts[i]
        if KEEP:
            inside = here < length
            place = (i * direction) * stride
            tl.store(message_row + place + label, alpha, mask=inside & (label < C))
            tl.store(offset_row + i * direction, offset, mask=inside)
        tl.store(final_ptr + label, alpha, mask=(here + 1 == length) & (label >= 0))
        tl.store(final_ptr + CP, offset, mask=here + 1 == length)
        g = across_labels(matrix, alpha, CP, CHAINS)
        word = high_word(g)
        ok = ok & in_range(word, word == 0)

    top = tl.max(g, 0)
    exponent = tl.where(top > 0, exponent_of(top), 0)
    scale = power_of_two(-exponent)
    suffix = scale
    for r in tl.static_range(R):
        suffix = suffix * factors[R - 1 - r]
        tl.store(source_row + (R - 1 - r) * CP + label, sources[R - 1 - r] * suffix)
    return g * scale, sources, newest, born, offset, exponent, suffix, ok

"""The walk back along the best segmentation, and its segments as flat tensors.

No back-pointers: the duration of a segment is the argmax over k of h_{t-k}(c) + D_k(c), the label
before it the argmax over c' of alpha_s(c') + A[c', c]. Ties: the shortest segment, then the
lowest label. K + C work per segment; one program per sequence, nothing on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import allowed

__all__ = ["table_kernel", "traceback_kernel"]

_NEVER = tl.constexpr(1 << 30)


@triton.jit
def _shortest_best(
    scores_ptr, sources_ptr, log_window_ptr, stop, label, C, K, CP: tl.constexpr, KT: tl.constexpr
):
    """Shortest duration of the best segment of a label that ends at `stop`."""
    best = tl.full([], float("-inf"), tl.float64)
    duration = 0
    cut = _NEVER  # shortest duration that covers a forbidden position
    first = 1
    longest = tl.minimum(K, stop)
    while first <= longest:
        k = first + tl.arange(0, KT)
        inside = k <= longest
        place = (stop - k) * C + label
        x = tl.load(scores_ptr + place, mask=inside, other=0.0)
        value = tl.load(sources_ptr + place, mask=inside, other=float("-inf"))
        value += tl.load(log_window_ptr + k * CP + label, mask=inside, other=float("-inf"))
        cut = tl.minimum(cut, tl.min(tl.where(allowed(x), _NEVER, k), 0))
        value = tl.where(k < cut, value, float("-inf"))
        top = tl.max(value, 0)
        where = tl.min(tl.where(value == top, k, _NEVER), 0)
        duration = tl.where(top > best, where, duration)
        best = tl.maximum(best, top)
        first = tl.where(cut < _NEVER, _NEVER, first + KT)
    return duration


@triton.jit(do_not_specialize=["T", "K"])
def traceback_kernel(
    scores_ptr, lengths_ptr, alpha_ptr, sources_ptr, best_ptr, log_window_ptr, log_matrix_ptr,
    first_ptr, starts_ptr, labels_ptr, counts_ptr, T, C, K, CP: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """Write each sequence's segments into the ends of the rows of `starts`, `labels` (B, T) int32.

    `counts` (B,) int32 gets their number, 0 where nothing is feasible. Program (b,).
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    stop = tl.load(lengths_ptr + b).to(tl.int32)
    base = b * T * C
    ranks = tl.load(first_ptr + CP + label)
    stop = tl.where(tl.load(best_ptr + b) > float("-inf"), stop, 0)
    count = 0
    while stop > 0:
        row = base + (stop - 1).to(tl.int64) * C
        value = tl.load(alpha_ptr + row + label, mask=inside, other=float("-inf")) + ranks
        value = tl.where(inside, value, float("-inf"))
        tied = value == tl.max(value, 0)
        remaining = tl.sum(tied.to(tl.int32), 0)
        chosen = 0
        duration = _NEVER
        while remaining > 0:
            candidate = tl.min(tl.where(tied, label, _NEVER), 0)
            k = _shortest_best(
                scores_ptr + base, sources_ptr + base, log_window_ptr, stop, candidate, C, K, CP, KT
            )
            chosen = tl.where(k < duration, candidate, chosen)
            duration = tl.minimum(k, duration)
            tied = tied & (label != candidate)
            remaining -= 1
        count += 1
        stop -= duration
        tl.store(starts_ptr + b * T + T - count, stop)
        tl.store(labels_ptr + b * T + T - count, chosen)
        ranks = tl.load(log_matrix_ptr + CP * CP + chosen * CP + label)
    tl.store(counts_ptr + b, count)


@triton.jit(do_not_specialize=["T", "total"])
def table_kernel(
    starts_ptr, labels_ptr, counts_ptr, lengths_ptr, table_ptr, T, total, BLOCK: tl.constexpr
):
    """Compact the rows into `table` (4, total) int64: sequence, start, stop, label; program (b,)."""
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + b)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int64)
    for first in range(0, tl.program_id(0), BLOCK):
        earlier = first + lane
        before += tl.load(counts_ptr + earlier, mask=earlier < b, other=0).to(tl.int64)
    to = table_ptr + tl.sum(before, 0)
    row = b * T + T - count
    length = tl.load(lengths_ptr + b).to(tl.int32)
    for first in range(0, count, BLOCK):
        i = first + lane
        inside = i < count
        start = tl.load(starts_ptr + row + i, mask=inside, other=0)
        label = tl.load(labels_ptr + row + i, mask=inside, other=0)
        stop = tl.load(starts_ptr + row + i + 1, mask=i + 1 < count, other=0)
        stop = tl.where(i + 1 < count, stop, length)
        tl.store(to + i, tl.zeros([BLOCK], tl.int64) + b, mask=inside)
        tl.store(to + total + i, start.to(tl.int64), mask=inside)
        tl.store(to + 2 * total + i, stop.to(tl.int64), mask=inside)
        tl.store(to + 3 * total + i, label.to(tl.int64), mask=inside)

"""The walk back along the best segmentation, and its segments as flat tensors.

Its choices at each boundary are found for all boundaries at once, in parallel: the duration of the
best segment of each label, the shortest of equals, is the argmax over k of
h_{t-k}(c) + D_k(c); the label before c the argmax over c' of alpha_t(c') + A[c', c], of equals that
with the shortest segment, then the lowest. Both go into one number per (t, c), so the walk reads
one number per segment. Cost T(KC + C²) in parallel; memory O(TC). With a duration tail the best of
all durations above K is found by one scan over the positions before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import allowed, is_deep, settled
from flash_semicrf.streaming.triton.static.tail import deep_window

__all__ = [
    "last_segment_kernel",
    "longer_segment_kernel",
    "previous_segment_kernel",
    "traceback_kernel",
]

_UNROLL = tl.constexpr(4)


@triton.jit
def longer_segment_kernel(scores_ptr, sizes, tables, m, value_ptr, start_ptr, CP):
    """Best segment longer than K of label c that ends at position p, in (B, T, C).

    `value` gets its score as `last_segment_kernel` compares them, `start` its start, the latest of
    equals. Program (b,).
    """
    T, C, K = sizes.T, sizes.C, sizes.K
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(sizes.lengths + b).to(tl.int32)
    masked = tl.load(m.masked + b)
    tail = tl.load(tables.tail + label)
    level = tl.load(tables.log_window + K * CP + label)
    row = b * T * C
    born = tl.zeros([CP], tl.int32)
    newest_deep = -(1 << 30)
    best = tl.full([CP], float("-inf"), tl.float64)
    start = tl.zeros([CP], tl.int32)
    for first in range(0, length, _UNROLL):
        scores = ()
        sources = ()
        for i in tl.static_range(_UNROLL):
            p = first + i
            here = inside & (p < length)
            place = row + p * C + label
            scores = scores + (tl.load(scores_ptr + place, mask=here, other=float("-inf")),)
            here = here & (p >= K)
            h = tl.load(m.sources + place - K * C, mask=here, other=float("-inf"))
            sources = sources + (h,)
        for i in tl.static_range(_UNROLL):
            p = first + i
            x = scores[i]
            h = sources[i]
            more = tail
            if masked != 0:
                born = tl.where(allowed(x), born, p + 1)
                h = tl.where(p - K >= born, h, float("-inf"))
                if newest_deep >= p - K:
                    h += deep_window(scores_ptr + row, p, K, label, C, CP)
                best = tl.where(born <= p, best, float("-inf"))
                top = tl.max(x, 0)
                mask = is_deep(x, top)
                more += tl.where(mask, settled(x, top), 0.0)
                newest_deep = tl.where(tl.max(mask.to(tl.int32), 0) == 1, p, newest_deep)
            start = tl.where(h >= best, p - K, start)
            best = tl.maximum(best, h) + more
            here = inside & (p < length)
            place = row + p * C + label
            tl.store(value_ptr + place, best + level, mask=here)
            tl.store(start_ptr + place, start, mask=here)


@triton.jit
def last_segment_kernel(scores_ptr, sizes, tables, m, longer_ptr, start_ptr, code_ptr, CP, TT):
    """Code ``k * CP + c`` of the best segment of label c that ends at position p, in (B, T, C).

    k is the shortest best duration; a code of 0 where there is no segment. Program (tile, b).
    """
    T, C, K = sizes.T, sizes.C, sizes.K
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * TT + tl.arange(0, TT)[:, None]
    label = tl.arange(0, CP)[None, :]
    length = tl.load(sizes.lengths + b).to(tl.int32)
    inside = (p < length) & (label < C)
    place = (b * T + p) * C + label
    masked = tl.load(m.masked + b)
    deep = tl.zeros([TT, CP], tl.float64)  # what the running scores left out of those positions
    alive = inside  # no forbidden position within the k positions up to p
    best = tl.full([TT, CP], float("-inf"), tl.float64)
    duration = tl.zeros([TT, CP], tl.int32)
    for k in range(1, tl.minimum(K, (tl.program_id(0) + 1) * TT) + 1):
        live = inside & (p + 1 >= k)
        if masked != 0:
            x = tl.load(scores_ptr + place - (k - 1) * C, mask=live, other=float("-inf"))
            alive = alive & allowed(x)
            top = tl.max(x, 1)[:, None]
            deep += tl.where(is_deep(x, top), settled(x, top), 0.0)
        value = tl.load(m.sources + place - (k - 1) * C, mask=live & alive, other=float("-inf"))
        value += tl.load(tables.log_window + k * CP + label) + deep
        duration = tl.where(value > best, k, duration)
        best = tl.maximum(value, best)
    if tables.tail is not None:
        value = tl.load(longer_ptr + place, mask=inside, other=float("-inf"))
        start = tl.load(start_ptr + place, mask=inside, other=0)
        duration = tl.where(value > best, p + 1 - start, duration)
    tl.store(code_ptr + place, duration * CP + label, mask=inside)


@triton.jit
def previous_segment_kernel(sizes, log_matrix_ptr, first_ptr, m, code_ptr, pointer_ptr, CP, TT):
    """Code of the segment before a segment of label c that starts at position p + 1, in (B, T, C).

    In a sequence's last row, every label holds the code of its last segment. Program (tile, b).
    """
    T, C = sizes.T, sizes.C
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TT + tl.arange(0, TT)
    p = row[:, None]
    label = tl.arange(0, CP)[None, :]
    length = tl.load(sizes.lengths + b).to(tl.int32)
    best = tl.full([TT, CP], float("-inf"), tl.float64)
    pointer = tl.full([TT, CP], 0x7FFFFFFF, tl.int32)
    for source in range(C):
        place = (b * T + row) * C + source
        alpha = tl.load(m.alpha + place, mask=row < length, other=float("-inf"))[:, None]
        code = tl.load(code_ptr + place, mask=row < length, other=0)[:, None]
        last = tl.load(first_ptr + CP + source)
        to = tl.load(log_matrix_ptr + source * CP + label)
        value = alpha + tl.where(p + 1 == length, last, to)
        pointer = tl.where(
            value > best, code, tl.where(value == best, tl.minimum(code, pointer), pointer)
        )
        best = tl.maximum(value, best)
    tl.store(pointer_ptr + (b * T + p) * C + label, pointer, mask=(p < length) & (label < C))


@triton.jit
def traceback_kernel(sizes, best_ptr, pointer_ptr, walks, CP):
    """Write each sequence's segments into `walks`, none where nothing is feasible; program (b,)."""
    T, C = sizes.T, sizes.C
    b = tl.program_id(0).to(tl.int64)
    stop = tl.load(sizes.lengths + b).to(tl.int32)
    stop = tl.where(tl.load(best_ptr + b) > float("-inf"), stop, 0)
    pointer_ptr += b * T * C
    starts_ptr = walks.starts + b * T + T
    labels_ptr = walks.labels + b * T + T
    label = 0
    count = 0
    while stop > 0:
        code = tl.load(pointer_ptr + (stop - 1) * C + label)
        label = code % CP
        stop -= code // CP
        count += 1
        tl.store(starts_ptr - count, stop)
        tl.store(labels_ptr - count, label)
    tl.store(walks.counts + b, count)

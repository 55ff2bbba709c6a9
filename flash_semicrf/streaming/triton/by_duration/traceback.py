"""Decoding with transitions by duration: the last segments in parallel, then the walk.

The label before a segment depends on its duration, so the walk ranks the labels itself, at one row
of A_k per segment; the shortest best duration of each label is found for all boundaries at once.
Ties: the shortest segment, then the lowest label.
"""

from __future__ import annotations

import triton.language as tl

from flash_semicrf.streaming.triton.by_duration.passes import gamma_row
from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.log_rows import deep_content
from flash_semicrf.streaming.triton.numerics import wide

__all__ = ["duration_last_segment_kernel", "duration_traceback_kernel"]


@kernel
def duration_last_segment_kernel(
    transition_ptr, bias_ptr, initial_ptr, lengths_ptr, source_ptr, deep_ptr, born_ptr,
    alpha_ptr, longer_ptr, code_ptr, T, C, K,
    HAS_INITIAL: tl.constexpr, HAS_TAIL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Code ``k * CP + c`` of the best segment of label c that ends at p; program (p, b).

    With HAS_TAIL `longer` (B, T+1, C) int32 has the durations above K, where they are better.
    """
    t = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    base = b * (T + 1) * C
    best = tl.full([CP], float("-inf"), tl.float64)
    duration = tl.zeros([CP], tl.int32)
    if t <= length:
        born = tl.load(born_ptr + base + t * C + label, mask=inside, other=0)
        for k in range(1, tl.minimum(K, t) + 1):
            s = t - k
            x = gamma_row(
                alpha_ptr + base, transition_ptr, initial_ptr, s, k, label, C, HAS_INITIAL, True
            )
            bias = tl.load(bias_ptr + (k - 1) * C + label, mask=inside, other=float("-inf"))
            x += tl.load(source_ptr + base + s * C + label, mask=inside, other=0.0) + wide(bias)
            x += deep_content(deep_ptr + base, s, t, label, C)
            x = tl.where(s >= born, x, float("-inf"))
            duration = tl.where(x > best, k, duration)
            best = tl.maximum(best, x)
        if HAS_TAIL:
            longer = tl.load(longer_ptr + base + t * C + label, mask=inside, other=0)
            duration = tl.where(longer > 0, longer, duration)
    tl.store(code_ptr + (b * T + t - 1) * C + label, duration * CP + label, mask=inside)


@kernel
def duration_traceback_kernel(
    transition_ptr, final_ptr, lengths_ptr, alpha_ptr, code_ptr, best_ptr,
    starts_ptr, labels_ptr, counts_ptr, T, C, K, HAS_FINAL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Write the segments as `traceback_kernel` does; program (b,)."""
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    stop = tl.load(lengths_ptr + b).to(tl.int32)
    stop = tl.where(tl.load(best_ptr + b) > float("-inf"), stop, 0)
    rank = tl.zeros([CP], tl.float64)
    if HAS_FINAL:
        rank = wide(tl.load(final_ptr + label, mask=inside, other=float("-inf")))
    starts_ptr += b * T + T
    labels_ptr += b * T + T
    count = 0
    while stop > 0:
        alpha = tl.load(
            alpha_ptr + (b * (T + 1) + stop) * C + label, mask=inside, other=float("-inf")
        )
        code = tl.load(code_ptr + (b * T + stop - 1) * C + label, mask=inside, other=0)
        value = tl.where(inside, alpha + rank, float("-inf"))
        code = tl.min(tl.where(value == tl.max(value, 0), code, 0x7FFFFFFF), 0)
        chosen = code % CP
        k = code // CP
        stop -= k
        count += 1
        tl.store(starts_ptr - count, stop)
        tl.store(labels_ptr - count, chosen)
        place = ((tl.minimum(k, K) - 1) * C + label) * C + chosen
        rank = wide(tl.load(transition_ptr + place, mask=inside, other=float("-inf")))
    tl.store(counts_ptr + b, count)

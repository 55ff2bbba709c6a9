"""Decoding with transitions by duration: the last segments in parallel, then the walk.

The label before a segment depends on its duration, so the walk ranks the labels itself, at one row
of A_k per segment; the shortest best duration of each label is found for all boundaries at once.
Ties: the shortest segment, then the lowest label.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.by_duration.gradient import run_passes
from flash_semicrf.streaming.triton.by_duration.passes import gamma_row, messages_from, with_segment
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.log_rows import load_row
from flash_semicrf.streaming.triton.numerics import wide
from flash_semicrf.streaming.triton.posterior import common_before
from flash_semicrf.streaming.triton.prefixes import inputs_of, rows_from
from flash_semicrf.streaming.triton.records import State
from flash_semicrf.streaming.triton.table import collect_table, walks_of

__all__ = [
    "decoded",
    "duration_last_segment_kernel",
    "duration_traceback_kernel",
    "max_messages",
    "viterbi",
]


@triton.jit
def duration_last_segment_kernel(state, sizes, code_ptr, CP):
    """Code ``k * CP + c`` of the best segment of label c that ends at p; program (p, b).

    With a tail `longer` (B, T+1, C) int32 has the durations above K, where they are better.
    """
    t = tl.program_id(0) + 1
    b = tl.program_id(1).to(tl.int64)
    C = sizes.C
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(sizes.lengths + b).to(tl.int32)
    base = b * (sizes.T + 1) * C
    m = messages_from(state.messages, base)
    state = State(state.parameters, rows_from(state.prefixes, base), m)
    best = tl.full([CP], float("-inf"), tl.float64)
    duration = tl.zeros([CP], tl.int32)
    if t <= length:
        for k in range(1, tl.minimum(sizes.K, t) + 1):
            x = gamma_row(state, t - k, k, label, C, True)
            x = with_segment(x, state, t - k, k, label, C)
            duration = tl.where(x > best, k, duration)
            best = tl.maximum(best, x)
        if state.parameters.tail is not None:
            longer = tl.load(m.longer + t * C + label, mask=inside, other=0)
            duration = tl.where(longer > 0, longer, duration)
    tl.store(code_ptr + (b * sizes.T + t - 1) * C + label, duration * CP + label, mask=inside)


@triton.jit
def duration_traceback_kernel(state, sizes, code_ptr, walks, CP):
    """Write the segments into `walks`, none where nothing is feasible; program (b,)."""
    b = tl.program_id(0).to(tl.int64)
    T, C, K = sizes.T, sizes.C, sizes.K
    given, m = state.parameters, state.messages
    label = tl.arange(0, CP)
    inside = label < C
    stop = tl.load(sizes.lengths + b).to(tl.int32)
    stop = tl.where(tl.load(m.log_z + b) > float("-inf"), stop, 0)
    rank = tl.zeros([CP], tl.float64)
    if given.final is not None:
        rank = load_row(given.final, label, C)
    starts_ptr = walks.starts + b * T + T
    labels_ptr = walks.labels + b * T + T
    count = 0
    while stop > 0:
        alpha = load_row(m.alpha + (b * (T + 1) + stop) * C, label, C)
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
        rank = wide(tl.load(given.transition + place, mask=inside, other=float("-inf")))
    tl.store(walks.counts + b, count)


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = explicit_start(potentials)  # the kernels' own first term is a maximum in the max pass
    state = run_passes(inputs_of(p), both=False, maximum=True)
    return state.messages.alpha + common_before(p)


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    return decoded(potentials)[:2]


def decoded(potentials: Potentials) -> tuple[Tensor, SegmentTable, Tensor]:
    """Best scores, segments, and the messages of the max pass, (B, T + 1, C)."""
    p = explicit_start(potentials)
    B, T, C = p.scores.shape
    inputs = inputs_of(p)
    state = run_passes(inputs, both=False, maximum=True)
    codes = torch.empty((B, T, C), dtype=torch.int32, device=p.device)
    walks = walks_of(B, T, p.device)
    sizes = inputs.sizes
    launch(duration_last_segment_kernel, (T, B), state, sizes, codes, **inputs.options)
    options = {**inputs.options, "num_warps": 1}
    launch(duration_traceback_kernel, (B,), state, sizes, codes, walks, **options)
    best = state.messages.log_z + inputs.prefixes.common
    return best, collect_table(walks, sizes), state.messages.alpha

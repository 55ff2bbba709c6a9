"""Running scores of positions, as the kernels in the log domain read them.

A segment [s, t) of label c scores, beside its transition and its duration,

    sink_t(c) + source_s(c) + deep_t(c) - deep_s(c)

where no forbidden position cuts it: s >= born_t(c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.jit import kernel, launch
from flash_semicrf.streaming.triton.numerics import allowed, common_part, is_deep, settled, wide
from flash_semicrf.streaming.triton.static.launch import Problem

__all__ = ["Prefixes", "prefix_kernel", "prefixes_of"]


class Prefixes(NamedTuple):
    """Output of `prefix_kernel`; rows after a sequence's end are arbitrary."""

    sink: Tensor  # (B, T + 1, C)
    source: Tensor
    deep: Tensor
    born: Tensor  # int32
    common: Tensor  # (B,)


@kernel
def prefix_kernel(
    scores_ptr, start_ptr, end_ptr, lengths_ptr, sink_ptr, source_ptr, deep_ptr, born_ptr,
    common_ptr, T, C,
    HAS_BOUNDARY: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Row t of `sink`, `source`, `deep` and `born` (B, T+1, C), and `common` (B,); program (b,).

    `sink` S_t + end_{t-1}, `source` start_t - S_t, `born` the first start that no forbidden
    position before t cut off. What forbids counts 0 in S. The common parts of the scores are left
    out, and the deep ones summed apart: a segment without any has a difference of exactly 0.
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    total = tl.zeros([CP], tl.float64)
    below = tl.zeros([CP], tl.float64)
    common = tl.zeros([], tl.float64)
    born = tl.zeros([CP], tl.int32)
    for t in range(length + 1):
        row = (b * (T + 1) + t) * C + label
        position = (b * T + t) * C + label
        sink = total
        source = -total
        if HAS_BOUNDARY:
            sink += wide(tl.load(end_ptr + position - C, mask=inside & (t > 0), other=0.0))
            source += wide(tl.load(start_ptr + position, mask=inside & (t < length), other=0.0))
        tl.store(sink_ptr + row, sink, mask=inside)
        tl.store(source_ptr + row, source, mask=inside)
        tl.store(deep_ptr + row, below, mask=inside)
        tl.store(born_ptr + row, born, mask=inside)
        x = tl.load(scores_ptr + position, mask=inside & (t < length), other=float("-inf"))
        if x.dtype.primitive_bitwidth < 32:
            x = x.to(tl.float32)
        top = tl.max(x, 0)
        deep = is_deep(x, top)
        x = settled(x, top)
        common += common_part(top).to(tl.float64)
        total += tl.where(allowed(x) & (deep == 0), x, 0.0)
        below += tl.where(deep, x, 0.0)
        born = tl.where(allowed(x), born, t + 1)
    tl.store(common_ptr + b, common)


def prefixes_of(problem: Problem, labels: int) -> Prefixes:
    """Prefixes of a problem whose labels are padded to `labels`."""
    B, T, C = problem.scores.shape
    device = problem.scores.device
    sink, source, deep = torch.empty((3, B, T + 1, C), dtype=torch.float64, device=device)
    common = torch.empty(B, dtype=torch.float64, device=device)
    born = torch.empty((B, T + 1, C), dtype=torch.int32, device=device)
    launch(
        prefix_kernel, (B,),
        problem.scores, problem.start, problem.end, problem.lengths, sink, source, deep, born,
        common, T, C,
        HAS_BOUNDARY=problem.has_boundary, CP=labels, num_warps=1,
    )  # fmt: skip
    return Prefixes(sink, source, deep, born, common)

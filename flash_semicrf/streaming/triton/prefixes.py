"""Running scores of positions, as the kernels in the log domain read them.

A segment [s, t) of label c scores, beside its transition and its duration,

    sink_t(c) + source_s(c) + deep_t(c) - deep_s(c)

where no forbidden position cuts it: s >= born_t(c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.numerics import allowed, common_part, is_deep, settled, wide
from flash_semicrf.streaming.triton.records import (
    Parameters,
    Problem,
    Sizes,
    parameters_of,
    power_of_two_above,
    problem_of,
)

__all__ = ["Inputs", "Prefixes", "inputs_of", "prefix_kernel", "prefixes_of", "rows_from"]


class Prefixes(NamedTuple):
    """Output of `prefix_kernel`; rows after a sequence's end are arbitrary."""

    sink: Tensor  # (B, T + 1, C)
    source: Tensor
    deep: Tensor
    born: Tensor  # int32
    common: Tensor  # (B,)


class Inputs(NamedTuple):
    """A problem as the kernels in the log domain read it."""

    parameters: Parameters
    prefixes: Prefixes
    sizes: Sizes
    labels: int  # C padded to a power of two

    @property
    def options(self) -> dict[str, int]:
        """Label padding and warps of kernels that hold a matrix of labels."""
        return {"CP": self.labels, "num_warps": 8 if self.labels > 32 else 4}


@triton.jit
def prefix_kernel(problem, to, CP):
    """Row t of `sink`, `source`, `deep` and `born` (B, T+1, C), and `common` (B,); program (b,).

    `sink` S_t + end_{t-1}, `source` start_t - S_t, `born` the first start that no forbidden
    position before t cut off. What forbids counts 0 in S. The common parts of the scores are left
    out, and the deep ones summed apart: a segment without any has a difference of exactly 0.
    """
    b = tl.program_id(0).to(tl.int64)
    T, C = problem.sizes.T, problem.sizes.C
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    total = tl.zeros([CP], tl.float64)
    below = tl.zeros([CP], tl.float64)
    common = tl.zeros([], tl.float64)
    born = tl.zeros([CP], tl.int32)
    for t in range(length + 1):
        row = (b * (T + 1) + t) * C + label
        position = (b * T + t) * C + label
        here = inside & (t < length)
        sink = total
        source = -total
        if problem.start is not None:
            sink += wide(tl.load(problem.end + position - C, mask=inside & (t > 0), other=0.0))
            source += wide(tl.load(problem.start + position, mask=here, other=0.0))
        tl.store(to.sink + row, sink, mask=inside)
        tl.store(to.source + row, source, mask=inside)
        tl.store(to.deep + row, below, mask=inside)
        tl.store(to.born + row, born, mask=inside)
        x = tl.load(problem.scores + position, mask=here, other=float("-inf"))
        if x.dtype.primitive_bitwidth < 32:
            x = x.to(tl.float32)
        top = tl.max(x, 0)
        deep = is_deep(x, top)
        x = settled(x, top)
        common += common_part(top).to(tl.float64)
        total += tl.where(allowed(x) & (deep == 0), x, 0.0)
        below += tl.where(deep, x, 0.0)
        born = tl.where(allowed(x), born, t + 1)
    tl.store(to.common + b, common)


@triton.jit
def rows_from(x, base):
    """Prefixes of the sequence whose rows begin at `base`."""
    return Prefixes(x.sink + base, x.source + base, x.deep + base, x.born + base, x.common)


def prefixes_of(problem: Problem, labels: int) -> Prefixes:
    """Prefixes of a problem whose labels are padded to `labels`."""
    B, T, C = problem.scores.shape
    device = problem.scores.device
    sink, source, deep = torch.empty((3, B, T + 1, C), dtype=torch.float64, device=device)
    common = torch.empty(B, dtype=torch.float64, device=device)
    born = torch.empty((B, T + 1, C), dtype=torch.int32, device=device)
    found = Prefixes(sink, source, deep, born, common)
    launch(prefix_kernel, (B,), problem, found, CP=labels, num_warps=1)
    return found


def inputs_of(p: Potentials) -> Inputs:
    """Contiguous tensors and prefixes of a problem."""
    problem = problem_of(p)
    labels = max(4, power_of_two_above(p.num_labels))
    return Inputs(parameters_of(p), prefixes_of(problem, labels), problem.sizes, labels)

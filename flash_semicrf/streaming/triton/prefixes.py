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

__all__ = [
    "Inputs",
    "Prefixes",
    "inputs_of",
    "prefix_carry_kernel",
    "prefix_kernel",
    "prefixes_of",
    "rows_from",
]

_CHUNK, _MOST_CHUNKS = 256, 1024
"""Fewest boundaries of a chunk of a sequence, and most chunks."""

_MANY = 256
"""Sequences that keep a GPU busy without chunks."""


class Prefixes(NamedTuple):
    """Output of `prefix_kernel`; rows after a sequence's end are arbitrary."""

    sink: Tensor  # (B, T + 1, C)
    source: Tensor
    deep: Tensor
    born: Tensor  # int32
    common: Tensor  # (B,)


class Ends(NamedTuple):
    """Sums over each of n chunks of the sequences."""

    total: Tensor  # (B, n, C)
    deep: Tensor
    born: Tensor  # int32, the last `born`
    common: Tensor  # (B, n)


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
def prefix_kernel(problem, to, ends, chunk_size, CP):
    """Row t of `sink`, `source`, `deep` and `born` (B, T+1, C), summed from the beginning of its
    chunk, and what is summed up at the chunk's end; program (chunk, b).

    `sink` S_t + end_{t-1}, `source` start_t - S_t, `born` the first start that no forbidden
    position before t cut off. What forbids counts 0 in S. The common parts of the scores are left
    out, and the deep ones summed apart: a segment without any has a difference of exactly 0.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * chunk_size
    T, C = problem.sizes.T, problem.sizes.C
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    total = tl.zeros([CP], tl.float64)
    below = tl.zeros([CP], tl.float64)
    common = tl.zeros([], tl.float64)
    born = tl.zeros([CP], tl.int32)
    for t in range(first, tl.minimum(first + chunk_size, length + 1)):
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
    chunk = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(ends.total + chunk * C + label, total, mask=inside)
    tl.store(ends.deep + chunk * C + label, below, mask=inside)
    tl.store(ends.born + chunk * C + label, born, mask=inside)
    tl.store(ends.common + chunk, common)


@triton.jit
def prefix_carry_kernel(sizes, to, ends, chunk_size, CP, ROWS):
    """Add the sums over the chunks before to the rows of a chunk; program (chunk - 1, b).

    One chunk after the other: a part that a chunk lacks adds exactly nothing.
    """
    b = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) + 1
    T, C = sizes.T, sizes.C
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(sizes.lengths + b).to(tl.int32)
    total = tl.zeros([CP], tl.float64)
    below = tl.zeros([CP], tl.float64)
    born = tl.zeros([CP], tl.int32)
    for i in range(chunk):
        place = (b * (tl.num_programs(0) + 1) + i) * C + label
        total += tl.load(ends.total + place, mask=inside, other=0.0)
        below += tl.load(ends.deep + place, mask=inside, other=0.0)
        born = tl.maximum(born, tl.load(ends.born + place, mask=inside, other=0))
    first = chunk * chunk_size
    stop = tl.minimum(first + chunk_size, length + 1)
    for tile in range(first, stop, ROWS):
        t = tile + tl.arange(0, ROWS)[:, None]
        row = (b * (T + 1) + t) * C + label[None, :]
        mask = inside[None, :] & (t < stop)
        sink = tl.load(to.sink + row, mask=mask, other=0.0) + total[None, :]
        source = tl.load(to.source + row, mask=mask, other=0.0) - total[None, :]
        deep = tl.load(to.deep + row, mask=mask, other=0.0) + below[None, :]
        later = tl.maximum(tl.load(to.born + row, mask=mask, other=0), born[None, :])
        tl.store(to.sink + row, sink, mask=mask)
        tl.store(to.source + row, source, mask=mask)
        tl.store(to.deep + row, deep, mask=mask)
        tl.store(to.born + row, later, mask=mask)


@triton.jit
def rows_from(x, base):
    """Prefixes of the sequence whose rows begin at `base`."""
    return Prefixes(x.sink + base, x.source + base, x.deep + base, x.born + base, x.common)


def prefixes_of(problem: Problem, labels: int) -> Prefixes:
    """Prefixes of a problem whose labels are padded to `labels`."""
    B, T, C = problem.scores.shape
    device = problem.scores.device
    size = T + 1 if B > _MANY else max(_CHUNK, -(-(T + 1) // _MOST_CHUNKS))
    chunks = -(-(T + 1) // size)
    sink, source, deep = torch.empty((3, B, T + 1, C), dtype=torch.float64, device=device)
    born = torch.empty((B, T + 1, C), dtype=torch.int32, device=device)
    total, below = torch.empty((2, B, chunks, C), dtype=torch.float64, device=device)
    last_born = torch.empty((B, chunks, C), dtype=torch.int32, device=device)
    common = torch.empty((B, chunks), dtype=torch.float64, device=device)
    ends = Ends(total, below, last_born, common)
    found = Prefixes(sink, source, deep, born, common)
    launch(prefix_kernel, (chunks, B), problem, found, ends, size, CP=labels, num_warps=1)
    if chunks > 1:
        given = (problem.sizes, found, ends, size)
        options = {"CP": labels, "ROWS": max(1, 512 // labels), "num_warps": 4}
        launch(prefix_carry_kernel, (chunks - 1, B), *given, **options)
    return found._replace(common=common.sum(1))


def inputs_of(p: Potentials) -> Inputs:
    """Contiguous tensors and prefixes of a problem."""
    problem = problem_of(p)
    labels = max(4, power_of_two_above(p.num_labels))
    return Inputs(parameters_of(p), prefixes_of(problem, labels), problem.sizes, labels)

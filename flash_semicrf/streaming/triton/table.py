"""Segments as flat tensors, from the rows into which a walk back from the end writes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.complete_table import CompleteTable
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.jit import is_rehearsal, launch
from flash_semicrf.streaming.triton.records import Sizes

__all__ = ["Walks", "collect_table", "table_kernel", "walks_of"]


class Walks(NamedTuple):
    """Starts and labels of segments, in the ends of the rows, and the number of each row's."""

    starts: Tensor  # (rows, T) int32
    labels: Tensor
    counts: Tensor  # (rows,) int32


def walks_of(rows: int, T: int, device: torch.device) -> Walks:
    """Room for segments."""
    starts, labels = torch.empty((2, rows, T), dtype=torch.int32, device=device)
    return Walks(starts, labels, torch.empty(rows, dtype=torch.int32, device=device))


@triton.jit
def table_kernel(walks, sizes, table_ptr, total, BLOCK):
    """Compact the rows into `table` (4, total) int64: sequence, start, stop, label.

    Program (b,).
    """
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(walks.counts + b)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int64)
    for first in range(0, tl.program_id(0), BLOCK):
        earlier = first + lane
        before += tl.load(walks.counts + earlier, mask=earlier < b, other=0).to(tl.int64)
    to = table_ptr + tl.sum(before, 0)
    row = b * sizes.T + sizes.T - count
    length = tl.load(sizes.lengths + b).to(tl.int32)
    for first in range(0, count, BLOCK):
        i = first + lane
        inside = i < count
        start = tl.load(walks.starts + row + i, mask=inside, other=0)
        label = tl.load(walks.labels + row + i, mask=inside, other=0)
        stop = tl.load(walks.starts + row + i + 1, mask=i + 1 < count, other=0)
        stop = tl.where(i + 1 < count, stop, length)
        tl.store(to + i, tl.zeros([BLOCK], tl.int64) + b, mask=inside)
        tl.store(to + total + i, start.to(tl.int64), mask=inside)
        tl.store(to + 2 * total + i, stop.to(tl.int64), mask=inside)
        tl.store(to + 3 * total + i, label.to(tl.int64), mask=inside)


def collect_table(walks: Walks, sizes: Sizes) -> SegmentTable:
    """Table of all segments, a `CompleteTable` if every row has some.

    Waits for the device: the number of rows decides a shape. It is the one read of decoding.
    """
    counts = [] if is_rehearsal() else walks.counts.tolist()
    total = sum(counts)
    table = torch.empty((4, total), dtype=torch.int64, device=sizes.lengths.device)
    grid = (len(walks.counts),)
    launch(table_kernel, grid, walks, sizes, table, total, BLOCK=128, num_warps=4)
    return CompleteTable(*table) if counts and min(counts) else SegmentTable(*table)

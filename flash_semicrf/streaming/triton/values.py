"""Check of all values of a problem at once, by one launch and one wait for the device.

`flash_semicrf.problem.validation` looks for the entry to name only where this finds one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Sizes

__all__ = ["values_are_allowed", "values_kernel"]

_BLOCK = 1024
_PROGRAMS = 256


@triton.jit
def _refused(x):
    """Whether an entry is NaN, too large, or finite and yet forbids."""
    return (x < 9.9e37) & ((x > -9.9e37) | (x == float("-inf"))) == 0


@triton.jit
def _scan(x_ptr, size, BLOCK):
    """Number of refused entries that this program finds."""
    refused = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0)
        refused += _refused(x).to(tl.int32)
    return tl.sum(refused, 0)


@triton.jit
def _scan_rows(x_ptr, sizes, batch, BLOCK):
    """As `_scan`, of (B, T, C) entries; those after a sequence's end pass."""
    refused = tl.zeros([BLOCK], tl.int32)
    T, C = sizes.T, sizes.C
    blocks = tl.cdiv(T * C, BLOCK)
    for block in range(tl.program_id(0), batch * blocks, tl.num_programs(0)):
        b = block // blocks
        within = tl.load(sizes.lengths + b).to(tl.int32) * C
        i = block % blocks * BLOCK + tl.arange(0, BLOCK)
        row = (tl.full([], 0, tl.int64) + b) * T * C
        x = tl.load(x_ptr + row + i, mask=(i < within) & (i < T * C), other=0.0)
        refused += _refused(x).to(tl.int32)
    return tl.sum(refused, 0)


@triton.jit
def values_kernel(rows, flat, sizes, batch, found_ptr, BLOCK):
    """Write 1 to `found` where anything is refused, which every program that finds some may do.

    `rows` are (B, T, C); `flat` are pairs of a tensor and its number of entries.
    """
    refused = tl.zeros([], tl.int32)
    for n in tl.static_range(len(rows)):
        refused += _scan_rows(rows[n], sizes, batch, BLOCK)
    for n in tl.static_range(len(flat)):
        refused += _scan(flat[n][0], flat[n][1], BLOCK)
    if tl.program_id(0) == 0:
        for first in range(0, batch, BLOCK):
            i = first + tl.arange(0, BLOCK)
            length = tl.load(sizes.lengths + i, mask=i < batch, other=1)
            refused += tl.sum(((length < 1) | (length > sizes.T)).to(tl.int32), 0)
    if refused > 0:
        tl.store(found_ptr, 1)


def values_are_allowed(potentials: Potentials) -> bool:
    """Whether lengths are in [1, T] and entries finite, or -inf; shapes and devices are checked."""
    p = potentials
    shared = (p.transition, p.duration_bias, p.initial_scores, p.final_scores, p.duration_tail)
    by_position = (p.scores, p.start_scores, p.end_scores)
    flat = tuple((x.contiguous(), x.numel()) for x in shared if x is not None)
    rows = tuple(x.contiguous() for x in by_position if x is not None)
    found = torch.zeros(1, dtype=torch.int32, device=p.device)
    programs = min(_PROGRAMS, -(-p.scores.numel() // _BLOCK))
    B, T, C = p.scores.shape
    arguments = (rows, flat, Sizes(p.lengths.contiguous(), T, C, 0), B, found)
    launch(values_kernel, (programs,), *arguments, BLOCK=_BLOCK, num_warps=4)
    return not bool(found)

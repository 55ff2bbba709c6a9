"""Checks of all values of a problem at once, by one launch.

One waits for the device, once: `flash_semicrf.problem.validation` looks for the entry to name only
where it finds one. The other leaves what it finds on the device, a flag for each sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Sizes, form_of

__all__ = ["flags_kernel", "flags_of", "values_are_allowed", "values_kernel"]

_BLOCK = 1024
_PROGRAMS = 256
_PART = 1 << 16
"""Entries of a sequence that one program looks at."""

_WIDE_BLOCK = 4096


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


@triton.jit
def _has_bad(x_ptr, size, BLOCK):
    """1 if an entry is NaN or too large, else 0."""
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0)
        found = found | ((x < 1e38) == 0).to(tl.int32)
    return tl.max(found, 0)


@triton.jit
def flags_kernel(rows, flat, sizes, lengths_ptr, bad_ptr, part, BLOCK):
    """Write whether a part of a sequence is bad, and its length, or 0 where the part is.

    To the kernels a sequence of length 0 has no positions: nothing of it is read. `rows` are
    (B, T, C), of which a program looks at `part` entries; `flat` are pairs of a tensor and its
    number of entries. `bad` is (parts, B). Program (b, part).
    """
    b = tl.program_id(0).to(tl.int64)
    T, C = sizes.T, sizes.C
    length = tl.load(sizes.lengths + b)
    bad = ((length < 1) | (length > T)).to(tl.int32)
    first = tl.program_id(1).to(tl.int64) * part
    within = tl.where(bad == 0, length, 0) * C - first
    within = tl.minimum(within, part).to(tl.int32)
    for n in tl.static_range(len(rows)):
        bad = tl.maximum(bad, _has_bad(rows[n] + b * T * C + first, within, BLOCK))
    if first == 0:
        for n in tl.static_range(len(flat)):
            bad = tl.maximum(bad, _has_bad(flat[n][0], flat[n][1], BLOCK))
        tl.store(lengths_ptr + b, tl.where(bad == 0, length, 0))
    tl.store(bad_ptr + tl.program_id(1) * tl.num_programs(0) + b, bad != 0)


def flags_of(potentials: Potentials) -> tuple[Tensor, Tensor]:
    """Lengths of the sequences, 0 for the bad ones, and which are bad (B,); nothing is read here.

    Bad is a length outside [1, T], and an entry that is NaN or 1e38 or more, within the length or
    in a shared parameter.
    """
    p = potentials
    rows, flat = _entries(p)
    B, T, C = p.scores.shape
    lengths = torch.empty(B, dtype=torch.int64, device=p.device)
    parts = -(-T * C // _PART)
    shape = (B,) if parts == 1 else (parts, B)
    bad = torch.empty(shape, dtype=torch.bool, device=p.device)
    arguments = (rows, flat, Sizes(p.lengths.contiguous(), T, C, 0), lengths, bad, _PART)
    form = None if any(size >> 31 for _, size in flat) else form_of(p)
    launch(flags_kernel, (B, parts), *arguments, form=form, BLOCK=_WIDE_BLOCK, num_warps=8)
    if parts == 1:
        return lengths, bad
    found = bad.any(0)
    return lengths.masked_fill(found, 0), found


def _entries(p: Potentials) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, int], ...]]:
    """Parameters by position, and the shared ones with their sizes, all contiguous."""
    shared = (p.transition, p.duration_bias, p.initial_scores, p.final_scores, p.duration_tail)
    by_position = (p.scores, p.start_scores, p.end_scores)
    flat = tuple((x.contiguous(), x.numel()) for x in shared if x is not None)
    return tuple(x.contiguous() for x in by_position if x is not None), flat


def values_are_allowed(potentials: Potentials) -> bool:
    """Whether lengths are in [1, T] and entries finite, or -inf; shapes and devices are checked."""
    p = potentials
    rows, flat = _entries(p)
    found = torch.zeros(1, dtype=torch.int32, device=p.device)
    programs = min(_PROGRAMS, -(-p.scores.numel() // _BLOCK))
    B, T, C = p.scores.shape
    arguments = (rows, flat, Sizes(p.lengths.contiguous(), T, C, 0), B, found)
    launch(values_kernel, (programs,), *arguments, BLOCK=_BLOCK, num_warps=4)
    return not bool(found)

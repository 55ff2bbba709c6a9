"""Whether all values of a problem are allowed, by one launch and one wait for the device.

`flash_semicrf.problem.validation` asks this first; where the answer is no it looks for the entry to
name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import kernel, launch

__all__ = ["values_are_allowed", "values_kernel"]

_BLOCK = 1024
_PROGRAMS = 256


@triton.jit
def _refused(x):
    """Whether an entry is NaN, too large, or finite and yet forbids."""
    return (x < 9.9e37) & ((x > -9.9e37) | (x == float("-inf"))) == 0


@triton.jit
def _scan(x_ptr, size, BLOCK: tl.constexpr):
    """Number of refused entries that this program finds."""
    refused = tl.zeros([BLOCK], tl.int32)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0)
        refused += _refused(x).to(tl.int32)
    return tl.sum(refused, 0)


@triton.jit
def _scan_rows(x_ptr, lengths_ptr, B, T, C, BLOCK: tl.constexpr):
    """As `_scan`, of (B, T, C) entries; those after a sequence's end pass."""
    refused = tl.zeros([BLOCK], tl.int32)
    blocks = tl.cdiv(T * C, BLOCK)
    for block in range(tl.program_id(0), B * blocks, tl.num_programs(0)):
        b = block // blocks
        within = tl.load(lengths_ptr + b).to(tl.int32) * C
        i = block % blocks * BLOCK + tl.arange(0, BLOCK)
        row = (tl.full([], 0, tl.int64) + b) * T * C
        x = tl.load(x_ptr + row + i, mask=(i < within) & (i < T * C), other=0.0)
        refused += _refused(x).to(tl.int32)
    return tl.sum(refused, 0)


@kernel
def values_kernel(
    scores_ptr, start_ptr, end_ptr, transition_ptr, bias_ptr, initial_ptr, final_ptr, tail_ptr,
    lengths_ptr, found_ptr, B, T, C, transition_size, bias_size, initial_size,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write 1 to `found` where anything is refused, which every program that finds some may do."""
    refused = _scan_rows(scores_ptr, lengths_ptr, B, T, C, BLOCK)
    if HAS_START:
        refused += _scan_rows(start_ptr, lengths_ptr, B, T, C, BLOCK)
    if HAS_END:
        refused += _scan_rows(end_ptr, lengths_ptr, B, T, C, BLOCK)
    refused += _scan(transition_ptr, transition_size, BLOCK)
    refused += _scan(bias_ptr, bias_size, BLOCK)
    if HAS_INITIAL:
        refused += _scan(initial_ptr, initial_size, BLOCK)
    if HAS_FINAL:
        refused += _scan(final_ptr, C, BLOCK)
    if HAS_TAIL:
        refused += _scan(tail_ptr, C, BLOCK)
    if tl.program_id(0) == 0:
        for first in range(0, B, BLOCK):
            i = first + tl.arange(0, BLOCK)
            length = tl.load(lengths_ptr + i, mask=i < B, other=1)
            refused += tl.sum(((length < 1) | (length > T)).to(tl.int32), 0)
    if refused > 0:
        tl.store(found_ptr, 1)


def values_are_allowed(potentials: Potentials) -> bool:
    """Whether lengths are in [1, T] and entries finite, or -inf; shapes and devices are checked."""
    p = potentials
    given = (p.start_scores, p.end_scores, p.initial_scores, p.final_scores, p.duration_tail)
    has_start, has_end, has_initial, has_final, has_tail = (x is not None for x in given)
    start, end, initial, final, tail = (p.scores if x is None else x.contiguous() for x in given)
    found = torch.zeros(1, dtype=torch.int32, device=p.device)
    transition, bias = p.transition.contiguous(), p.duration_bias.contiguous()
    programs = min(_PROGRAMS, -(-p.scores.numel() // _BLOCK))
    launch(
        values_kernel, (programs,),
        p.scores.contiguous(), start, end, transition, bias, initial, final, tail,
        p.lengths.contiguous(), found, *p.scores.shape, transition.numel(), bias.numel(),
        initial.numel() if has_initial else 0,
        HAS_START=has_start, HAS_END=has_end, HAS_INITIAL=has_initial, HAS_FINAL=has_final,
        HAS_TAIL=has_tail, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return not bool(found)

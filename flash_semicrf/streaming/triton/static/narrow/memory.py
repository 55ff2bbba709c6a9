"""Memory that each program of the narrow pass works in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.static.plan import Plan

__all__ = [
    "NarrowMemory",
    "NarrowState",
    "NarrowWork",
    "load_narrow",
    "narrow_work_at",
    "save_narrow",
]

_STATE = 10
"""Rows of the state between two launches."""


class NarrowState(NamedTuple):
    """State of a pass between two blocks; tensors (CP,)."""

    mantissa: tl.tensor  # float32, source of the next step without its opening score
    exponent: tl.tensor  # int32, this and what follows
    whole: tl.tensor  # of the content up to the next step
    fraction: tl.tensor
    newest: tl.tensor  # step of the newest live source
    born: tl.tensor  # first step whose source no forbidden position cut off
    rounded: tl.tensor  # last step at which something may have been rounded to zero
    good: tl.tensor  # whether nothing is uncertain so far
    last_mantissa: tl.tensor  # float32, the message at the end of the sequence
    last_exponent: tl.tensor


class NarrowWork(NamedTuple):
    """Beginnings of the parts of a program's workspace."""

    sources: Tensor  # float32 (ring, R, CP): a block's sources, less their contents
    older: Tensor  # float32 (blocks of a part, R, CP), by `narrow_far_kernel`
    exponents: Tensor  # int32 (ring, CP), of a block's sources
    older_exponents: Tensor  # int32 (blocks of a part, 2, CP), with what may have been rounded
    state: Tensor  # int32 (10, CP)


class NarrowMemory(NamedTuple):
    """Workspaces of all programs."""

    floats: Tensor  # float32
    integers: Tensor  # int32
    floats_each: int  # elements of a program
    integers_each: int
    blocks: int  # of a part, or 0

    @classmethod
    def of(cls, programs: int, plan: Plan, device: torch.device) -> NarrowMemory:
        """Memory for a number of programs."""
        blocks = plan.blocks_of_part if plan.in_parts else 0
        floats = (plan.ring + blocks) * plan.rows * plan.labels
        integers = (plan.ring + 2 * blocks + _STATE) * plan.labels
        sizes = ((floats, torch.float32), (integers, torch.int32))
        buffers = (torch.empty(programs * n, dtype=dtype, device=device) for n, dtype in sizes)
        return cls(*buffers, floats, integers, blocks)


@triton.jit
def narrow_work_at(memory, program, ring, CP, R):
    """Parts of the workspace of a program, an int64."""
    sources = memory.floats + program * memory.floats_each
    exponents = memory.integers + program * memory.integers_each
    older = sources + ring * R * CP
    older_exponents = exponents + ring * CP
    state = older_exponents + memory.blocks * 2 * CP
    return NarrowWork(sources, older, exponents, older_exponents, state)


@triton.jit
def save_narrow(state_ptr, state, CP):
    """Write the state of a pass."""
    row = state_ptr + tl.arange(0, CP)
    tl.store(row, state.mantissa.to(tl.int32, bitcast=True))
    tl.store(row + CP, state.exponent)
    tl.store(row + 2 * CP, state.whole)
    tl.store(row + 3 * CP, state.fraction)
    tl.store(row + 4 * CP, state.newest)
    tl.store(row + 5 * CP, state.born)
    tl.store(row + 6 * CP, state.rounded)
    tl.store(row + 7 * CP, state.good.to(tl.int32))
    tl.store(row + 8 * CP, state.last_mantissa.to(tl.int32, bitcast=True))
    tl.store(row + 9 * CP, state.last_exponent)


@triton.jit
def load_narrow(state_ptr, CP):
    """Read what `save_narrow` wrote."""
    row = state_ptr + tl.arange(0, CP)
    return NarrowState(
        tl.load(row).to(tl.float32, bitcast=True),
        tl.load(row + CP),
        tl.load(row + 2 * CP),
        tl.load(row + 3 * CP),
        tl.load(row + 4 * CP),
        tl.load(row + 5 * CP),
        tl.load(row + 6 * CP),
        tl.load(row + 7 * CP) != 0,
        tl.load(row + 8 * CP).to(tl.float32, bitcast=True),
        tl.load(row + 9 * CP),
    )

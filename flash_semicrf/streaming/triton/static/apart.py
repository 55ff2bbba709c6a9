"""Sequences that gradients without float64 do not hold, found before the messages are overwritten.

Fixed point holds logarithms up to 2^24. Those of most problems are far smaller, as they do not
include what is common to all labels. A sequence with larger messages, running scores, log Z or
boundary scores, or with deep scores, is done by the kernels in float64, which run on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.numerics import allowed
from flash_semicrf.streaming.triton.records import Problem
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import SPAN

__all__ = ["apart_kernel", "find_apart", "is_apart"]

_SHARES = 8
_FLAGS = tl.constexpr(_SHARES)
"""Flags of a sequence: programs that look at a share of it each."""

_LARGEST = tl.constexpr((1023 + 24) << 20)  # high word of 2^24


@triton.jit
def is_apart(apart_ptr, b):
    """Whether a sequence is one of those."""
    return tl.max(tl.load(apart_ptr + b * _FLAGS + tl.arange(0, _FLAGS)), 0) != 0


@triton.jit
def _is_large(x):
    """Whether a float64 is 2^24 or more in size, or NaN."""
    high = (x.to(tl.int64, bitcast=True) >> 32).to(tl.int32)
    return (high & 0x7FFFFFFF) >= _LARGEST


@triton.jit
def _largest(found, row_ptr, begin, stop, TILE):
    """`found`, or whether a score of the elements [begin, stop) is large and does not forbid."""
    for first in range(begin, stop, TILE):
        i = first + tl.arange(0, TILE)
        x = tl.load(row_ptr + i, mask=i < stop, other=0.0).to(tl.float32)
        found = found | (allowed(x) & (tl.abs(x) > 16777216.0))
    return found


@labels_last
@triton.jit
def apart_kernel(problem, messages, apart_ptr, TILE, SPAN):
    """Fill flags (B, shares); program (share, b)."""
    share = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    T, C = problem.sizes.T, problem.sizes.C
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length, SPAN), tl.num_programs(0)) * SPAN
    begin = tl.minimum(share * size, length)
    stop = tl.minimum(begin + size, length)
    found = tl.zeros([TILE], tl.int1)
    for first in range(begin, stop, TILE):
        t = first + tl.arange(0, TILE)
        for direction in tl.static_range(2):
            row = messages.offset + (direction * tl.num_programs(1) + b) * T
            found = found | _is_large(tl.load(row + t, mask=t < stop, other=0.0))
    # The row at the end of the sequence is that of the last share.
    blocks = T // SPAN + 2
    last = tl.where(stop == length, tl.cdiv(length, SPAN) + 1, stop // SPAN)
    for first in range(begin // SPAN * C, last * C, TILE):
        i = first + tl.arange(0, TILE)
        row = messages.prefix + b * blocks * C
        found = found | _is_large(tl.load(row + i, mask=i < last * C, other=0.0))
    if problem.start is not None:
        found = _largest(found, problem.start + b * T * C, begin * C, stop * C, TILE)
        found = _largest(found, problem.end + b * T * C, begin * C, stop * C, TILE)
    log_z = tl.load(messages.log_z + b)
    apart = _is_large(log_z) | (tl.load(messages.has_deep + b) != 0)
    apart = (apart | (tl.max(found.to(tl.int32), 0) != 0)) & (log_z != float("-inf"))
    tl.store(apart_ptr + b * tl.num_programs(0) + share, apart.to(tl.int32))


def find_apart(problem: Problem, messages: Messages, form: tuple) -> Tensor:
    """Flags as `is_apart` reads them; sequences of no feasible segmentation are not apart.

    `form` as for `launch`.
    """
    B = len(problem.scores)
    flags = torch.empty((B, _SHARES), dtype=torch.int32, device=problem.scores.device)
    options = {"form": form, "TILE": 512, "SPAN": SPAN, "num_warps": 4}
    launch(apart_kernel, (_SHARES, B), problem, messages, flags, **options)
    return flags

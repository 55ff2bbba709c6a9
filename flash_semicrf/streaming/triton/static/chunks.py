"""What chunks of boundaries leave to be added up: marginals from their starts on, parts of sums.

One launch does all of it for up to `FEW` chunks. Of more, the totals before each chunk come from a
launch of their own, and parts are summed by PyTorch, which has more programs for a long sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Sizes
from flash_semicrf.streaming.triton.static.plan import SPAN

__all__ = ["FEW", "carry_kernel", "finish", "finish_kernel"]

FEW = 64

_ROWS, _COLUMNS = 16, 64
"""Chunks and entries of a tile of a sum over chunks."""


@triton.jit
def carry_kernel(carry_ptr, sizes, chunks, CP, ROWS):
    """Replace `carry` (B, chunks, C) by its sums over the chunks before; program (b,)."""
    b = tl.program_id(0).to(tl.int64)
    C = sizes.C
    label = tl.arange(0, CP)[None, :]
    running = tl.zeros([CP], tl.float64)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < chunks) & (label < C)
        place = carry_ptr + (b * chunks + row) * C + label
        value = tl.load(place, mask=inside, other=0.0)
        total = tl.cumsum(value, 0)
        tl.store(place, total - value + running[None, :], mask=inside)
        running += tl.sum(value, 0)


@triton.jit
def _sum_up(parts_ptr, to_ptr, b, block, chunks, entries, ROWS, COLUMNS):
    """Sum (B, chunks, entries) over the chunks, for a block of entries."""
    i = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        place = parts_ptr + (b * chunks + row) * entries + i[None, :]
        total += tl.sum(tl.load(place, mask=(row < chunks) & (i < entries)[None, :], other=0.0), 0)
    tl.store(to_ptr + b * entries + i, total, mask=i < entries)


@triton.jit
def finish_kernel(
    position_ptr, carry_ptr, pairs_ptr, to_ptr, sizes, chunks, span, SUMMED, CP, TT, ROWS, COLUMNS
):
    """Add to marginals what was open at the start of their chunk of `span` positions.

    `carry` (B, chunks, C) are the totals of the chunks, or with SUMMED of those before each. If
    given, `pairs` (B, chunks, C, C) are summed over the chunks, (B, C, C). Program (i, b): a tile
    of TT positions, and after those a block of COLUMNS entries of the sum.
    """
    b = tl.program_id(1).to(tl.int64)
    T, C = sizes.T, sizes.C
    block = tl.program_id(0)
    tiles = tl.cdiv(T, TT)
    if block < tiles:
        t = block * TT + tl.arange(0, TT)[:, None]
        label = tl.arange(0, CP)[None, :]
        length = tl.load(sizes.lengths + b).to(tl.int32)
        inside = (t < length) & (label < C)
        chunk = block * TT // span
        carried = tl.zeros([CP], tl.float64)[None, :]
        if SUMMED:
            place = carry_ptr + (b * chunks + chunk) * C + label
            carried = tl.load(place, mask=label < C, other=0.0)
        else:
            for first in range(0, chunk, ROWS):
                row = first + tl.arange(0, ROWS)[:, None]
                place = carry_ptr + (b * chunks + row) * C + label
                value = tl.load(place, mask=(row < chunk) & (label < C), other=0.0)
                carried += tl.sum(value, 0)[None, :]
        place = position_ptr + (b * T + t) * C + label
        value = tl.load(place, mask=inside, other=0.0).to(tl.float64) + carried
        tl.store(place, tl.minimum(tl.maximum(value, 0.0), 1.0), mask=inside)
    elif pairs_ptr is not None:
        _sum_up(pairs_ptr, to_ptr, b, block - tiles, chunks, C * C, ROWS, COLUMNS)


def finish(
    position: Tensor, carry: Tensor, pairs: Tensor | None, sizes: Sizes, span: int, labels: int
) -> Tensor | None:
    """Finish marginals (B, T, C), in place, and sum what pairs of labels have.

    Parameters
    ----------
    position : Tensor of shape (B, T, C)
        From the start of each of several chunks of `span` positions on.
    carry : float64 Tensor of shape (B, chunks, C)
        Totals of the chunks; overwritten.
    pairs : float64 Tensor of shape (B, chunks, C, C), optional
    sizes : Sizes
    span : int
        A multiple of `SPAN`.
    labels : int
        C padded to a power of two.

    Returns
    -------
    float64 Tensor of shape (B, C, C), or None
    """
    B, chunks, C = carry.shape
    programs = -(-sizes.T // SPAN)
    many = chunks > FEW
    if many:
        options = {"form": (), "CP": labels, "ROWS": 64, "num_warps": 4}
        launch(carry_kernel, (B,), carry, sizes, chunks, **options)
    found, parts = None, pairs
    if pairs is not None and many:
        found, parts = pairs.sum(1), None
    elif pairs is not None:
        found = carry.new_empty((B, C, C))
        programs += -(-C * C // _COLUMNS)
    arguments = (position, carry, parts, None if parts is None else found, sizes, chunks, span)
    options = {"SUMMED": many, "CP": labels, "TT": SPAN, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    options |= {"form": (position.dtype, parts is None), "num_warps": 4}
    launch(finish_kernel, (programs, B), *arguments, **options)
    return found

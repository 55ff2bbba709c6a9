"""What chunks of boundaries leave to be added up: marginals from their starts on, parts of sums.

One launch does all of it for up to `FEW` chunks. Of more, the totals before each chunk come from a
launch of their own, and parts are summed by PyTorch, which has more programs for a long sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Sizes
from flash_semicrf.streaming.triton.static.apart import is_apart
from flash_semicrf.streaming.triton.static.plan import SPAN

__all__ = ["FEW", "Closing", "carry_kernel", "closing_kernel", "finish", "finish_kernel"]

FEW = 64

_ROWS, _COLUMNS = 16, 64
"""Chunks and entries of a tile of a sum over chunks."""


class Closing(NamedTuple):
    """What float32 marginals are closed with."""

    started: Tensor  # float64 (B, chunks, C): totals of the starts
    apart: Tensor  # flags, as `is_apart` reads them


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
def closing_kernel(carry_ptr, started_ptr, apart_ptr, sizes, chunks, CP, ROWS):
    """As `carry_kernel`, of sums that rounding has kept from closing; program (b,).

    As many segments of a label end as start. What is left of the sum over all chunks is therefore
    an error, of starts and ends that are wrong by the same factors everywhere, such as those of
    rounded transitions; it is taken out in proportion to the starts.
    """
    b = tl.program_id(0).to(tl.int64)
    C = sizes.C
    label = tl.arange(0, CP)[None, :]
    excess = tl.zeros([CP], tl.float64)
    starts = tl.zeros([CP], tl.float64)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < chunks) & (label < C)
        place = (b * chunks + row) * C + label
        excess += tl.sum(tl.load(carry_ptr + place, mask=inside, other=0.0), 0)
        starts += tl.sum(tl.load(started_ptr + place, mask=inside, other=0.0), 0)
    mine = is_apart(apart_ptr, b) == 0  # the others need none, and have no `started`
    share = tl.where(mine & (starts > 0), excess / tl.where(starts > 0, starts, 1.0), 0.0)
    running = tl.zeros([CP], tl.float64)
    for first in range(0, chunks, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < chunks) & (label < C)
        place = (b * chunks + row) * C + label
        value = tl.load(carry_ptr + place, mask=inside, other=0.0)
        started = tl.load(started_ptr + place, mask=inside & mine, other=0.0)
        value -= started * share[None, :]
        total = tl.cumsum(value, 0)
        tl.store(carry_ptr + place, total - value + running[None, :], mask=inside)
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
    position: Tensor,
    carry: Tensor,
    pairs: Tensor | None,
    sizes: Sizes,
    span: int,
    labels: int,
    closing: Closing | None = None,
) -> Tensor | None:
    """Finish marginals (B, T, C), in place, and sum what pairs of labels have.

    Parameters
    ----------
    position : Tensor of shape (B, T, C)
        From the start of each of several chunks of `span` positions on.
    carry : float64 Tensor of shape (B, chunks, C)
        Totals of the chunks; overwritten.
    pairs : Tensor of shape (B, chunks, C, C), optional
        float32 or float64; the sum is float64.
    sizes : Sizes
    span : int
        A multiple of `SPAN`.
    labels : int
        C padded to a power of two.
    closing : Closing, optional
        Of marginals in float32.

    Returns
    -------
    float64 Tensor of shape (B, C, C), or None
    """
    B, chunks, C = carry.shape
    programs = -(-sizes.T // SPAN)
    many = chunks > FEW
    options = {"form": (), "CP": labels, "ROWS": 64, "num_warps": 4}
    if closing is not None:
        launch(closing_kernel, (B,), carry, *closing, sizes, chunks, **options)
    elif many:
        launch(carry_kernel, (B,), carry, sizes, chunks, **options)
    found, parts = None, pairs
    if pairs is not None and many:
        found, parts = pairs.sum(1, dtype=torch.float64), None
    elif pairs is not None:
        found = carry.new_empty((B, C, C))
        programs += -(-C * C // _COLUMNS)
    arguments = (position, carry, parts, None if parts is None else found, sizes, chunks, span)
    summed = many or closing is not None
    options = {"SUMMED": summed, "CP": labels, "TT": SPAN, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    kind = None if parts is None else parts.dtype
    options |= {"form": (position.dtype, kind), "num_warps": 4}
    launch(finish_kernel, (programs, B), *arguments, **options)
    return found

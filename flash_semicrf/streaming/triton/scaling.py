"""Gradients of a weighted sum of log Z over sequences, from those of each: one launch for all.

In plain PyTorch this is six operations for each parameter, and as many launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import BY_POSITION, NAMES
from flash_semicrf.streaming.triton.jit import launch

__all__ = ["Weights", "scale_kernel", "scaled"]

_BLOCK = 1024
_ROWS, _COLUMNS = 16, 64
"""Sequences and entries of a tile of a sum over sequences."""


class Weights(NamedTuple):
    """Weights of the sequences."""

    weight: Tensor  # (B,), `stride` elements apart
    stride: int
    bad: Tensor | None  # (B,) bool
    batch: int


@triton.jit
def _weights(given, b, inside):
    """Weights of sequences, NaN where one that is not 0 meets a bad sequence."""
    weight = tl.load(given.weight + b * given.stride, mask=inside, other=0.0)
    if given.bad is not None:
        bad = tl.load(given.bad + b, mask=inside, other=0) != 0
        weight = tl.where(bad & (weight != 0), float("nan"), weight)
    return weight


@triton.jit
def _times(gradient, weight):
    """Product in the dtype of the gradient; 0 where the weight is."""
    weight = weight.to(gradient.dtype)
    return tl.where(weight == 0, 0.0, gradient * weight)


@triton.jit
def _weigh(rows, given, b, part, size, BLOCK):
    """Weigh BLOCK entries of a sequence."""
    i = part * BLOCK + tl.arange(0, BLOCK)
    weight = _weights(given, b, True)
    for n in tl.static_range(len(rows)):
        x = tl.load(rows[n][0] + b * size + i, mask=i < size, other=0.0)
        tl.store(rows[n][1] + b * size + i, _times(x, weight), mask=i < size)


@triton.jit
def _sum_up(gradient_ptr, to_ptr, entries, given, block, ROWS, COLUMNS):
    """Sum COLUMNS entries over the sequences."""
    i = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, given.batch, ROWS):
        b = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = b < given.batch
        place = gradient_ptr + b * entries + i[None, :]
        x = tl.load(place, mask=inside & (i < entries)[None, :], other=0.0)
        total += tl.sum(_times(x, _weights(given, b, inside)).to(tl.float64), 0)
    tl.store(to_ptr + i, total, mask=i < entries)


@triton.jit
def scale_kernel(rows, shared, given, size, parts, BLOCK, ROWS, COLUMNS):
    """Weigh gradients by position, and sum those of shared parameters over the sequences.

    `rows` are pairs of a gradient of `size` entries for each sequence and of where to write it,
    `shared` the same with their number of entries. The first B * `parts` programs have BLOCK
    entries of a sequence each, the others COLUMNS entries of a sum, in order of `shared`. Products
    are in the dtype of the gradient, sums in float64, in a fixed order.
    """
    program = tl.program_id(0)
    block = program - given.batch * parts
    if block < 0:
        _weigh(rows, given, (program // parts).to(tl.int64), program % parts, size, BLOCK)
    else:
        for n in tl.static_range(len(shared)):
            entries = shared[n][2]
            if (block >= 0) & (block * COLUMNS < entries):
                _sum_up(shared[n][0], shared[n][1], entries, given, block, ROWS, COLUMNS)
            block -= tl.cdiv(entries, COLUMNS)


def scaled(
    gradients: dict[str, Tensor],
    weight: Tensor,
    bad: Tensor | None,
    dtypes: dict[str, torch.dtype],
) -> dict[str, Tensor]:
    """Gradients by parameters of the sum of weight times log Z.

    Parameters
    ----------
    gradients : dict of Tensor
        As of `flash_semicrf.streaming.dispatch.Backend.gradients`.
    weight : floating Tensor of shape (B,)
        A weight of 0 excludes its sequence, even if the gradient is NaN.
    bad : bool Tensor of shape (B,), optional
        Sequences whose gradient is NaN.
    dtypes : dict of torch.dtype
        Of the results, with the names of the gradients.

    Returns
    -------
    dict of Tensor
        Of the shapes of the parameters.
    """
    found, rows, shared = {}, [], []
    size = programs = 0
    for name in [name for name in NAMES if name in gradients]:
        gradient = gradients[name].contiguous()
        shape = gradient.shape if name in BY_POSITION else gradient.shape[1:]
        to = torch.empty(shape, dtype=dtypes[name], device=gradient.device)
        found[name] = to
        if name in BY_POSITION:
            rows.append((gradient, to))
            size = shape[1] * shape[2]
        else:
            entries = to.numel()
            shared.append((gradient, to, entries))
            programs += -(-entries // _COLUMNS)
    batch, parts = len(weight), -(-size // _BLOCK)
    given = Weights(weight, weight.stride(0), bad, batch)
    kinds = [(gradients[name].dtype, x.dtype, name in BY_POSITION) for name, x in found.items()]
    large = max([size, *[entries for _, _, entries in shared]]) >> 31
    form = None if large else (*kinds, weight.dtype, bad is None)
    options = {"BLOCK": _BLOCK, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 4}
    options["form"] = form
    grid = (batch * parts + programs,)
    launch(scale_kernel, grid, tuple(rows), tuple(shared), given, size, parts, **options)
    return found

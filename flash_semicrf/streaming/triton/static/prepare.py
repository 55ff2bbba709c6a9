"""Tables of the parameters that all sequences share, prepared by one launch.

Exponentials are taken once: W_k(c) = exp(D_k(c)) and exp(A). One that is too large, or an exp(A)
too small, for the linear blocks of the passes is stored as NaN, which sends every block that meets
it to the log domain. For the sums D, here and in all kernels that read these tables, is what is
left of the duration scores without the slopes, which the passes add to the scores of the positions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.log_rows import load_row
from flash_semicrf.streaming.triton.numerics import finite, wide
from flash_semicrf.streaming.triton.static.slopes import find_slopes

__all__ = ["Tables", "prepare_kernel"]

_LARGE = tl.constexpr(138.0)  # e^138 = 1e60
_SMALL = tl.constexpr(-230.0)  # e^-230 = 1e-100


class Tables(NamedTuple):
    """Output of `prepare_kernel`, all float64 and padded to CP labels."""

    window: Tensor  # (rows, CP): exp(D_k) at row k; 0 outside 1..K, but a tail continues after K
    log_window: Tensor  # (rows, CP): D_k; -inf outside
    matrix: Tensor  # (2, CP src, CP dst): exp(A) forwards; transposed, for the backward pass
    log_matrix: Tensor  # (2, CP src, CP dst): A
    first: (
        Tensor  # (4, CP): the term of source 0 of each direction; the slopes; what messages grow by
    )
    tail: Tensor | None = None
    """(3, CP): the tail, -inf where no segment is longer than K; the score at a block's first
    output of a segment from the first step that the block's window keeps; exp of the tail."""


@triton.jit
def _first_term(a_src_dst, initial_ptr, label, C):
    """Initial scores, or the log-sum-exp of A over source labels; a_src_dst is [dst, src]."""
    if initial_ptr is not None:
        first = load_row(initial_ptr, label, C)
    else:
        first = tl.max(a_src_dst, 1)
        safe = finite(first)
        first = safe + tl.log(tl.sum(tl.exp(a_src_dst - safe[:, None]), 1))
    return first


@triton.jit
def _prepare_tail(given, slope, to_ptr, label, C, K, rows, block, CP):
    """Fill the table of the tail; `block` is the number of steps of a block."""
    tail = load_row(given.tail, label, C)
    last = load_row(given.bias + (K - 1) * C, label, C)
    tail = tl.where(last > float("-inf"), tail - slope, float("-inf"))
    last -= K * slope
    lives = tail > float("-inf")
    tl.store(to_ptr + label, tail)
    rate = tl.where(lives, tail, 0.0)
    first = tl.where(lives, last + rate * (rows - block - K), float("-inf"))
    tl.store(to_ptr + CP + label, first)
    growth = tl.where(rate * block > _LARGE, float("nan"), tl.exp(rate))
    tl.store(to_ptr + 2 * CP + label, growth)


@triton.jit
def prepare_kernel(given, to, sizes, rows, block, MAX, CP, ROWS, TILE):
    """Fill the tables; with MAX none of the exponentials, and slopes of 0.

    Program 0 writes the matrices and the end terms, the others ROWS rows of the windows each. All
    look for the slopes, by TILE durations at a time.
    """
    program = tl.program_id(0)
    C, K = sizes.C, sizes.K
    label = tl.arange(0, CP)
    slope, growth = tl.zeros([CP], tl.float64), tl.zeros([], tl.float64)
    if not MAX:
        slope, growth = find_slopes(given.bias, label, C, K, CP, TILE)
    if program == 0:
        source = label[None, :]
        target = label[:, None]
        inside = (source < C) & (target < C)
        for direction in tl.static_range(2):
            place = source * C + target if direction == 0 else target * C + source
            a = wide(tl.load(given.transition + place, mask=inside, other=float("-inf")))
            cell = direction * CP * CP + source * CP + target
            tl.store(to.log_matrix + cell, a)
            if not MAX:
                extreme = (a > _LARGE) | ((a < _SMALL) & (a > float("-inf")))
                tl.store(to.matrix + cell, tl.where(extreme, float("nan"), tl.exp(a)))
            if direction == 0:
                tl.store(to.first + label, _first_term(a, given.initial, label, C))
        last = tl.where(label < C, 0.0, float("-inf")).to(tl.float64)
        if given.final is not None:
            last = load_row(given.final, label, C)
        tl.store(to.first + CP + label, last)
        tl.store(to.first + 2 * CP + label, slope)
        tl.store(to.first + 3 * CP + label, tl.zeros([CP], tl.float64) + growth)
        if given.tail is not None:
            _prepare_tail(given, slope, to.tail, label, C, K, rows, block, CP)
    else:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)[:, None]
        listed = (row >= 1) & (row <= K) & (label[None, :] < C)
        bias = tl.load(
            given.bias + (row - 1) * C + label[None, :], mask=listed, other=float("-inf")
        )
        bias = wide(bias)
        if given.tail is not None:
            beyond = (row > K) & (label[None, :] < C)
            longest = tl.load(given.bias + (K - 1) * C + label[None, :], mask=beyond, other=0.0)
            tail = tl.load(given.tail + label[None, :], mask=beyond, other=float("-inf"))
            bias = tl.where(beyond, wide(longest) + (row - K) * wide(tail), bias)
        bias -= slope[None, :] * row
        cells = row * CP + label[None, :]
        tl.store(to.log_window + cells, bias, mask=row < rows)
        if not MAX:
            weight = tl.where(bias > _LARGE, float("nan"), tl.exp(bias))
            tl.store(to.window + cells, weight, mask=row < rows)

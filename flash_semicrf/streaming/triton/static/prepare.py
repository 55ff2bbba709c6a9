"""What the passes need of the parameters, prepared by one launch for all sequences.

Exponentials are taken once: W_k(c) = exp(D_k(c)) and exp(A). One that is too large, or an exp(A)
too small, for the linear blocks of the passes is stored as NaN, which sends every block that meets
it to the log domain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.numerics import wide

__all__ = ["prepare_kernel"]

_LARGE = tl.constexpr(138.0)  # e^138 = 1e60
_SMALL = tl.constexpr(-230.0)  # e^-230 = 1e-100


@triton.jit
def _first_term(a_src_dst, initial_ptr, label, C, HAS_INITIAL: tl.constexpr):
    """Initial scores, or the log-sum-exp of A over source labels; a_src_dst is [dst, src]."""
    if HAS_INITIAL:
        first = wide(tl.load(initial_ptr + label, mask=label < C, other=float("-inf")))
    else:
        first = tl.max(a_src_dst, 1)
        safe = tl.where(first > float("-inf"), first, 0.0)
        first = safe + tl.log(tl.sum(tl.exp(a_src_dst - safe[:, None]), 1))
    return first


@triton.jit
def _prepare_tail(tail_ptr, bias_ptr, to_ptr, label, C, K, rows, block, CP: tl.constexpr):
    """Fill the table of the tail; `block` is the number of steps of a block."""
    inside = label < C
    tail = wide(tl.load(tail_ptr + label, mask=inside, other=float("-inf")))
    last = wide(tl.load(bias_ptr + (K - 1) * C + label, mask=inside, other=float("-inf")))
    tail = tl.where(last > float("-inf"), tail, float("-inf"))
    lives = tail > float("-inf")
    tl.store(to_ptr + label, tail)
    rate = tl.where(lives, tail, 0.0)
    first = tl.where(lives, last + rate * (rows - block - K), float("-inf"))
    tl.store(to_ptr + CP + label, first)
    growth = tl.where(rate * block > _LARGE, float("nan"), tl.exp(rate))
    tl.store(to_ptr + 2 * CP + label, growth)


@kernel
def prepare_kernel(
    transition_ptr, bias_ptr, initial_ptr, final_ptr, tail_scores_ptr,
    window_ptr, log_window_ptr, matrix_ptr, log_matrix_ptr, first_ptr, tail_ptr,
    C, K, rows, block,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_TAIL: tl.constexpr, MAX: tl.constexpr,
    CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fill the tables, all float64 and padded to CP labels.

    Program 0 writes the matrices and the end terms, the others ROWS rows of the windows each.
    `window`, `log_window` (rows, CP): exp(D_k) and D_k at row k; zeros, -inf outside 1..K, but with
    a tail the rows after K continue.
    `matrix`, `log_matrix` (2, CP src, CP dst): A forwards; transposed, for the backward pass.
    `first` (2, CP): the term of source 0 of each direction.
    `tail` (3, CP): the tail, -inf where no segment is longer than K; the score at a block's first
    output of a segment from the first step that the block's window keeps; exp of the tail.
    """
    program = tl.program_id(0)
    label = tl.arange(0, CP)
    if program == 0:
        source = label[None, :]
        target = label[:, None]
        inside = (source < C) & (target < C)
        for direction in tl.static_range(2):
            place = source * C + target if direction == 0 else target * C + source
            a = wide(tl.load(transition_ptr + place, mask=inside, other=float("-inf")))
            to = direction * CP * CP + source * CP + target
            tl.store(log_matrix_ptr + to, a)
            if not MAX:
                extreme = (a > _LARGE) | ((a < _SMALL) & (a > float("-inf")))
                tl.store(matrix_ptr + to, tl.where(extreme, float("nan"), tl.exp(a)))
            if direction == 0:
                first = _first_term(a, initial_ptr, label, C, HAS_INITIAL)
                tl.store(first_ptr + label, first)
        last = tl.where(label < C, 0.0, float("-inf")).to(tl.float64)
        if HAS_FINAL:
            last = wide(tl.load(final_ptr + label, mask=label < C, other=float("-inf")))
        tl.store(first_ptr + CP + label, last)
        if HAS_TAIL:
            _prepare_tail(tail_scores_ptr, bias_ptr, tail_ptr, label, C, K, rows, block, CP)
    else:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)[:, None]
        listed = (row >= 1) & (row <= K) & (label[None, :] < C)
        bias = tl.load(bias_ptr + (row - 1) * C + label[None, :], mask=listed, other=float("-inf"))
        bias = wide(bias)
        if HAS_TAIL:
            beyond = (row > K) & (label[None, :] < C)
            longest = tl.load(bias_ptr + (K - 1) * C + label[None, :], mask=beyond, other=0.0)
            tail = tl.load(tail_scores_ptr + label[None, :], mask=beyond, other=float("-inf"))
            bias = tl.where(beyond, wide(longest) + (row - K) * wide(tail), bias)
        cells = row * CP + label[None, :]
        tl.store(log_window_ptr + cells, bias, mask=row < rows)
        if not MAX:
            weight = tl.where(bias > _LARGE, float("nan"), tl.exp(bias))
            tl.store(window_ptr + cells, weight, mask=row < rows)

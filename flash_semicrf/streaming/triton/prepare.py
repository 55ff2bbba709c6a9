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
def _first_term(a_src_dst, initial_ptr, label, C, HAS_INITIAL: tl.constexpr, MAX: tl.constexpr):
    """Initial scores, or the semiring sum of A over source labels; a_src_dst is [dst, src]."""
    if HAS_INITIAL:
        first = wide(tl.load(initial_ptr + label, mask=label < C, other=float("-inf")))
    else:
        first = tl.max(a_src_dst, 1)
        if not MAX:
            safe = tl.where(first > float("-inf"), first, 0.0)
            first = safe + tl.log(tl.sum(tl.exp(a_src_dst - safe[:, None]), 1))
    return first


@kernel
def prepare_kernel(
    transition_ptr, bias_ptr, initial_ptr, final_ptr,
    window_ptr, log_window_ptr, matrix_ptr, log_matrix_ptr, first_ptr,
    C, K, rows,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, MAX: tl.constexpr,
    CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fill the tables, all float64 and padded to CP labels.

    Program 0 writes the matrices and the end terms, the others ROWS rows of the windows each.
    `window`, `log_window` (rows, CP): exp(D_k) and D_k at row k; zeros, -inf outside 1..K.
    `matrix`, `log_matrix` (2, CP src, CP dst): A forwards; transposed, for the backward pass.
    `first` (2, CP): the term of source 0 of each direction.
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
                first = _first_term(a, initial_ptr, label, C, HAS_INITIAL, MAX)
                tl.store(first_ptr + label, first)
        last = tl.where(label < C, 0.0, float("-inf")).to(tl.float64)
        if HAS_FINAL:
            last = wide(tl.load(final_ptr + label, mask=label < C, other=float("-inf")))
        tl.store(first_ptr + CP + label, last)
    else:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)[:, None]
        listed = (row >= 1) & (row <= K) & (label[None, :] < C)
        bias = tl.load(bias_ptr + (row - 1) * C + label[None, :], mask=listed, other=float("-inf"))
        bias = wide(bias)
        cells = row * CP + label[None, :]
        tl.store(log_window_ptr + cells, bias, mask=row < rows)
        if not MAX:
            weight = tl.where(bias > _LARGE, float("nan"), tl.exp(bias))
            tl.store(window_ptr + cells, weight, mask=row < rows)

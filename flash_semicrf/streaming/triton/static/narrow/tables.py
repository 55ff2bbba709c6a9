"""Tables of the narrow pass: exponentials in float32, each group or column with an exponent.

W of R durations makes a group, of one exponent for each label; exp(A) has one for each label that
is arrived at. What is 2^126 times smaller than the largest of its group is stored as the smallest
float32, so that only what is forbidden is zero; of a column, as zero: a set of bits says what is
allowed there. Cost KC + C², once for all sequences; float64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.numerics import exp_wide
from flash_semicrf.streaming.triton.static.narrow.numbers import LN2, LOWEST, NOTHING

__all__ = ["NarrowTables", "narrow_tables_kernel"]

_LARGEST = tl.constexpr(1e6)
_SMALLEST = tl.constexpr(2.0**-126)


class NarrowTables(NamedTuple):
    """Output of `narrow_tables_kernel`, padded to CP labels."""

    window: Tensor  # float32 (ring + 1, R, CP): W of durations 1 to R; R g + 2 to R (g + 1) + 1
    matrix: Tensor  # float32 (2, CP src, CP dst): exp(A) forwards; transposed
    window_exponent: Tensor  # int32 (ring + 1, CP)
    matrix_exponent: Tensor  # int32 (2, CP dst)
    sources: Tensor  # int32 (2, WORDS, CP dst): bits of the labels src that are allowed


@triton.jit
def _scaled(x, top):
    """exp(x) in float32 less a power of two near exp(top), and its exponent.

    NaN where the power of two would be too large.
    """
    level = tl.maximum(tl.minimum(top, 1e8), -1e8) * 1.4426950408889634
    exponent = tl.maximum(tl.floor(level).to(tl.int32), LOWEST)
    value = exp_wide(x - exponent.to(tl.float64) * LN2).to(tl.float32)
    value = tl.where(top > _LARGEST, float("nan"), value)
    return value, tl.where(top > float("-inf"), exponent, NOTHING)


@triton.jit
def _fill_matrix(wide_tables, to, direction, CP, WORDS):
    label = tl.arange(0, CP)
    place = direction * CP * CP + label[:, None] * CP + label[None, :]  # [src, dst]
    a = tl.load(wide_tables.log_matrix + place)
    value, exponent = _scaled(a, tl.max(a, 0)[None, :])
    value = tl.where(value < _SMALLEST, 0.0, value)
    tl.store(to.matrix + place, value)
    tl.store(to.matrix_exponent + direction * CP + label[None, :], exponent)
    for word in tl.static_range(WORDS):
        bit = tl.where(label // 32 == word, 1 << (label % 32), 0)
        bits = tl.sum(tl.where(a > float("-inf"), bit[:, None], 0), 0)
        tl.store(to.sources + (direction * WORDS + word) * CP + label, bits)


@triton.jit
def _fill_group(wide_tables, to, group, K, CP, R):
    label = tl.arange(0, CP)
    k = tl.where(group == 0, 1, R * (group - 1) + 2) + tl.arange(0, R)[:, None]
    place = wide_tables.log_window + k * CP + label[None, :]
    x = tl.load(place, mask=k <= K, other=float("-inf"))
    value, exponent = _scaled(x, tl.max(x, 0)[None, :])
    value = tl.where((value < _SMALLEST) & (x > float("-inf")), _SMALLEST, value)
    to_place = (group * R + tl.arange(0, R)[:, None]) * CP + label[None, :]
    tl.store(to.window + to_place, value)
    tl.store(to.window_exponent + group * CP + label[None, :], exponent)


@triton.jit
def narrow_tables_kernel(wide_tables, to, K, CP, R, WORDS):
    """Fill the tables from the logarithms of `prepare_kernel`.

    Programs 0 and 1 write the matrix of a direction, the others a group of durations each.
    """
    program = tl.program_id(0)
    if program < 2:
        _fill_matrix(wide_tables, to, program, CP, WORDS)
    else:
        _fill_group(wide_tables, to, program - 2, K, CP, R)

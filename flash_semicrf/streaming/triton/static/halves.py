"""Log Z from two halves of a sequence that meet in the middle.

One pass runs from the left end to boundary m, one from the right end to it, at the same time: half
as many steps one after the other. Either a segment ends at m, or one spans it:

    log Z = LSE_c [gamma_m(c) + eta_m(c)]
            (+) LSE over c and s < m < t, t - s <= K, of [h_s(c) + D_{t-s}(c) + u_t(c)]

where h_s is a source of the left pass with the scores of positions s to m, and u_t one of the right
pass with those of m to t: both are in the rings of the passes. Every term is taken as it is, in the
log domain, so no range is too wide. Cost K² C / 2 for a sequence, in parallel, and K² / 4R² sums of
programs, for blocks of R steps; float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.numerics import decode_log, exp_wide, finite
from flash_semicrf.streaming.triton.static.plan import steps_of_halves, workspace_at
from flash_semicrf.streaming.triton.static.sources import source_logs

__all__ = ["BLOCKS", "join_kernel", "total_kernel"]

BLOCKS = 4
"""Blocks of the left half that a program joins with one of the right."""

_NOTHING = tl.constexpr(-60.0)  # logarithm of a share of the largest term that does not count


@triton.jit
def _window_rows(work, score_ptr, slope, first, steps, K, ring, direction, label, C, CP, R):
    """Sources of R steps with their scores up to the middle, `steps` steps from the pass's start.

    (R, CP) logarithms, -inf where no segment from there spans the middle.
    """
    step = first + tl.arange(0, R)[:, None]
    inside = (step < steps) & (label < C)[None, :]
    h = source_logs(work, score_ptr, slope, first, ring, inside, direction, label, C, CP, R)
    prefix = tl.load(work.state + CP + label)[None, :]
    born = tl.load(work.state + 3 * CP + label)[None, :]
    return tl.where(inside & (step > steps - K) & (step >= born), h + prefix, float("-inf"))


@labels_last
@triton.jit
def join_kernel(problem, log_window_ptr, first_ptr, workspace_ptr, part, to_ptr, COUNT, CP, R):
    """Log-sums over the segments from COUNT blocks of the left half to one of the right.

    Program (block from the middle on, blocks before it, b); each gives an entry of `to`
    (B, blocks * ring). `workspace` as `pass_kernel` leaves it.
    """
    b = tl.program_id(2).to(tl.int64)
    T, C, K = problem.sizes.T, problem.sizes.C, problem.sizes.K
    ring = part.ring
    label = tl.arange(0, CP)
    slope = tl.load(first_ptr + 2 * CP + label)[None, :]
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    left, right = steps_of_halves(length, R)
    start = workspace_ptr + 2 * b * part.stride
    before = workspace_at(start, ring, False, False, CP, R)
    after = workspace_at(start + part.stride, ring, False, False, CP, R)
    left_ptr = problem.scores + b * T * C
    right_ptr = left_ptr + (length - 1) * C

    level = tl.full([], float("-inf"), tl.float64)
    total = tl.zeros([], tl.float64)
    target = tl.cdiv(right, R) * R - (tl.program_id(0) + 1) * R
    source = left - (tl.program_id(1) * COUNT + 1) * R
    # Steps from the middle to the nearest of the sources, one less in an incomplete block.
    nearest = tl.maximum(right - target - R + 1, 1)
    if (target >= 0) & (source >= 0) & (nearest + left - source - R + 1 <= K):
        u = _window_rows(after, right_ptr, slope, target, right, K, ring, -1, label, C, CP, R)
        beyond = right - target - tl.arange(0, R)[:, None, None]
        for _i in range(COUNT):
            if (source >= 0) & (nearest + left - source - R + 1 <= K):
                h = _window_rows(before, left_ptr, slope, source, left, K, ring, 1, label, C, CP, R)
                k = beyond + (left - source - tl.arange(0, R)[None, :, None])
                place = log_window_ptr + k * CP + label[None, None, :]
                bias = tl.load(place, mask=(k >= 1) & (k <= K), other=float("-inf"))
                terms = u[:, None, :] + h[None, :, :] + bias
                top = tl.max(tl.max(tl.max(terms, 2), 1), 0)
                if top > level + _NOTHING:
                    high = tl.maximum(level, top)
                    found = tl.sum(tl.sum(tl.sum(exp_wide(terms - high), 2), 1), 0)
                    total = total * tl.exp(level - high) + found
                    level = high
            source -= R
    entry = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(to_ptr + entry, level + tl.log(total))


@triton.jit
def total_kernel(sizes, workspace_ptr, part, parts_ptr, count, log_z_ptr, CP, R, TILE):
    """Log Z (2, B), without and with the common parts, from the `count` entries by `join_kernel`.

    Program (b,).
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    start = workspace_ptr + 2 * b * part.stride
    before = workspace_at(start, part.ring, False, False, CP, R)
    after = workspace_at(start + part.stride, part.ring, False, False, CP, R)
    common = tl.load(before.state + 4 * CP + 1) + tl.load(after.state + 4 * CP + 1)
    gamma = decode_log(tl.load(before.state + label)) + tl.load(before.state + 4 * CP)
    eta = decode_log(tl.load(after.final + label)) + tl.load(after.final + CP)
    here = tl.where(label < sizes.C, gamma + eta, float("-inf"))
    entry = tl.arange(0, TILE)
    largest = tl.full([TILE], float("-inf"), tl.float64)
    for first in range(0, count, TILE):
        place = parts_ptr + b * count + first + entry
        x = tl.load(place, mask=first + entry < count, other=float("-inf"))
        largest = tl.maximum(largest, x)
    top = tl.maximum(tl.max(largest, 0), tl.max(here, 0))
    safe = finite(top)
    sums = tl.zeros([TILE], tl.float64)
    for first in range(0, count, TILE):
        place = parts_ptr + b * count + first + entry
        x = tl.load(place, mask=first + entry < count, other=float("-inf"))
        sums += exp_wide(x - safe)
    log_z = safe + tl.log(tl.sum(sums, 0) + tl.sum(exp_wide(here - safe), 0))
    tl.store(log_z_ptr + b, log_z)
    tl.store(log_z_ptr + tl.num_programs(0) + b, log_z + common)

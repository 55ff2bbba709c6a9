"""The narrow pass of log Z: float32 and int32 instructions alone, but for one product a step.

For devices that do 64 float32 instructions in the time of one of float64. The recurrence and the
messages are those of `flash_semicrf.streaming.triton.static.passes`. Mantissas are float32, with an
exponent for each label, so that nothing is scaled but by powers of two; contents are summed in
fixed point. Each mantissa is rounded some ten times in a step, at random: log Z and messages are
off by some 1e-7 times the square root of the number of segments, and log Z also by the rounding of
exp(A) and of W, as if these scores had been given less than 6e-8 higher or lower.

A program that cannot certify what it found says so: `pass_kernel` then does both directions of the
sequence again. That is so for masks that are not -inf, scores beyond 5000, deterministic
transitions between confident scores, and minimum durations with scores far below the others, 55
nats in the R positions of a block. Cost T(KC + C²); workspace O(KC).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.numerics import exp_wide, finite
from flash_semicrf.streaming.triton.static.linear_block import Rows, load_matrix, load_rows
from flash_semicrf.streaming.triton.static.narrow.block import (
    DITHER,
    Parameters,
    contents_of,
    factors_of,
    narrow_steps,
)
from flash_semicrf.streaming.triton.static.narrow.far import narrow_far_window, no_sums
from flash_semicrf.streaming.triton.static.narrow.memory import (
    NarrowState,
    load_narrow,
    narrow_work_at,
    save_narrow,
)
from flash_semicrf.streaming.triton.static.narrow.numbers import LN2, NOTHING, NOWHERE

__all__ = ["narrow_pass_kernel"]


@triton.jit
def _first_state(first_ptr, CP):
    """State before the first step, from the logarithms of its source."""
    x = tl.load(first_ptr + tl.arange(0, CP))
    live = x > float("-inf")
    x = tl.where(live, x, 0.0)
    good = tl.abs(x) < 1e6
    level = tl.floor(tl.where(good, x, 0.0) * 1.4426950408889634)
    mantissa = tl.where(live, exp_wide(x - level * LN2), 0.0).to(tl.float32)
    zero = tl.zeros([CP], tl.int32)
    return NarrowState(
        mantissa,
        tl.where(live, level.to(tl.int32), NOTHING),
        zero,
        zero,
        zero + NOWHERE,
        zero,
        zero + NOWHERE,
        good,
        tl.zeros([CP], tl.float32),
        zero + NOTHING,
    )


@triton.jit
def _parameters(tables, direction_index, unit, CP, R):
    """Tables of a direction, into registers."""
    WORDS: tl.constexpr = (CP + 31) // 32
    label = tl.arange(0, CP)
    near = ()
    for i in tl.static_range(R):
        near = near + (tl.load(tables.window + i * CP + label),)
    sources = ()
    for word in tl.static_range(WORDS):
        sources = sources + (
            tl.load(tables.sources + (direction_index * WORDS + word) * CP + label),
        )
    return Parameters(
        near,
        tl.load(tables.window_exponent + label),
        load_matrix(tables.matrix + direction_index * CP * CP, unit, CP),
        tl.load(tables.matrix_exponent + direction_index * CP + label),
        sources,
    )


@triton.jit
def _older_sums(work, ahead, dead, label, CP, R):
    """What `narrow_far_kernel` summed for a block, nothing for labels whose sources are `dead`."""
    sums = ()
    for j in tl.static_range(R):
        sums = sums + (tl.load(work.older + (ahead * R + j) * CP + label),)
    row = work.older_exponents + ahead * 2 * CP + label
    return sums, tl.where(dead, NOWHERE, tl.load(row)), tl.load(row + CP) != 0


@triton.jit
def _running_score(state, step):
    """Contents up to a step, in nats."""
    level = (state.whole.to(tl.int64) << 30) + state.fraction - step.to(tl.int64) * DITHER
    return level.to(tl.float64) * (LN2 * 2.0**-30)


@triton.jit
def _log_z(state, last_ptr, length, label):
    """Log Z from the last message and the term of what follows it."""
    mantissa = state.last_mantissa.to(tl.float64)
    log = tl.log(tl.where(mantissa > 0, mantissa, 1.0)) + state.last_exponent.to(tl.float64) * LN2
    value = tl.where(mantissa > 0, log + tl.load(last_ptr + label), float("-inf"))
    top = tl.max(value, 0)
    safe = finite(top)
    total = tl.log(tl.sum(exp_wide(value - safe), 0)) + safe
    dither = length.to(tl.float64) * (DITHER * LN2 * 2.0**-30)
    return tl.where(top > float("-inf"), total - dither, top)


@labels_last
@triton.jit
def narrow_pass_kernel(
    problem, first_ptr, tables, memory, messages, done_ptr, part, PARTS, CP, R, SPAN
):
    """Run the steps of a part of one pass; program (b, direction).

    Scores in float32 or narrower. `first` of `Tables`; `messages` as `pass_kernel` writes them.
    `done` (directions, B), int32, says which programs are certain of their results. `memory` is a
    `NarrowMemory`; with parts each launch but the first goes on from the state in it, and reads
    there what `narrow_far_kernel` summed.
    """
    KEEP: tl.constexpr = messages.forward is not None
    HAS_BOUNDARY: tl.constexpr = problem.start is not None
    b = tl.program_id(0).to(tl.int64)
    T, C, K = problem.sizes.T, problem.sizes.C, problem.sizes.K
    ring = part.ring
    label = tl.arange(0, CP)
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    index = tl.program_id(1)
    direction = tl.where(index == 0, 1, -1)
    origin = tl.where(index == 0, 0, length - 1)
    base = (b * T + origin) * C
    score_ptr = problem.scores + base
    opening_ptr, closing_ptr, message_ptr, offset_ptr = None, None, None, None
    if HAS_BOUNDARY:
        opening_ptr, closing_ptr = problem.start + base, problem.end + base
        if index == 1:
            opening_ptr, closing_ptr = closing_ptr, opening_ptr
    if KEEP:
        message_ptr = messages.forward + base
        offset_ptr = messages.offset + (index * tl.num_programs(0) + b) * T + origin
        if index == 1:
            message_ptr = messages.backward + base
    rows = Rows(score_ptr, opening_ptr, closing_ptr, message_ptr, offset_ptr, direction)

    program = b * tl.num_programs(1) + index
    work = narrow_work_at(memory, program, ring, CP, R)
    given = _parameters(tables, index, part.unit, CP, R)
    last_ptr = first_ptr + (1 - index) * CP
    state = _first_state(first_ptr + index * CP, CP)
    if PARTS:
        if part.begin > 0:
            state = load_narrow(work.state, CP)

    ahead = load_rows(score_ptr, part.begin, length, direction, label, C, R)
    end = tl.minimum(part.end, length)
    step = part.begin
    certain = tl.min(state.good.to(tl.int32), 0)
    going = (step < end) & (certain == 1)
    while going:
        block = step // R
        slot = block % ring
        if KEEP:
            if (direction > 0) & (step % SPAN == 0):
                place = (b * (T // SPAN + 2) + step // SPAN) * C + label
                tl.store(messages.prefix + place, _running_score(state, step), mask=label < C)
                tl.store(messages.born + place, state.born, mask=label < C)
        contents = contents_of(ahead, state.whole, state.fraction, R)
        ahead = load_rows(score_ptr, step + R, length, direction, label, C, R)
        opening, closing = None, None
        if HAS_BOUNDARY:
            opening = factors_of(load_rows(opening_ptr, step, length, direction, label, C, R), R)
            closing = factors_of(load_rows(closing_ptr, step, length, direction, label, C, R), R)
        sums = no_sums(CP, R)
        known = block
        if PARTS:
            known = block - part.begin // R
            sums = _older_sums(work, known, state.born >= part.begin, label, CP, R)
        blocks = tl.minimum(part.blocks_back, known)
        sums = narrow_far_window(tables, work, sums, block, blocks, ring, state.born, CP, R)
        state = narrow_steps(
            state, sums, given, contents, opening, closing, rows, work, slot, step, length, K, C,
            CP, R,
        )  # fmt: skip
        tl.debug_barrier()
        step += R
        certain = tl.min(state.good.to(tl.int32), 0)
        going = (step < end) & (certain == 1)

    if PARTS:
        save_narrow(work.state, state, CP)
    tl.store(done_ptr + index * tl.num_programs(0) + b, certain)
    if (part.begin < length) & (part.end >= length) & (direction > 0):
        if KEEP:
            place = (b * (T // SPAN + 2) + tl.cdiv(length, SPAN)) * C + label
            tl.store(messages.prefix + place, _running_score(state, step), mask=label < C)
        log_z = _log_z(state, last_ptr, length, label)
        tl.store(messages.log_z + b, log_z)
        tl.store(messages.log_z + tl.num_programs(0) + b, log_z)
        tl.store(messages.has_deep + b, 0)

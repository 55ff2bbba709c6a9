"""The messages of log Z for static transitions: one program per sequence and direction.

Forwards, with S the running sum of a label's scores,

    h_s(c)     = LSE_{c'} [alpha_s(c') + A[c', c]] + start_s(c) - S_s(c)
    alpha_t(c) = S_t(c) + end_{t-1}(c) + LSE_{k=1..K} [h_{t-k}(c) + D_k(c)]

Read from the end, with starts and ends exchanged and A transposed, the same recurrence gives eta
(for alpha) and beta: one kernel serves both directions. Blocks of R steps run in linear float64,
and again in the log domain where that certifies nothing. Cost T(KC + C²); workspace O(KC).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.jit import kernel
from flash_semicrf.streaming.triton.numerics import (
    allowed,
    decode_linear,
    decode_log,
    encode_log,
    exp_rows,
    high_word,
)
from flash_semicrf.streaming.triton.static.linear_block import (
    far_window,
    in_range,
    linear_steps,
    load_matrix,
    score_factors,
)
from flash_semicrf.streaming.triton.static.log_block import load_state, log_steps, save_state
from flash_semicrf.streaming.triton.static.tail import add_block

__all__ = ["PART", "far_kernel", "load_rows", "pass_kernel"]

PART = 128
"""Steps of a part of a pass whose far window is summed in parallel beforehand."""


@triton.jit
def load_rows(row_ptr, step, length, direction, stride, label, C, R: tl.constexpr):
    """Rows of the R positions after `step`, at least float32; -inf outside."""
    rows = ()
    first = row_ptr + step * direction * stride + label
    within = label < C
    for i in tl.static_range(R):
        inside = (i < length - step) & within
        row = tl.load(first + i * direction * stride, mask=inside, other=float("-inf"))
        if row.dtype.primitive_bitwidth < 32:
            row = row.to(tl.float32)
        rows = rows + (row,)
    return rows


@triton.jit
def _exponentials(rows, R: tl.constexpr):
    exponents = ()
    for i in tl.static_range(R):
        x = rows[i].to(tl.float64)
        exponents = exponents + (tl.where(allowed(x), x, -1000.0),)
    return exp_rows(exponents, rows[0].dtype == tl.float32, R)


@kernel
def pass_kernel(
    scores_ptr, start_ptr, end_ptr, lengths_ptr,
    window_ptr, log_window_ptr, matrix_ptr, log_matrix_ptr, first_ptr, tail_ptr,
    workspace_ptr, log_z_ptr, has_deep_ptr, forward_ptr, backward_ptr, offset_ptr,
    prefix_out_ptr, born_out_ptr, T, C, K, begin, end, blocks_back, ring, workspace_stride, unit,
    always_log,
    HAS_BOUNDARY: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr, PARTS: tl.constexpr,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    CHAINS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Run the steps after `begin` up to `end` of one pass; program (b, direction).

    `scores`, `start`, `end` (B, T, C) in any floating dtype; the tables of `prepare_kernel`;
    `workspace` float64, `workspace_stride` of them per program. Writes `log_z` (2, B), first
    without the common parts of the scores, which messages leave out too, then with them;
    `has_deep` (B,) int32, whether there are deep scores. With KEEP also the messages `forward`
    (alpha_{p+1} in row p) and `backward` (eta_p), both (B, T, C), with their offsets (2, B, T);
    `prefix` and `born` (B, blocks, C): running score and first source that no forbidden position
    cut off, at every multiple of SPAN positions. float64 inside. `always_log` is for tests. With
    PARTS the pass comes in several launches: each but the first goes on from the state that the one
    before left in the workspace, and reads there what `far_kernel` summed. With a tail, `longer`
    holds what came before the window; see `add_block`.
    """
    b = tl.program_id(0).to(tl.int64)
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(lengths_ptr + b).to(tl.int32)
    direction = 1
    if BACKWARD:
        direction = tl.where(tl.program_id(1) == 0, 1, -1)
    is_backward = direction < 0
    origin = tl.where(is_backward, length - 1, 0)
    stride = C
    base = (b * T + origin) * C
    score_ptr = scores_ptr + base
    opening_ptr = start_ptr + base
    closing_ptr = end_ptr + base
    message_ptr = forward_ptr + base
    row_offset_ptr = offset_ptr + b * T + origin
    first_row = first_ptr
    last_row = first_ptr + CP
    if BACKWARD:
        if is_backward:
            opening_ptr = end_ptr + base
            closing_ptr = start_ptr + base
            message_ptr = backward_ptr + base
            row_offset_ptr = offset_ptr + (tl.num_programs(0) + b) * T + origin
            first_row = first_ptr + CP
            last_row = first_ptr
            matrix_ptr += CP * CP
            log_matrix_ptr += CP * CP

    program = b * tl.num_programs(1) + tl.program_id(1)
    sources_ptr = workspace_ptr + program * workspace_stride
    raw_ptr = sources_ptr + ring * R * CP
    rates_ptr = raw_ptr + ring * R * CP
    prefix_ptr = rates_ptr + ring * CP
    scratch_ptr = prefix_ptr + ring * CP
    final_ptr = scratch_ptr + CP
    state_ptr = final_ptr + 2 * CP
    raw_offset_ptr = state_ptr + 5 * CP
    longer_ptr = raw_offset_ptr + ring * R
    older_ptr = longer_ptr + 3 * CP
    reach = K  # how long a source counts
    if HAS_TAIL:
        reach = tl.where(tl.load(tail_ptr + label) > float("-inf"), 1 << 30, K)

    matrix = load_matrix(matrix_ptr, unit, CP)
    near = ()
    for i in tl.static_range(R):
        near = near + (tl.load(window_ptr + (i + 1) * CP + label),)

    first = tl.load(first_row + label)
    offset = tl.max(first, 0)
    offset = tl.where(offset > float("-inf"), offset, 0.0)
    g = encode_log(first - offset)
    prefix = tl.zeros([CP], tl.float64)
    newest = tl.full([CP], -(1 << 30), tl.int32)
    born = tl.zeros([CP], tl.int32)
    common = tl.zeros([], tl.float64)
    has_deep = tl.zeros([], tl.int32)
    if PARTS:
        if begin > 0:
            g, prefix, newest, born, offset, common, has_deep = load_state(state_ptr, CP)
    if HAS_TAIL:
        if begin == 0:
            tl.store(longer_ptr + label, tl.full([CP], float("-inf"), tl.float64))

    # Rows are loaded one block ahead: nothing waits for memory between the blocks.
    ahead = load_rows(score_ptr, begin, length, direction, stride, label, C, R)
    for step in range(begin, tl.minimum(end, length), R):
        block = step // R
        slot = block % ring
        if HAS_TAIL:
            tl.store(longer_ptr + CP + label, born.to(tl.float64))
            tl.store(longer_ptr + 2 * CP + label, prefix - offset)
            tl.debug_barrier()
            add_block(
                longer_ptr, tail_ptr, raw_ptr + slot * R * CP, raw_offset_ptr + slot * R,
                prefix_ptr + slot * CP, score_ptr, (block - ring) * R, direction, stride, C, CP, R,
            )  # fmt: skip
            tl.debug_barrier()
        tl.store(prefix_ptr + slot * CP + label, prefix)
        if KEEP:
            if (direction > 0) & (step % SPAN == 0):
                place = (b * (T // SPAN + 2) + step // SPAN) * C + label
                tl.store(prefix_out_ptr + place, prefix, mask=inside)
                tl.store(born_out_ptr + place, born, mask=inside)
        x, factors, shifts, out, ok = score_factors(ahead, R)
        common += out
        ahead = load_rows(score_ptr, step + R, length, direction, stride, label, C, R)
        opening = factors
        closing = factors
        if HAS_BOUNDARY:
            rows = load_rows(opening_ptr, step, length, direction, stride, label, C, R)
            opening = _exponentials(rows, R)
        if HAS_BOUNDARY:
            rows = load_rows(closing_ptr, step, length, direction, stride, label, C, R)
            closing = _exponentials(rows, R)
        known = block
        if PARTS:
            known = block - begin // R
        sums, lost = far_window(
            window_ptr, sources_ptr, rates_ptr, block, tl.minimum(blocks_back, known), ring,
            older_ptr + known * (R + 1) * CP, PARTS, CP, R, G,
        )  # fmt: skip
        if HAS_TAIL:
            level = tl.load(longer_ptr + 2 * CP + label)
            growth = tl.load(tail_ptr + 2 * CP + label)
            raised = ()
            for j in tl.static_range(R):
                raised = raised + (sums[j] + level,)
                level = level * growth
            sums = raised
        linear = decode_linear(g)
        new_g, sources, new_newest, new_born, new_offset, exponent, rate, fine = linear_steps(
            linear, sums, near, factors, shifts, matrix, opening, closing, x,
            step, length, reach, newest, born, final_ptr, offset,
            message_ptr + step * direction * stride, row_offset_ptr + step * direction,
            sources_ptr + slot * R * CP, direction, stride, C, label,
            HAS_BOUNDARY, KEEP, CP, R, CHAINS,
        )  # fmt: skip
        ok = ok & fine & in_range(high_word(linear), g == 0) & (lost <= 1e-220)
        if (tl.min(ok.to(tl.int32), 0) == 1) & (always_log == 0):
            row_offset = offset
            raw_row = raw_ptr + slot * R * CP + label
            raw_offset = raw_offset_ptr + slot * R
            for i in tl.static_range(R):
                tl.store(raw_row + i * CP, sources[i])
                tl.store(raw_offset + i, row_offset)
                row_offset += shifts[i]
                prefix += tl.where(allowed(x[i]), x[i], 0.0)
            tl.store(rates_ptr + slot * CP + label, rate)
            g = new_g
            newest = new_newest
            born = new_born
            offset = new_offset + exponent.to(tl.float64) * 0.6931471805599453
        else:
            tl.debug_barrier()
            save_state(state_ptr, g, prefix, newest, born, offset, common, has_deep, CP)
            tl.debug_barrier()
            log_steps(
                state_ptr, final_ptr,
                score_ptr, opening_ptr, closing_ptr, message_ptr, row_offset_ptr,
                sources_ptr, rates_ptr, raw_ptr, raw_offset_ptr, prefix_ptr, scratch_ptr,
                log_window_ptr, log_matrix_ptr, longer_ptr, tail_ptr,
                step, length, K, ring, direction, stride, C,
                HAS_BOUNDARY, KEEP, HAS_TAIL, CP, R,
            )  # fmt: skip
            tl.debug_barrier()
            g, prefix, newest, born, offset, common, has_deep = load_state(state_ptr, CP)
        tl.debug_barrier()

    if PARTS:
        save_state(state_ptr, g, prefix, newest, born, offset, common, has_deep, CP)
    if (begin < length) & (end >= length) & (direction > 0):
        if KEEP:
            place = (b * (T // SPAN + 2) + tl.cdiv(length, SPAN)) * C + label
            tl.store(prefix_out_ptr + place, prefix, mask=inside)
        last = tl.load(last_row + label)
        value = decode_log(tl.load(final_ptr + label)) + last
        value = tl.where(inside, value, float("-inf"))
        top = tl.max(value, 0)
        safe = tl.where(top > float("-inf"), top, 0.0)
        total = tl.sum(tl.exp(value - safe), 0)
        log_z = tl.where(top > float("-inf"), safe + tl.load(final_ptr + CP) + tl.log(total), top)
        tl.store(log_z_ptr + b, log_z)
        tl.store(log_z_ptr + tl.num_programs(0) + b, log_z + common)
        tl.store(has_deep_ptr + b, has_deep)


@kernel
def far_kernel(
    window_ptr, workspace_ptr, begin, blocks_back, ring, workspace_stride,
    CP: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """What all sources before the part that starts at `begin` give to the outputs of its blocks.

    Long windows make this most of the work, and unlike the steps it is parallel. Program (block of
    the part, program of the pass); into the workspace, as `far_window` reads it.
    """
    ahead = tl.program_id(0)
    program = tl.program_id(1).to(tl.int64)
    label = tl.arange(0, CP)
    sources_ptr = workspace_ptr + program * workspace_stride
    rates_ptr = sources_ptr + 2 * ring * R * CP
    older_ptr = rates_ptr + (2 * ring + 11) * CP + ring * R + ahead * (R + 1) * CP
    first = begin // R
    blocks = tl.maximum(tl.minimum(blocks_back - ahead, first), 0)
    sums, lost = far_window(
        window_ptr + ahead * R * CP, sources_ptr, rates_ptr, first, blocks, ring, older_ptr, False,
        CP, R, G,
    )  # fmt: skip
    for j in tl.static_range(R):
        tl.store(older_ptr + j * CP + label, sums[j])
    tl.store(older_ptr + R * CP + label, lost)

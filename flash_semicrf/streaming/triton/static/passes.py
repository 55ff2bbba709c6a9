"""The messages of log Z for static transitions: one program per sequence and direction.

Forwards, with S the running sum of a label's scores,

    h_s(c)     = LSE_{c'} [alpha_s(c') + A[c', c]] + start_s(c) - S_s(c)
    alpha_t(c) = S_t(c) + end_{t-1}(c) + LSE_{k=1..K} [h_{t-k}(c) + D_k(c)]

Read from the end, with starts and ends exchanged and A transposed, the same recurrence gives eta
(for alpha) and beta: one kernel serves both directions. Blocks of R steps run in linear float64,
and again in the log domain where that certifies nothing. Cost T(KC + C²); workspace O(KC).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.streaming.triton.compiler import labels_last
from flash_semicrf.streaming.triton.numerics import (
    allowed,
    decode_linear,
    decode_log,
    encode_log,
    exp_rows,
    finite,
    high_word,
)
from flash_semicrf.streaming.triton.static.far import far_window
from flash_semicrf.streaming.triton.static.linear_block import (
    Block,
    Rows,
    in_range,
    linear_steps,
    load_matrix,
    load_rows,
    score_factors,
)
from flash_semicrf.streaming.triton.static.log_block import load_state, log_steps, save_state
from flash_semicrf.streaming.triton.static.plan import (
    is_done,
    steps_of_halves,
    workspace_at,
)
from flash_semicrf.streaming.triton.static.tail import add_block

__all__ = ["Messages", "pass_kernel"]


class Messages(NamedTuple):
    """Log Z and the messages of both passes as `pass_kernel` writes them.

    All but log Z are flat: parts of two buffers.
    """

    log_z: Tensor  # (2, B): without the common parts of the scores, as the messages; with them
    has_deep: Tensor | None  # (B,), int32; None with halves
    forward: Tensor | None  # (B, T, C), alpha_{p+1} in row p; None like all that follow, or none
    backward: Tensor | None  # (B, T, C), eta_p
    offset: Tensor | None  # (2, B, T)
    prefix: (
        Tensor | None
    )  # (B, T // SPAN + 2, C): running score at every multiple of SPAN positions
    born: Tensor | None  # int32: there, first source that no forbidden position cut off


@triton.jit
def _exponentials(row_ptr, step, length, direction, label, C, R, outside):
    rows = load_rows(row_ptr, step, length, direction, label, C, R, outside)
    exponents = ()
    for i in tl.static_range(R):
        x = rows[i].to(tl.float64)
        exponents = exponents + (tl.where(allowed(x), x, -1000.0),)
    return exp_rows(exponents, rows[0].dtype == tl.float32, R)


@triton.jit
def _log_z(work, last, label, C):
    """Log Z from the last message and the term of what follows it."""
    value = decode_log(tl.load(work.final + label)) + last
    value = tl.where(label < C, value, float("-inf"))
    top = tl.max(value, 0)
    safe = finite(top)
    CP: tl.constexpr = label.shape[0]
    total = tl.log(tl.sum(tl.exp(value - safe), 0))
    return tl.where(top > float("-inf"), safe + tl.load(work.final + CP) + total, top)


@labels_last
@triton.jit
def pass_kernel(
    problem, tables, workspace_ptr, messages, part, done, PARTS, HALVES, CP, R, G, SPAN
):
    """Run the steps of a part of one pass; program (b, direction).

    Scores in any floating dtype; `tables` by `prepare_kernel`; `messages` get log Z, and both
    passes' messages, which come with log Z alone where there is no room for them. float64 inside.
    With PARTS the pass comes in several launches: each but the first goes on from the state that
    the one before left in the workspace, and reads there what `far_kernel` summed. With a tail,
    `longer` in the workspace holds what came before the window; see `add_block`. With HALVES each
    direction stops where it meets the other, and leaves its state in place of log Z: see `halves`.
    Sequences that are `done` are left as they are.
    """
    KEEP: tl.constexpr = messages.forward is not None
    TWO: tl.constexpr = KEEP or HALVES
    HAS_BOUNDARY: tl.constexpr = problem.start is not None
    HAS_TAIL: tl.constexpr = tables.tail is not None
    b = tl.program_id(0).to(tl.int64)
    T, C, K = problem.sizes.T, problem.sizes.C, problem.sizes.K
    ring = part.ring
    label = tl.arange(0, CP)
    inside = label < C
    length = tl.load(problem.sizes.lengths + b).to(tl.int32)
    direction = 1
    if TWO:
        direction = tl.where(tl.program_id(1) == 0, 1, -1)
    is_backward = direction < 0
    origin = tl.where(is_backward, length - 1, 0)
    base = (b * T + origin) * C
    score_ptr = problem.scores + base
    opening_ptr, closing_ptr, message_ptr, offset_ptr = None, None, None, None
    if HAS_BOUNDARY:
        opening_ptr, closing_ptr = problem.start + base, problem.end + base
    first_row, last_row = tables.first, tables.first + CP
    matrix_ptr, log_matrix_ptr = tables.matrix, tables.log_matrix
    if KEEP:
        message_ptr = messages.forward + base
        offset_ptr = messages.offset + b * T + origin
    if TWO:
        if is_backward:
            if HAS_BOUNDARY:
                opening_ptr, closing_ptr = closing_ptr, opening_ptr
            if KEEP:
                message_ptr = messages.backward + base
                offset_ptr += tl.num_programs(0) * T
            first_row, last_row = last_row, first_row
            matrix_ptr += CP * CP
            log_matrix_ptr += CP * CP
    rows = Rows(score_ptr, opening_ptr, closing_ptr, message_ptr, offset_ptr, direction)
    length = tl.where(is_done(done, b, tl.num_programs(0)), 0, length)
    outside = float("-inf")
    if HALVES:
        left, right = steps_of_halves(length, R)
        length = tl.where(is_backward, right, left)
        # Positions of the other half that fill the last block forbid nothing.
        outside = tl.where(inside, 0.0, float("-inf"))

    program = b * tl.num_programs(1) + tl.program_id(1)
    work = workspace_at(workspace_ptr + program * part.stride, ring, False, HAS_TAIL, CP, R)
    reach = K  # how long a source counts
    if HAS_TAIL:
        reach = tl.where(tl.load(tables.tail + label) > float("-inf"), 1 << 30, K)

    matrix = load_matrix(matrix_ptr, part.unit, CP)
    near = ()
    for i in tl.static_range(R):
        near = near + (tl.load(tables.window + (i + 1) * CP + label),)

    first = tl.load(first_row + label)
    offset = finite(tl.max(first, 0))
    g = encode_log(first - offset)
    prefix = tl.zeros([CP], tl.float64)
    newest = tl.full([CP], -(1 << 30), tl.int32)
    born = tl.zeros([CP], tl.int32)
    common = tl.zeros([], tl.float64)
    has_deep = tl.zeros([], tl.int32)
    if PARTS:
        if part.begin > 0:
            g, prefix, newest, born, offset, common, has_deep = load_state(work.state, CP)
    if HAS_TAIL:
        if part.begin == 0:
            tl.store(work.longer + label, tl.full([CP], float("-inf"), tl.float64))

    # Rows are loaded one block ahead: nothing waits for memory between the blocks.
    ahead = load_rows(score_ptr, part.begin, length, direction, label, C, R, outside)
    for step in range(part.begin, tl.minimum(part.end, length), R):
        block = step // R
        slot = block % ring
        if HAS_TAIL:
            tl.store(work.longer + CP + label, born.to(tl.float64))
            tl.store(work.longer + 2 * CP + label, prefix - offset)
            tl.debug_barrier()
            add_block(work, tables.tail, score_ptr, (block - ring) * R, ring, direction, C, CP, R)
            tl.debug_barrier()
        tl.store(work.prefix + slot * CP + label, prefix)
        if KEEP:
            if (direction > 0) & (step % SPAN == 0):
                place = (b * (T // SPAN + 2) + step // SPAN) * C + label
                tl.store(messages.prefix + place, prefix, mask=inside)
                tl.store(messages.born + place, born, mask=inside)
        x, factors, shifts, out, ok = score_factors(ahead, R)
        common += out
        ahead = load_rows(score_ptr, step + R, length, direction, label, C, R, outside)
        opening, closing = None, None
        if HAS_BOUNDARY:
            opening = _exponentials(opening_ptr, step, length, direction, label, C, R, outside)
            closing = _exponentials(closing_ptr, step, length, direction, label, C, R, outside)
        known, older_ptr = block, None
        if PARTS:
            known = block - part.begin // R
            older_ptr = work.older + known * (R + 1) * CP
        blocks = tl.minimum(part.blocks_back, known)
        sums, lost = far_window(
            tables.window, work, block, blocks, ring, older_ptr, None, False, CP, R, G
        )
        if HAS_TAIL:
            level = tl.load(work.longer + 2 * CP + label)
            growth = tl.load(tables.tail + 2 * CP + label)
            raised = ()
            for j in tl.static_range(R):
                raised = raised + (sums[j] + level,)
                level = level * growth
            sums = raised
        linear = decode_linear(g)
        live = linear, offset, newest, born
        scores = Block(x, factors, shifts, opening, closing)
        new_live, exponent, sources, rate, fine = linear_steps(
            live, sums, near, matrix, scores, rows, work, slot, step, length, reach, C, label, CP, R
        )
        ok = ok & fine & in_range(high_word(linear), g == 0) & (lost <= 1e-220)
        if (tl.min(ok.to(tl.int32), 0) == 1) & (part.always_log == 0):
            row_offset = offset
            raw_row = work.raw + slot * R * CP + label
            raw_offset = work.raw_offset + slot * R
            for i in tl.static_range(R):
                tl.store(raw_row + i * CP, sources[i])
                tl.store(raw_offset + i, row_offset)
                row_offset += shifts[i]
                prefix += tl.where(allowed(x[i]), x[i], 0.0)
            tl.store(work.rates + slot * CP + label, rate)
            g, offset, newest, born = new_live
            offset += exponent.to(tl.float64) * 0.6931471805599453
        else:
            tl.debug_barrier()
            save_state(work.state, g, prefix, newest, born, offset, common, has_deep, CP)
            tl.debug_barrier()
            log_steps(work, rows, tables, log_matrix_ptr, step, length, K, C, ring, CP, R)
            tl.debug_barrier()
            g, prefix, newest, born, offset, common, has_deep = load_state(work.state, CP)
        tl.debug_barrier()

    if PARTS or HALVES:
        save_state(work.state, g, prefix, newest, born, offset, common, has_deep, CP)
    if not HALVES:
        if (part.begin < length) & (part.end >= length) & (direction > 0):
            if KEEP:
                place = (b * (T // SPAN + 2) + tl.cdiv(length, SPAN)) * C + label
                tl.store(messages.prefix + place, prefix, mask=inside)
            log_z = _log_z(work, tl.load(last_row + label), label, C)
            tl.store(messages.log_z + b, log_z)
            tl.store(messages.log_z + tl.num_programs(0) + b, log_z + common)
            tl.store(messages.has_deep + b, has_deep)

"""One block of R steps of a pass in the log domain: for what linear float64 cannot hold.

Slow and exact: every step is a log-sum-exp over the window and one over the labels. It starts and
ends in the state of the linear blocks, so that the two may alternate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_semicrf.streaming.triton.numerics import (
    allowed,
    decode_log,
    encode_log,
    exp_wide,
    finite,
    is_deep,
    settled,
    wide,
)
from flash_semicrf.streaming.triton.static.tail import add_longer

__all__ = ["load_state", "log_steps", "save_state"]

_TOGETHER = tl.constexpr(16)  # durations, or labels, whose loads are in flight together


@triton.jit
def _window_logs(work, rows, slope, step, K, ring, label, C, CP, R):
    """Turn the sources of the window before `step` into log h, h being source less running score.

    In place, and once: an offset of NaN marks the rows that are done, and so are those before them.
    """
    oldest = tl.maximum(step - K + 1, 0) // R
    block = step // R - 1
    todo = block >= oldest
    while todo:
        slot = block % ring
        prefix = tl.load(work.prefix + slot * CP + label)
        for r in range(tl.minimum(R, step)):  # R rounds, which the compiler shall not write out
            row = slot * R + r
            offset = tl.load(work.raw_offset + row)
            source = tl.load(work.raw + row * CP + label)
            source = tl.where(offset == offset, decode_log(source) + (offset - prefix), source)
            tl.debug_barrier()
            tl.store(work.raw + row * CP + label, source)
            tl.store(work.raw_offset + row, float("nan"))
            place = (block * R + r) * rows.direction * C
            x = tl.load(rows.score + place + label, mask=label < C, other=float("-inf"))
            x = settled(x, tl.max(x, 0))
            prefix += tl.where(allowed(x), x + slope, 0.0)  # no linear block has deep ones
        block -= 1
        todo = block >= oldest
        if todo:
            offset = tl.load(work.raw_offset + block % ring * R)
            todo = offset == offset


@triton.jit
def _lower_window(logs_ptr, deep, step, K, ring, label, CP, R):
    """Add the deep scores of position `step`, zero elsewhere, to the sources that it lies after."""
    for first in range(tl.maximum(step - K + 1, 0), step + 1, _TOGETHER):
        source = first + tl.arange(0, _TOGETHER)[:, None]
        row = logs_ptr + source % (ring * R) * CP + label[None, :]
        lowered = tl.load(row, mask=source <= step, other=0.0) + deep[None, :]
        tl.debug_barrier()  # no warp reads what another has written
        tl.store(row, lowered, mask=source <= step)
    tl.debug_barrier()


@triton.jit
def _window_terms(logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP, R):
    """h + D of the _TOGETHER durations from `first` on; -inf where there is no such segment."""
    k = first + tl.arange(0, _TOGETHER)[:, None]
    source = step + 1 - k
    live = (k <= K) & (source >= 0)
    row = step % (ring * R) + 1 - k
    row = tl.where(row < 0, row + ring * R, row)  # a remainder by a variable takes long
    x = tl.load(logs_ptr + row * CP + label[None, :], mask=live, other=float("-inf"))
    x += tl.load(log_window_ptr + k * CP + label[None, :], mask=live, other=float("-inf"))
    return tl.where(source >= born[None, :], x, float("-inf"))


@triton.jit
def _sum_of_terms(x):
    """Sum over the rows of exp(x), x at most 0; nothing is computed where all are below e^-45."""
    CP: tl.constexpr = x.shape[1]
    total = tl.zeros([CP], tl.float64)
    if tl.max(tl.max(x, 0), 0) > -45.0:
        total = tl.sum(exp_wide(x), 0)
    return total


@triton.jit
def _window_sum(logs_ptr, log_window_ptr, step, K, ring, born, label, CP, R):
    """LSE over the sources up to `step` of h + D, for the output one step later."""
    top = tl.full([CP], float("-inf"), tl.float64)
    longest = tl.minimum(K, step + 1)
    for first in range(1, longest + 1, _TOGETHER):
        terms = _window_terms(logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP, R)
        top = tl.maximum(top, tl.max(terms, 0))
    safe = finite(top)
    total = tl.zeros([CP], tl.float64)
    for first in range(1, longest + 1, _TOGETHER):
        terms = _window_terms(logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP, R)
        total += _sum_of_terms(terms - safe[None, :])
    return safe + tl.log(total)


@triton.jit
def _arrivals(scratch_ptr, log_matrix_ptr, first, label, C, CP):
    """alpha(c') + A[c', c] of the _TOGETHER labels c' from `first` on."""
    source = first + tl.arange(0, _TOGETHER)[:, None]
    alpha = tl.load(scratch_ptr + source, mask=source < C, other=float("-inf"))
    row = log_matrix_ptr + source * CP + label[None, :]
    return alpha + tl.load(row, mask=source < C, other=float("-inf"))


@triton.jit
def _product(alpha, scratch_ptr, log_matrix_ptr, label, C, CP):
    """LSE over c' of alpha(c') + A[c', c]; alpha goes through memory, from lanes to rows."""
    tl.debug_barrier()
    tl.store(scratch_ptr + label, alpha)
    tl.debug_barrier()
    top = tl.full([CP], float("-inf"), tl.float64)
    for first in range(0, C, _TOGETHER):
        x = _arrivals(scratch_ptr, log_matrix_ptr, first, label, C, CP)
        top = tl.maximum(top, tl.max(x, 0))
    safe = finite(top)
    total = tl.zeros([CP], tl.float64)
    for first in range(0, C, _TOGETHER):
        x = _arrivals(scratch_ptr, log_matrix_ptr, first, label, C, CP)
        total += _sum_of_terms(x - safe[None, :])
    return safe + tl.log(total)


@triton.jit
def save_state(state_ptr, g, prefix, newest, born, offset, common, has_deep, CP):
    """Write the state of a pass between two blocks; 5 CP float64."""
    label = tl.arange(0, CP)
    tl.store(state_ptr + label, g)
    tl.store(state_ptr + CP + label, prefix)
    tl.store(state_ptr + 2 * CP + label, newest.to(tl.float64))
    tl.store(state_ptr + 3 * CP + label, born.to(tl.float64))
    tl.store(state_ptr + 4 * CP, offset)
    tl.store(state_ptr + 4 * CP + 1, common)
    tl.store(state_ptr + 4 * CP + 2, has_deep.to(tl.float64))


@triton.jit
def load_state(state_ptr, CP):
    """Read what `save_state` wrote."""
    label = tl.arange(0, CP)
    g = tl.load(state_ptr + label)
    prefix = tl.load(state_ptr + CP + label)
    newest = tl.load(state_ptr + 2 * CP + label).to(tl.int32)
    born = tl.load(state_ptr + 3 * CP + label).to(tl.int32)
    offset = tl.load(state_ptr + 4 * CP)
    common = tl.load(state_ptr + 4 * CP + 1)
    has_deep = tl.load(state_ptr + 4 * CP + 2).to(tl.int32)
    return g, prefix, newest, born, offset, common, has_deep


@triton.jit(noinline=True)
def log_steps(work, rows, tables, log_matrix_ptr, step, length, K, C, ring, CP, R):
    """Run the R steps after `step` (a multiple of R) that are within `length`.

    A function of its own, not inlined: it is large, rarely called, and the compiler's time grows
    with the cube of a function's size. So the state comes and goes by way of memory.

    Parameters
    ----------
    work : Workspace
        `state` by `save_state`. g: source of `step`, without its opening score, as stored messages
        are, relative to the offset. prefix: sum of the scores before `step`, settled, without those
        that forbid and deep ones. has_deep: whether there were any. `longer` by
        `flash_semicrf.streaming.triton.static.tail.add_block`.
    rows : Rows
    tables : Tables
    log_matrix_ptr
        The one of the direction.
    """
    label = tl.arange(0, CP)
    g, prefix, newest, born, offset, common, has_deep = load_state(work.state, CP)
    reach = K
    longer = prefix
    if tables.tail is not None:
        reach = (ring - 1) * R + 1  # all sources that are kept; `longer` has those before them
        longer = tl.load(work.longer + label)
    slope = tl.load(tables.first + 2 * CP + label)
    _window_logs(work, rows, slope, step, reach, ring, label, C, CP, R)
    block = step // R
    slot = block % ring
    source_log = decode_log(g) + offset
    start_offset = offset
    start_prefix = prefix
    lowered = tl.zeros([CP], tl.float64)
    inside = label < C
    # A number of rounds that the compiler does not know: it would write them all out.
    count = tl.minimum(R, length - step)
    for i in range(count):
        here = step + i
        place = here * rows.direction * C
        row = slot * R + i
        if rows.opening is not None:
            source_log += wide(tl.load(rows.opening + place + label, mask=inside, other=0.0))
            source_log = tl.where(source_log > -9.9e37, source_log, float("-inf"))
        newest = tl.where(source_log > float("-inf"), here, newest)
        tl.store(work.raw + row * CP + label, source_log - prefix)
        tl.store(work.raw_offset + row, float("nan"))
        tl.debug_barrier()
        x = tl.load(rows.score + place + label, mask=inside, other=float("-inf"))
        top = tl.max(x, 0)
        is_mask = is_deep(x, top)
        x = settled(x, top)
        # Deep scores go to the sources one by one: a running sum would keep nothing beside them.
        deep = tl.where(is_mask, x, 0.0)
        if tl.max(is_mask.to(tl.int32), 0) == 1:
            _lower_window(work.raw, deep, here, reach, ring, label, CP, R)
            lowered += deep
            has_deep = has_deep | 1
        prefix += tl.where(allowed(x), tl.where(is_mask, 0.0, x) + slope, 0.0)
        born = tl.where(allowed(x), born, here + 1)
        alpha = _window_sum(work.raw, tables.log_window, here, reach, ring, born, label, CP, R)
        if tables.tail is not None:
            longer = tl.where(allowed(x), longer + deep, float("-inf"))
            alpha = add_longer(alpha, longer, tables.tail, i, label, CP)
            reach += 1
        alpha += prefix
        if rows.closing is not None:
            alpha += wide(tl.load(rows.closing + place + label, mask=inside, other=0.0))
            alpha = tl.where(alpha > -9.9e37, alpha, float("-inf"))
        top = finite(tl.max(alpha, 0))
        encoded = encode_log(alpha - top)
        if rows.message is not None:
            tl.store(rows.message + place + label, encoded, mask=inside)
            tl.store(rows.offset + here * rows.direction, top)
        tl.store(work.final + label, encoded, mask=(here + 1 == length) & (label >= 0))
        tl.store(work.final + CP, top, mask=here + 1 == length)
        source_log = _product(alpha, work.scratch, log_matrix_ptr, label, C, CP)
    top = tl.max(source_log, 0)
    offset = tl.where(top > float("-inf"), top, offset)
    # The block's sources in the frame of its end, as the linear blocks after it read them.
    for i in range(count):
        row = slot * R + i
        h = tl.load(work.raw + row * CP + label)
        scaled = exp_wide(tl.minimum(h + prefix - offset, 700.0))
        tl.store(work.sources + row * CP + label, tl.where(born <= step + i, scaled, 0.0))
    rate = prefix - start_prefix + lowered + start_offset - offset
    rate = exp_wide(tl.minimum(rate, 700.0))
    tl.store(work.rates + slot * CP + label, tl.where(born <= step, rate, 0.0))
    g = encode_log(source_log - offset)
    tl.debug_barrier()
    if tables.tail is not None:
        tl.store(work.longer + label, longer)
    save_state(work.state, g, prefix, newest, born, offset, common, has_deep, CP)

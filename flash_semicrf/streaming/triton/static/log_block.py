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
    is_deep,
    settled,
    wide,
)
from flash_semicrf.streaming.triton.static.tail import add_longer

__all__ = ["load_state", "log_steps", "save_state"]

_UNROLL = tl.constexpr(4)  # durations whose loads are in flight together


@triton.jit
def _window_logs(
    raw_ptr, raw_offset_ptr, prefix_ptr, score_ptr, step, K, ring, label, C, stride,
    direction, CP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Turn the sources of the window before `step` into log h, h being source less running score.

    In place, and once: an offset of NaN marks the rows that are done.
    """
    oldest = tl.maximum(step - K + 1, 0) // R
    for block in range(oldest, step // R):
        slot = block % ring
        prefix = tl.load(prefix_ptr + slot * CP + label)
        for r in range(tl.minimum(R, step)):  # R rounds, which the compiler shall not write out
            row = slot * R + r
            offset = tl.load(raw_offset_ptr + row)
            source = tl.load(raw_ptr + row * CP + label)
            source = tl.where(offset == offset, decode_log(source) + (offset - prefix), source)
            tl.debug_barrier()
            tl.store(raw_ptr + row * CP + label, source)
            tl.store(raw_offset_ptr + row, float("nan"))
            place = (block * R + r) * direction * stride
            x = tl.load(score_ptr + place + label, mask=label < C, other=float("-inf"))
            x = settled(x, tl.max(x, 0))
            prefix += tl.where(allowed(x), x, 0.0)  # no linear block has deep ones


@triton.jit
def _lower_window(logs_ptr, deep, step, K, ring, label, CP: tl.constexpr, R: tl.constexpr):
    """Add the deep scores of position `step`, zero elsewhere, to the sources that it lies after."""
    for source in range(tl.maximum(step - K + 1, 0), step + 1):
        row = logs_ptr + ((source // R % ring) * R + source % R) * CP + label
        lowered = tl.load(row) + deep
        tl.debug_barrier()
        tl.store(row, lowered)
    tl.debug_barrier()


@triton.jit
def _window_terms(
    logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP: tl.constexpr, R: tl.constexpr
):
    """h + D of the _UNROLL durations from `first` on; -inf where there is no such segment."""
    terms = ()
    for i in tl.static_range(_UNROLL):
        k = first + i
        source = step + 1 - k
        live = (k <= K) & (source >= 0)
        row = (tl.maximum(source, 0) // R % ring) * R + tl.maximum(source, 0) % R
        x = tl.load(logs_ptr + row * CP + label, mask=live, other=float("-inf"))
        x += tl.load(log_window_ptr + k * CP + label, mask=live, other=float("-inf"))
        terms = terms + (tl.where(source >= born, x, float("-inf")),)
    return terms


@triton.jit
def _window_sum(
    logs_ptr, log_window_ptr, step, K, ring, born, label, CP: tl.constexpr, R: tl.constexpr
):
    """LSE over the sources up to `step` of h + D, for the output one step later."""
    top = tl.full([CP], float("-inf"), tl.float64)
    longest = tl.minimum(K, step + 1)
    for first in range(1, longest + 1, _UNROLL):
        terms = _window_terms(logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP, R)
        for i in tl.static_range(_UNROLL):
            top = tl.maximum(top, terms[i])
    safe = tl.where(top > float("-inf"), top, 0.0)
    total = tl.zeros([CP], tl.float64)
    for first in range(1, longest + 1, _UNROLL):
        terms = _window_terms(logs_ptr, log_window_ptr, first, step, K, ring, born, label, CP, R)
        for i in tl.static_range(_UNROLL):
            total += exp_wide(terms[i] - safe)
    return safe + tl.log(total)


@triton.jit
def _product(alpha, scratch_ptr, log_matrix_ptr, label, C, CP: tl.constexpr):
    """LSE over c' of alpha(c') + A[c', c]; alpha goes through memory, one label at a time."""
    tl.debug_barrier()
    tl.store(scratch_ptr + label, alpha)
    tl.debug_barrier()
    top = tl.full([CP], float("-inf"), tl.float64)
    for source in range(C):
        x = tl.load(scratch_ptr + source) + tl.load(log_matrix_ptr + source * CP + label)
        top = tl.maximum(top, x)
    safe = tl.where(top > float("-inf"), top, 0.0)
    total = tl.zeros([CP], tl.float64)
    for source in range(C):
        x = tl.load(scratch_ptr + source) + tl.load(log_matrix_ptr + source * CP + label)
        total += exp_wide(x - safe)
    return safe + tl.log(total)


@triton.jit
def save_state(state_ptr, g, prefix, newest, born, offset, common, has_deep, CP: tl.constexpr):
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
def load_state(state_ptr, CP: tl.constexpr):
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
def log_steps(
    state_ptr, final_ptr,
    score_ptr, opening_ptr, closing_ptr, message_ptr, offset_ptr, sources_ptr,
    rates_ptr, raw_ptr, raw_offset_ptr, prefix_ptr, scratch_ptr, log_window_ptr,
    log_matrix_ptr, longer_ptr, tail_ptr, step, length, K, ring, direction, stride, C,
    HAS_BOUNDARY: tl.constexpr, KEEP: tl.constexpr, HAS_TAIL: tl.constexpr,
    CP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Run the R steps after `step` (a multiple of R) that are within `length`.

    A function of its own, not inlined: it is large, rarely called, and the compiler's time grows
    with the cube of a function's size. So the state comes and goes by way of memory.

    Parameters
    ----------
    state_ptr
        By `save_state`. g: source of `step`, without its opening score, as stored messages are,
        relative to the offset. prefix: sum of the scores before `step`, settled, without those that
        forbid and deep ones. has_deep: whether there were any.
    longer_ptr, tail_ptr
        By `flash_semicrf.streaming.triton.static.tail.add_block`; the table of the tail.
    score_ptr, opening_ptr, closing_ptr, message_ptr, offset_ptr
        Rows of the pass's first position; the others follow in `direction`.
    """
    label = tl.arange(0, CP)
    g, prefix, newest, born, offset, common, has_deep = load_state(state_ptr, CP)
    reach = K
    longer = prefix
    if HAS_TAIL:
        reach = (ring - 1) * R + 1  # all sources that are kept; `longer` has those before them
        longer = tl.load(longer_ptr + label)
    _window_logs(
        raw_ptr, raw_offset_ptr, prefix_ptr, score_ptr, step, reach, ring, label, C, stride,
        direction, CP, R,
    )  # fmt: skip
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
        place = here * direction * stride
        row = slot * R + i
        if HAS_BOUNDARY:
            source_log += wide(tl.load(opening_ptr + place + label, mask=inside, other=0.0))
            source_log = tl.where(source_log > -9.9e37, source_log, float("-inf"))
        newest = tl.where(source_log > float("-inf"), here, newest)
        tl.store(raw_ptr + row * CP + label, source_log - prefix)
        tl.store(raw_offset_ptr + row, float("nan"))
        tl.debug_barrier()
        x = tl.load(score_ptr + place + label, mask=inside, other=float("-inf"))
        top = tl.max(x, 0)
        is_mask = is_deep(x, top)
        x = settled(x, top)
        # Deep scores go to the sources one by one: a running sum would keep nothing beside them.
        deep = tl.where(is_mask, x, 0.0)
        if tl.max(is_mask.to(tl.int32), 0) == 1:
            _lower_window(raw_ptr, deep, here, reach, ring, label, CP, R)
            lowered += deep
            has_deep = has_deep | 1
        prefix += tl.where(allowed(x), x - deep, 0.0)
        born = tl.where(allowed(x), born, here + 1)
        alpha = _window_sum(raw_ptr, log_window_ptr, here, reach, ring, born, label, CP, R)
        if HAS_TAIL:
            longer = tl.where(allowed(x), longer + deep, float("-inf"))
            alpha = add_longer(alpha, longer, tail_ptr, i, label, CP)
            reach += 1
        alpha += prefix
        if HAS_BOUNDARY:
            alpha += wide(tl.load(closing_ptr + place + label, mask=inside, other=0.0))
            alpha = tl.where(alpha > -9.9e37, alpha, float("-inf"))
        top = tl.max(alpha, 0)
        top = tl.where(top > float("-inf"), top, 0.0)
        encoded = encode_log(alpha - top)
        if KEEP:
            tl.store(message_ptr + place + label, encoded, mask=inside)
            tl.store(offset_ptr + here * direction, top)
        tl.store(final_ptr + label, encoded, mask=(here + 1 == length) & (label >= 0))
        tl.store(final_ptr + CP, top, mask=here + 1 == length)
        source_log = _product(alpha, scratch_ptr, log_matrix_ptr, label, C, CP)
    top = tl.max(source_log, 0)
    offset = tl.where(top > float("-inf"), top, offset)
    # The block's sources in the frame of its end, as the linear blocks after it read them.
    for i in range(count):
        row = slot * R + i
        h = tl.load(raw_ptr + row * CP + label)
        scaled = exp_wide(tl.minimum(h + prefix - offset, 700.0))
        tl.store(sources_ptr + row * CP + label, tl.where(born <= step + i, scaled, 0.0))
    rate = prefix - start_prefix + lowered + start_offset - offset
    rate = exp_wide(tl.minimum(rate, 700.0))
    tl.store(rates_ptr + slot * CP + label, tl.where(born <= step, rate, 0.0))
    g = encode_log(source_log - offset)
    tl.debug_barrier()
    if HAS_TAIL:
        tl.store(longer_ptr + label, longer)
    save_state(state_ptr, g, prefix, newest, born, offset, common, has_deep, CP)

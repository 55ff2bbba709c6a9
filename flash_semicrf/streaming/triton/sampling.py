"""Segmentations drawn from their distribution: one walk from the end per sample, side by side.

As `flash_semicrf.streaming.cpu.static.sampling`, with the same random numbers and in the same order
of terms: labels upwards, durations upwards, the first whose running sum exceeds the number. From
the log messages,

    P(k | c ends at t)  = exp(gamma_{t-k}(c) + D_k(c) + score of the positions - alpha_t(c))
    P(c' | c starts at s) is in proportion to exp(alpha_s(c') + A[c', c])

and with transitions by duration gamma is summed up for the durations that a walk looks at. With a
duration tail the durations go on beyond K, in the same sum. Cost per segment C and its duration,
k·C with transitions by duration; float64.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.streams import streams
from flash_semicrf.streaming.triton.by_duration import launch as durational
from flash_semicrf.streaming.triton.jit import kernel, launch
from flash_semicrf.streaming.triton.log_rows import load_row, sum_over
from flash_semicrf.streaming.triton.numerics import exp_wide, wide
from flash_semicrf.streaming.triton.static.launch import plan_of, power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.log_messages import log_messages
from flash_semicrf.streaming.triton.static.viterbi import collect_table

__all__ = ["sample", "sample_kernel"]

_DURATIONS = 128
"""Most durations whose probabilities are summed up at once."""

_FURTHER = 32
"""Fewest of them where durations go on beyond K."""

_BUFFER = 2**27
"""Segments that there is room for at a time, eight bytes each."""

_NOTHING = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _uniform(state, increment, number):
    """`flash_semicrf.streaming.streams.uniform` of uint64 state and increment."""
    z = state + (number + 1).to(tl.uint64) * increment
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _draw(weight, before, index, bound):
    """First index at which `before` and the sum of the weights exceed the bound, or _NOTHING."""
    above = (before + tl.cumsum(weight, 0) > bound) & (weight > 0)
    return tl.min(tl.where(above, index, _NOTHING), 0)


@triton.jit
def _draw_label(alpha, into, u, label):
    """Label of weight exp(alpha + into), both -inf where there is no label."""
    x = alpha + into
    weight = exp_wide(x - tl.max(x, 0))
    found = _draw(weight, 0.0, label, u * tl.sum(weight, 0))
    last = tl.max(tl.where(weight > 0, label, 0), 0)  # where rounding leaves the sum at the bound
    return tl.minimum(found, last)


@triton.jit
def _arrival(
    alpha_ptr, gamma_ptr, transition_ptr, initial_ptr, s, table, live, chosen, C,
    BY_DURATION: tl.constexpr, HAS_INITIAL: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """gamma_s of the label chosen, for segments side by side; `table` are rows of A_k, from 0."""
    if BY_DURATION:
        label = tl.arange(0, CP)[None, :]
        inside = live[:, None] & (label < C)
        x = tl.load(alpha_ptr + s[:, None] * C + label, mask=inside, other=float("-inf"))
        place = (table[:, None] * C + label) * C + chosen
        x += wide(tl.load(transition_ptr + place, mask=inside, other=float("-inf")))
        gamma = sum_over(x, False)
        if HAS_INITIAL:
            place = table * C + chosen
            first = wide(tl.load(initial_ptr + place, mask=live, other=float("-inf")))
            gamma = tl.where(s == 0, first, gamma)
    else:
        gamma = tl.load(gamma_ptr + s * C + chosen, mask=live, other=float("-inf"))
    return gamma


@kernel
def sample_kernel(
    stream_ptr, transition_ptr, bias_ptr, initial_ptr, final_ptr, lengths_ptr, sink_ptr, source_ptr,
    deep_ptr, born_ptr, tail_ptr, alpha_ptr, gamma_ptr, log_z_ptr, starts_ptr, labels_ptr,
    counts_ptr, B, T, C, K,
    BY_DURATION: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_TAIL: tl.constexpr, CP: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    """Draw sample j of sequence b, and write it as `traceback_kernel` does; program (j * B + b,).

    `stream` (2, samples, B) int64: bits of the states and increments. No segments where nothing is
    feasible.
    """
    row = tl.program_id(0)
    b = row % B
    base = b.to(tl.int64) * (T + 1) * C
    alpha_ptr += base
    gamma_ptr += base
    sink_ptr += base
    source_ptr += base
    deep_ptr += base
    born_ptr += base
    starts_ptr += row.to(tl.int64) * T + T
    labels_ptr += row.to(tl.int64) * T + T
    label = tl.arange(0, CP)
    state = tl.load(stream_ptr + row).to(tl.uint64, bitcast=True)
    increment = tl.load(stream_ptr + tl.num_programs(0) + row).to(tl.uint64, bitcast=True)
    into = tl.where(label < C, 0.0, float("-inf")).to(tl.float64)
    if HAS_FINAL:
        into = load_row(final_ptr, label, C)
    stop = tl.load(lengths_ptr + b).to(tl.int32)
    stop = tl.where(tl.load(log_z_ptr + b) > float("-inf"), stop, 0)
    count = tl.zeros([], tl.int32)
    while stop > 0:
        u = _uniform(state, increment, 2 * count)
        chosen = _draw_label(load_row(alpha_ptr + stop * C, label, C), into, u, label)

        u = _uniform(state, increment, 2 * count + 1)
        end = stop * C + chosen
        level = tl.load(sink_ptr + end) - tl.load(alpha_ptr + end)
        content = tl.load(deep_ptr + end)
        possible = stop - tl.load(born_ptr + end)
        longest = tl.minimum(K, possible)
        if HAS_TAIL:
            tail = wide(tl.load(tail_ptr + chosen))
            longest = tl.where(tail > float("-inf"), possible, longest)
        before = tl.zeros([], tl.float64)
        last = tl.zeros([], tl.int32)
        found = tl.full([], _NOTHING, tl.int32)
        first = tl.zeros([], tl.int32)
        while (first < longest) & (found == _NOTHING):
            k = first + 1 + tl.arange(0, KT)
            s = stop - k
            live = k <= longest
            table = k - 1
            if HAS_TAIL:
                table = tl.minimum(k, K) - 1
            place = s * C + chosen
            x = _arrival(
                alpha_ptr, gamma_ptr, transition_ptr, initial_ptr, s, table, live, chosen, C,
                BY_DURATION, HAS_INITIAL, CP,
            )  # fmt: skip
            x += tl.load(source_ptr + place, mask=live, other=0.0) + level
            x += content - tl.load(deep_ptr + place, mask=live, other=0.0)
            place = table * C + chosen
            x += wide(tl.load(bias_ptr + place, mask=live, other=float("-inf")))
            if HAS_TAIL:
                x += tl.where(k > K, (k - K) * tail, 0.0)
            weight = exp_wide(x)
            found = _draw(weight, before, k, u)
            last = tl.maximum(last, tl.max(tl.where(weight > 0, k, 0), 0))
            before += tl.sum(weight, 0)
            first += KT
        # Some duration has a weight of 1/T or more; the bound keeps a walk on NaN from going on.
        duration = tl.maximum(tl.minimum(found, last), 1)
        stop -= duration
        count += 1
        tl.store(starts_ptr - count, stop)
        tl.store(labels_ptr - count, chosen)
        place = label * C + chosen
        if BY_DURATION:
            place += (tl.minimum(duration, K) - 1) * C * C
        into = wide(tl.load(transition_ptr + place, mask=label < C, other=float("-inf")))
    tl.store(counts_ptr + row, count)


def _walks(
    p: Potentials,
    seed: int,
    num_samples: int,
    inputs: durational.Inputs,
    messages: tuple[Tensor, ...],
    **constants: int,
) -> SegmentTable:
    """Draw, some samples at a time; `messages` are alpha, gamma and log Z."""
    B, T, C = p.scores.shape
    stream = torch.from_numpy(streams(seed, num_samples, B).view(np.int64))
    together = max(1, _BUFFER // (B * T))
    tables = []
    for first in range(0, num_samples, together):
        part = stream[:, first : first + together].contiguous().to(p.device)
        rows = part.shape[1] * B
        starts, labels = torch.empty((2, rows, T), dtype=torch.int32, device=p.device)
        counts = torch.empty(rows, dtype=torch.int32, device=p.device)
        launch(
            sample_kernel, (rows,),
            part, *inputs[:9], inputs.tail, *messages, starts, labels, counts,
            B, T, C, p.max_duration,
            HAS_FINAL=inputs.constants["HAS_FINAL"], HAS_TAIL=inputs.constants["HAS_TAIL"],
            CP=inputs.constants["CP"], **constants, num_warps=1,
        )  # fmt: skip
        table = collect_table(starts, labels, counts, p.lengths.repeat(part.shape[1]))
        tables.append(table._replace(sequence=table.sequence + first * B))
    return SegmentTable(*map(torch.cat, zip(*tables, strict=True)))


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    inputs = durational.prepare(p)
    durations = power_of_two_above(p.max_duration)
    if p.duration_tail is not None:
        durations = max(_FURTHER, durations)
    durations = min(_DURATIONS, durations)
    if p.transition.dim() == 3:
        log_z, alpha, *_ = durational.run_passes(p, inputs, False, False)
        return _walks(
            p, seed, num_samples, inputs, (alpha, alpha, log_z),
            BY_DURATION=True, HAS_INITIAL=inputs.constants["HAS_INITIAL"],
            KT=min(durations, max(4, 1024 // inputs.constants["CP"])),
        )  # fmt: skip
    found = log_messages(p, problem_of(p), plan_of(p))
    return _walks(
        p, seed, num_samples, inputs, (found.alpha, found.gamma, found.log_z),
        BY_DURATION=False, HAS_INITIAL=False, KT=durations,
    )  # fmt: skip

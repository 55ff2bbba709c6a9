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
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.log_rows import load_row, sum_over
from flash_semicrf.streaming.triton.numerics import exp_wide, wide
from flash_semicrf.streaming.triton.prefixes import Inputs, inputs_of, rows_from
from flash_semicrf.streaming.triton.records import power_of_two_above
from flash_semicrf.streaming.triton.table import collect_table, walks_of
from flash_semicrf.streaming.windows import Forward

__all__ = ["draw", "sample_from", "sample_kernel"]

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
def _gamma_by_duration(given, alpha_ptr, s, table, live, chosen, C, CP):
    """gamma_s of the label chosen, for segments side by side; `table` are rows of A_k, from 0."""
    label = tl.arange(0, CP)[None, :]
    inside = live[:, None] & (label < C)
    x = tl.load(alpha_ptr + s[:, None] * C + label, mask=inside, other=float("-inf"))
    place = (table[:, None] * C + label) * C + chosen
    x += wide(tl.load(given.transition + place, mask=inside, other=float("-inf")))
    gamma = sum_over(x, False)
    if given.initial is not None:
        place = table * C + chosen
        first = wide(tl.load(given.initial + place, mask=live, other=float("-inf")))
        gamma = tl.where(s == 0, first, gamma)
    return gamma


@triton.jit
def sample_kernel(
    stream_ptr, given, prefixes, sizes, alpha_ptr, gamma_ptr, log_z_ptr, walks, batch, CP, KT
):
    """Draw sample j of sequence b into `walks`, nothing where nothing is feasible.

    Program (j * B + b,). `stream` (2, samples, B) int64: bits of the states and increments;
    `gamma` None for transitions by duration.
    """
    row = tl.program_id(0)
    b = row % batch
    T, C, K = sizes.T, sizes.C, sizes.K
    base = b.to(tl.int64) * (T + 1) * C
    alpha_ptr += base
    p = rows_from(prefixes, base)
    starts_ptr = walks.starts + row.to(tl.int64) * T + T
    labels_ptr = walks.labels + row.to(tl.int64) * T + T
    label = tl.arange(0, CP)
    state = tl.load(stream_ptr + row).to(tl.uint64, bitcast=True)
    increment = tl.load(stream_ptr + tl.num_programs(0) + row).to(tl.uint64, bitcast=True)
    into = tl.where(label < C, 0.0, float("-inf")).to(tl.float64)
    if given.final is not None:
        into = load_row(given.final, label, C)
    stop = tl.load(sizes.lengths + b).to(tl.int32)
    stop = tl.where(tl.load(log_z_ptr + b) > float("-inf"), stop, 0)
    count = tl.zeros([], tl.int32)
    while stop > 0:
        u = _uniform(state, increment, 2 * count)
        chosen = _draw_label(load_row(alpha_ptr + stop * C, label, C), into, u, label)

        u = _uniform(state, increment, 2 * count + 1)
        end = stop * C + chosen
        level = tl.load(p.sink + end) - tl.load(alpha_ptr + end)
        content = tl.load(p.deep + end)
        possible = stop - tl.load(p.born + end)
        longest = tl.minimum(K, possible)
        if given.tail is not None:
            tail = wide(tl.load(given.tail + chosen))
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
            if given.tail is not None:
                table = tl.minimum(k, K) - 1
            place = s * C + chosen
            if gamma_ptr is None:
                x = _gamma_by_duration(given, alpha_ptr, s, table, live, chosen, C, CP)
            else:
                x = tl.load(gamma_ptr + base + place, mask=live, other=float("-inf"))
            x += tl.load(p.source + place, mask=live, other=0.0) + level
            x += content - tl.load(p.deep + place, mask=live, other=0.0)
            place = table * C + chosen
            x += wide(tl.load(given.bias + place, mask=live, other=float("-inf")))
            if given.tail is not None:
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
        if gamma_ptr is None:
            place += (tl.minimum(duration, K) - 1) * C * C
        into = wide(tl.load(given.transition + place, mask=label < C, other=float("-inf")))
    tl.store(walks.counts + row, count)


def draw(
    inputs: Inputs, messages: tuple[Tensor, Tensor | None, Tensor], num_samples: int, seed: int
) -> SegmentTable:
    """Draw, some samples at a time; `messages` are alpha, gamma and log Z.

    Gamma is None for transitions by duration; else the initial scores are part of it.
    """
    given, sizes = inputs.parameters, inputs.sizes
    B, T, device = len(sizes.lengths), sizes.T, sizes.lengths.device
    tile = power_of_two_above(sizes.K)
    tile = min(_DURATIONS, tile if given.tail is None else max(_FURTHER, tile))
    if messages[1] is None:
        tile = min(tile, max(4, 1024 // inputs.labels))
    stream = torch.from_numpy(streams(seed, num_samples, B).view(np.int64))
    together = max(1, _BUFFER // (B * T))
    tables = []
    for first in range(0, num_samples, together):
        part = stream[:, first : first + together].contiguous().to(device)
        rows = part.shape[1] * B
        walks = walks_of(rows, T, device)
        arguments = (part, given, inputs.prefixes, sizes, *messages, walks, B)
        launch(sample_kernel, (rows,), *arguments, CP=inputs.labels, KT=tile, num_warps=1)
        table = collect_table(walks, sizes._replace(lengths=sizes.lengths.repeat(part.shape[1])))
        tables.append(table._replace(sequence=table.sequence + first * B))
    return SegmentTable(*map(torch.cat, zip(*tables, strict=True)))


def sample_from(p: Potentials, forward: Forward, num_samples: int, seed: int) -> SegmentTable:
    """Draw from messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    log_z, alpha, gamma = forward
    alpha = torch.nn.functional.pad(alpha, (0, 0, 1, 0))
    if gamma is not None:
        gamma = torch.nn.functional.pad(gamma, (0, 0, 0, 1))
    return draw(inputs_of(p), (alpha, gamma, log_z), num_samples, seed)

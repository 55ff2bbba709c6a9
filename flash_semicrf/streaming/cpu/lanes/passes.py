"""Both passes and the gradient of eight short sequences at once, one to each lane.

The recurrences are those of `flash_semicrf.streaming.cpu.static.passes`, on exponentials
throughout: no logarithm is taken between a sequence's scores and its log Z. With f the frames, one
per label, and everything times a power of two per sequence (r at each step),

    E_s(c) = gamma_s(c) start_s(c) / f_s(c),            f_{s+1}(c) = f_s(c) exp(scores[s, c]) r_s
    alpha_t(c) = f_t(c) end_{t-1}(c) sum_{k=1..K} E_{t-k}(c) W_k(c)
    gamma_t(c) = sum_{c'} alpha_t(c') exp(A[c', c])

The backward pass, read from the end with starts and ends exchanged, comes first and keeps
sink_s = eta_s start_s and end_{t-1} beta_t, so that the forward pass can add up the gradient as it
goes: with q the power of two and 1 / Z that turn products of messages into probabilities,

    d log Z / d D_k(c)     = sum_t E_{t-k}(c) W_k(c) f_t(c) end_{t-1}(c) beta_t(c) q_t
    d log Z / d A[c', c]   = sum_s alpha_s(c') exp(A[c', c]) sink_s(c) q_s

Every factor and every message must be exactly 0, because something forbids it, or within ranges
whose products neither overflow nor vanish (`flash_semicrf.streaming.cpu.lanes.rows`). Then sums of
them are right to float64's precision. Only a source that a later one of its label outweighs
wherever it reaches is dropped. A sequence that leaves a range is reported as not certain, and is
for the other kernels. Cost T(KC + C²) multiply-adds twice per eight sequences; workspace O(TC).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.jit import helper, kernel
from flash_semicrf.streaming.cpu.lanes.rows import (
    FRAME,
    HIGH,
    LOW,
    add_products,
    close_backward,
    close_forward,
    exp_below,
    exp_within,
    largest,
    normalise,
    peak_of,
    posterior_scale,
    settle_peak,
    sum_products,
    take_backward,
    take_forward,
    total_window,
)
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import fill

__all__ = ["Model", "Sequences", "Sums", "run_short"]

_AFTER = -1e5
"""Binary exponent of what follows a sequence's end: nothing."""

_SMALLEST, _OUTWEIGHS = FRAME**-3, 1e-70
"""A source below the first is dropped if the newest one of its label is above the second: with
W >= 1e-60 that gives 1e20 times as much to every output that both reach."""


class Model(NamedTuple):
    """Exponentials of what all sequences share; the peak of a label's durations is part of A.

    Attributes
    ----------
    rising, falling : float64 arrays of shape (C * K,)
        W by label, then by duration 1..K and K..1.
    transition : float64 array of shape (C * C,)
        exp(A[c', c]).
    first, last : float64 arrays of shape (C,)
        Of the first and the last segment, less their peaks.
    peaks : float
        Sum of those peaks.
    from_one : bool array of shape (C,)
        The durations allowed are 1..k for some k: what a source reaches, a later one does.
    """

    rising: np.ndarray
    falling: np.ndarray
    transition: np.ndarray
    first: np.ndarray
    last: np.ndarray
    peaks: float
    from_one: np.ndarray


class Sequences(NamedTuple):
    """Scores of a batch, flat.

    Attributes
    ----------
    scores, start_scores, end_scores : arrays of shape (B * T * C,)
        The last two of size 0 without boundary scores.
    has_boundary : bool
    lengths : int64 array of shape (B,)
    order : int64 array of shape (B,)
        Sequences by length: eight neighbours are done together.
    """

    scores: np.ndarray
    start_scores: np.ndarray
    end_scores: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    order: np.ndarray


class Sums(NamedTuple):
    """What `run_short` writes, for sequences that are certain.

    Attributes
    ----------
    log_z : float64 array of shape (B,)
    certain : bool array of shape (B,)
    position, start, end : arrays of shape (B * T * C,)
        Marginals; size 0 where they are not wanted.
    initial, final : float64 arrays of shape (B, C)
        Marginals of the first and the last label.
    duration : float64 array of shape (B, K, C)
    transition : float64 array of shape (B, C, C)
        Without the first segment's free source.
    """

    log_z: np.ndarray
    certain: np.ndarray
    position: np.ndarray
    start: np.ndarray
    end: np.ndarray
    initial: np.ndarray
    final: np.ndarray
    duration: np.ndarray
    transition: np.ndarray


class _Places(NamedTuple):
    """Offsets in the workspace. Blocks have a row for each position, rows a vector per label."""

    row: int  # elements of a row
    step: int  # elements from an opening or closing row to the next; 0 without boundary scores
    factor: int  # block: exp(scores), then the position marginals
    opening: int  # block, or a row of ones: exp(start scores)
    closing: int  # the same of end scores
    source: int  # block: E
    output: int  # block: closing beta, then the end marginals
    sink: int  # block: opening eta, then the start marginals
    exponents: int  # a vector per boundary: scale of the backward pass
    peaks: int  # a vector per position
    frame: int
    sums: int
    incoming: int
    alpha: int
    weight: int
    inside: int
    zero: int  # vectors, from here on
    lowest: int
    highest: int
    top: int
    scale: int
    power: int
    posterior: int
    inverse: int
    offset: int
    astray: int
    duration: int  # C * K vectors, durations K..1
    transition: int  # C * C vectors
    size: int


@helper
def _places(num_positions, num_labels, longest, has_boundary):
    row = num_labels * LANES
    block = num_positions * row
    factor = 0
    opening = factor + block
    width = block if has_boundary else row
    closing = opening + width if has_boundary else opening
    source = closing + width
    output = source + block
    sink = output + block
    exponents = sink + block
    peaks = exponents + (num_positions + 1) * LANES
    frame = peaks + num_positions * LANES
    zero = frame + 6 * row
    duration = zero + 10 * LANES
    transition = duration + longest * row
    return _Places(
        row, row if has_boundary else 0, factor, opening, closing, source, output, sink, exponents,
        peaks, frame, frame + row, frame + 2 * row, frame + 3 * row, frame + 4 * row,
        frame + 5 * row, zero, zero + LANES, zero + 2 * LANES, zero + 3 * LANES, zero + 4 * LANES,
        zero + 5 * LANES, zero + 6 * LANES, zero + 7 * LANES, zero + 8 * LANES, zero + 9 * LANES,
        duration, transition, transition + num_labels * row,
    )  # fmt: skip


@helper
def _load_lanes(work, place, values, sequences, lengths, num_positions, stride, num_labels):
    """Put rows of eight sequences side by side; zeros after their ends."""
    for lane in range(LANES):
        first = sequences[lane] * stride * num_labels
        count = lengths[lane] * num_labels
        at = place + lane
        for i in range(count):
            work[at + i * LANES] = values[first + i]
        for i in range(count, num_positions * num_labels):
            work[at + i * LANES] = 0.0


@helper
def _store_lanes(work, place, values, sequences, lengths, count, stride, num_labels):
    """Write the marginals of the first `count` lanes."""
    for lane in range(count):
        first = sequences[lane] * stride * num_labels
        at = place + lane
        for i in range(lengths[lane] * num_labels):
            values[first + i] = min(max(work[at + i * LANES], 0.0), 1.0)


@helper
def _exponentials(work, at, num_positions, num_labels):
    """Turn scores into factors, and add up what was taken out of them."""
    fill(work, at.peaks, num_positions * LANES, -math.inf)
    for i in range(num_positions):
        row, peak = at.factor + i * at.row, at.peaks + i * LANES
        peak_of(work, (row, peak), num_labels)
        settle_peak(work, (peak, at.offset), 1)
        exp_below(work, (row, peak, at.lowest), num_labels)
    if at.step:
        rows = num_positions * num_labels
        exp_within(work, (at.opening, at.zero, at.lowest), rows)
        exp_within(work, (at.closing, at.zero, at.lowest), rows)
    else:
        fill(work, at.opening, at.row, 1.0)


@helper
def _recentre(work, at, from_one, oldest, count, newest):
    """Bring frames back to 1, and with them the sources of `count` positions from `oldest` on."""
    fill(work, at.astray, LANES, 0.0)
    for c in range(from_one.shape[0] * LANES):
        shift = work[at.frame + c]
        if shift >= 1 / FRAME and shift <= FRAME:
            continue
        work[at.frame + c] = 1.0
        outweighed = from_one[c // LANES] and (
            work[at.source + newest * at.row + c] * shift >= _OUTWEIGHS
        )
        first = at.source + oldest * at.row + c
        for i in range(first, first + count * at.row, at.row):
            value = work[i] * shift
            if work[i] != 0.0 and shift != 0.0 and not value >= _SMALLEST:
                value = 0.0
                if not outweighed:
                    work[at.highest + c % LANES] = math.inf
            elif not value <= 1 / _SMALLEST:
                work[at.highest + c % LANES] = math.inf
            work[i] = value


@helper
def _backward(work, at, model, lengths, num_positions, num_labels, longest):
    """Keep the outputs and the sinks of all positions, and their exponents."""
    fill(work, at.frame, at.row, 1.0)
    fill(work, at.incoming, at.row, 0.0)
    fill(work, at.scale, LANES, 0.0)
    for i in range(num_positions - 1, -1, -1):
        for lane in range(LANES):
            work[at.exponents + (i + 1) * LANES + lane] = work[at.scale + lane]
            if lengths[lane] == i + 1:
                for c in range(num_labels):
                    work[at.incoming + c * LANES + lane] = model.last[c]
            elif lengths[lane] <= i:
                work[at.exponents + (i + 1) * LANES + lane] = _AFTER
        block = i * at.row
        take_backward(
            work,
            (at.incoming, at.closing + i * at.step, at.frame, at.factor + block,
             at.source + block, at.output + block, at.lowest, at.highest),
            num_labels,
        )  # fmt: skip
        count = min(longest, num_positions - i)
        sum_products(
            model.rising, (0, longest, 1), work, (at.source + block, LANES, at.row), at.sums,
            num_labels, count,
        )  # fmt: skip
        total_window(work, (at.sums, at.frame, at.lowest, at.highest, at.top), num_labels)
        normalise(work, (at.power, at.scale, at.top), 1)
        close_backward(
            work,
            (at.sums, at.frame, at.opening + i * at.step, at.power, at.sink + block, at.lowest,
             at.highest, at.astray),
            num_labels,
        )  # fmt: skip
        if largest(work, at.astray) > 0.0:
            _recentre(work, at, model.from_one, i, min(count, longest - 1), i)
        sum_products(
            model.transition, (0, num_labels, 1), work, (at.sink + block, 0, LANES), at.incoming,
            num_labels, num_labels,
        )  # fmt: skip
    for lane in range(LANES):
        work[at.exponents + lane] = work[at.scale + lane]


@helper
def _close(work, at, model, num_labels, log_z):
    """Log Z of each lane, and 1 / Z of its scaled messages."""
    for lane in range(LANES):
        total = 0.0
        for c in range(num_labels):
            total += model.first[c] * work[at.sink + c * LANES + lane]
        if total == 0.0:
            log_z[lane] = -math.inf
            work[at.inverse + lane] = 0.0
            continue
        if not (total >= LOW and total <= HIGH):
            work[at.highest + lane] = math.inf
        whole = work[at.scale + lane] * math.log(2.0)
        log_z[lane] = math.log(total) + whole + work[at.offset + lane] + model.peaks
        work[at.inverse + lane] = 1.0 / total


@helper
def _forward(work, at, model, num_positions, num_labels, longest, want):
    """Run the forward pass and add up the gradient."""
    fill(work, at.frame, at.row, 1.0)
    fill(work, at.inside, at.row, 0.0)
    fill(work, at.duration, (longest + num_labels) * at.row, 0.0)
    fill(work, at.astray, LANES, 0.0)
    total = at.peaks  # exponent of Z, where the peaks were
    for lane in range(LANES):
        work[total + lane] = work[at.exponents + lane]
        work[at.scale + lane] = 0.0
        for c in range(num_labels):
            work[at.incoming + c * LANES + lane] = model.first[c]
    posterior_scale(work, (at.posterior, at.scale, at.exponents, total, at.inverse, at.highest), 1)
    for i in range(num_positions):
        block = i * at.row
        take_forward(
            work,
            (at.incoming, at.opening + i * at.step, at.frame, at.factor + block,
             at.source + block, at.sink + block, at.posterior, at.inside, at.lowest, at.highest),
            num_labels,
        )  # fmt: skip
        count = min(longest, i + 1)
        oldest = at.source + (i + 1 - count) * at.row
        sum_products(
            model.falling, (longest - count, longest, 1), work, (oldest, LANES, at.row), at.sums,
            num_labels, count,
        )  # fmt: skip
        total_window(work, (at.sums, at.frame, at.lowest, at.highest, at.top), num_labels)
        normalise(work, (at.power, at.scale, at.top), 1)
        exponent = at.exponents + (i + 1) * LANES
        posterior_scale(work, (at.posterior, at.scale, exponent, total, at.inverse, at.highest), 1)
        close_forward(
            work,
            (at.sums, at.frame, at.closing + i * at.step, at.power, at.output + block,
             at.posterior, at.inside, at.alpha, at.weight, at.lowest, at.highest, at.astray),
            num_labels,
        )  # fmt: skip
        if want[1]:
            add_products(
                work, at.weight, (oldest, LANES, at.row),
                (at.duration + (longest - count) * LANES, longest * LANES, LANES),
                num_labels, count,
            )  # fmt: skip
        if i + 1 == num_positions:
            break
        if largest(work, at.astray) > 0.0:
            used = min(count, longest - 1)
            _recentre(work, at, model.from_one, i + 1 - used, used, i)
        sum_products(
            model.transition, (0, 1, num_labels), work, (at.alpha, 0, LANES), at.incoming,
            num_labels, num_labels,
        )  # fmt: skip
        if want[2]:
            add_products(
                work, at.sums, (at.sink + block + at.row, 0, LANES),
                (at.transition, at.row, LANES), num_labels, num_labels,
            )  # fmt: skip


@helper
def _write(work, at, model, sequences, lengths, count, stride, num_labels, longest, want, sums):
    """Hand out what the first `count` lanes have found; see that their counts agree."""
    _store_lanes(work, at.factor, sums.position, sequences, lengths, count, stride, num_labels)
    if want[0]:
        _store_lanes(work, at.sink, sums.start, sequences, lengths, count, stride, num_labels)
        _store_lanes(work, at.output, sums.end, sequences, lengths, count, stride, num_labels)
    for lane in range(count):
        b = sequences[lane]
        last = (lengths[lane] - 1) * at.row
        covered = 0.0
        for c in range(num_labels):
            place = c * LANES + lane
            covered += work[at.factor + last + place]
            sums.initial[b, c] = work[at.sink + place]
            sums.final[b, c] = work[at.output + last + place]
        if want[1]:
            for c in range(num_labels):
                for k in range(longest):
                    place = c * longest + longest - 1 - k
                    found = work[at.duration + place * LANES + lane]
                    value = found * model.falling[place]
                    covered += 0.0 * value
                    sums.duration[b, k, c] = value
        if want[2]:
            for c_src in range(num_labels):
                for c in range(num_labels):
                    place = c_src * num_labels + c
                    found = work[at.transition + place * LANES + lane]
                    value = found * model.transition[place]
                    covered += 0.0 * value
                    sums.transition[b, c_src, c] = value
        if sums.log_z[b] > -math.inf and not abs(covered - 1.0) < 1e-9:
            sums.certain[b] = False


@kernel
def run_short(queue, batch, model, stride, longest, gradient, want, sums):
    """Do groups of eight sequences.

    Parameters
    ----------
    queue : Queue
        Group g is made of the sequences ``batch.order[8 * g : 8 * g + 8]``.
    batch : Sequences
    model : Model
    stride : int
        T.
    longest : int
        K.
    gradient : bool
        Of log Z, or log Z alone.
    want : bool array of shape (3,)
        Start and end marginals; gradients by durations; by transitions.
    sums : Sums
    """
    num_labels = model.first.shape[0]
    num_positions = batch.lengths[batch.order[batch.order.shape[0] - 1]]
    at = _places(num_positions, num_labels, longest, batch.has_boundary)
    work = np.zeros(at.size)
    sequences = np.zeros(LANES, np.int64)
    lengths = np.zeros(LANES, np.int64)
    log_z = np.zeros(LANES)
    task = take(queue)
    while task >= 0:
        count = min(LANES, batch.order.shape[0] - LANES * task)
        for lane in range(LANES):
            b = batch.order[LANES * task + min(lane, count - 1)]
            sequences[lane], lengths[lane] = b, batch.lengths[b]
        num_positions = lengths[LANES - 1]
        _load_lanes(
            work, at.factor, batch.scores, sequences, lengths, num_positions, stride, num_labels
        )
        if batch.has_boundary:
            _load_lanes(
                work, at.opening, batch.start_scores, sequences, lengths, num_positions, stride,
                num_labels,
            )  # fmt: skip
            _load_lanes(
                work, at.closing, batch.end_scores, sequences, lengths, num_positions, stride,
                num_labels,
            )  # fmt: skip
        fill(work, at.zero, 10 * LANES, 0.0)
        fill(work, at.lowest, LANES, 1.0)
        _exponentials(work, at, num_positions, num_labels)
        _backward(work, at, model, lengths, num_positions, num_labels, longest)
        _close(work, at, model, num_labels, log_z)
        if gradient:
            _forward(work, at, model, num_positions, num_labels, longest, want)
        for lane in range(count):
            b = sequences[lane]
            sums.log_z[b] = log_z[lane]
            low, high = work[at.lowest + lane], work[at.highest + lane]
            sums.certain[b] = low >= LOW and high <= HIGH
        if gradient:
            _write(
                work, at, model, sequences, lengths, count, stride, num_labels, longest, want, sums
            )
        task = take(queue)

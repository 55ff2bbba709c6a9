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

import numpy as np

from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.lanes import rows
from flash_semicrf.streaming.cpu.lanes.records import Lanes
from flash_semicrf.streaming.cpu.lanes.rows import FRAME, HIGH, LOW
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import fill

__all__ = ["run_short"]

_AFTER = -1e5
"""Binary exponent of what follows a sequence's end: nothing."""

_SMALLEST, _OUTWEIGHS = FRAME**-3, 1e-70
"""A source below the first is dropped if the newest one of its label is above the second: with
W >= 1e-60 that gives 1e20 times as much to every output that both reach."""


@helper
def _load_lanes(lanes, place, values):
    """Put rows of eight sequences side by side; zeros after their ends."""
    work, sequences, lengths = lanes.work, lanes.sequences, lanes.lengths
    stride, num_labels = lanes.stride, lanes.num_labels
    size = lengths[LANES - 1] * num_labels
    for lane in range(LANES):
        first = sequences[lane] * stride * num_labels
        count = lengths[lane] * num_labels
        at = place + lane
        for i in range(count):
            work[at + i * LANES] = values[first + i]
        for i in range(count, size):
            work[at + i * LANES] = 0.0


@helper
def _store_lanes(lanes, place, values, count):
    """Write the marginals of the first `count` lanes."""
    work, sequences, lengths = lanes.work, lanes.sequences, lanes.lengths
    stride, num_labels = lanes.stride, lanes.num_labels
    for lane in range(count):
        first = sequences[lane] * stride * num_labels
        at = place + lane
        for i in range(lengths[lane] * num_labels):
            values[first + i] = min(max(work[at + i * LANES], 0.0), 1.0)


@helper
def _exponentials(lanes):
    """Turn scores into factors, and add up what was taken out of them."""
    work, at, num_labels = lanes.work, lanes.at, lanes.num_labels
    num_positions = lanes.lengths[LANES - 1]
    fill(work, at.peaks, num_positions * LANES, -math.inf)
    for i in range(num_positions):
        row, peak = at.factor + i * at.row, at.peaks + i * LANES
        rows.peak_of(work, (row, peak), num_labels)
        rows.settle_peak(work, (peak, at.offset), 1)
        rows.exp_below(work, (row, peak, at.lowest), num_labels)
    if at.step:
        count = num_positions * num_labels
        rows.exp_within(work, (at.opening, at.zero, at.lowest), count)
        rows.exp_within(work, (at.closing, at.zero, at.lowest), count)
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
def _backward(lanes, model):
    """Keep the outputs and the sinks of all positions, and their exponents."""
    work, at, lengths, from_one = lanes.work, lanes.at, lanes.lengths, model.from_one
    rising, transition, last = model.rising, model.transition, model.last
    num_labels, longest, num_positions = lanes.num_labels, lanes.longest, lengths[LANES - 1]
    fill(work, at.frame, at.row, 1.0)
    fill(work, at.incoming, at.row, 0.0)
    fill(work, at.scale, LANES, 0.0)
    for i in range(num_positions - 1, -1, -1):
        for lane in range(LANES):
            work[at.exponents + (i + 1) * LANES + lane] = work[at.scale + lane]
            if lengths[lane] == i + 1:
                for c in range(num_labels):
                    work[at.incoming + c * LANES + lane] = last[c]
            elif lengths[lane] <= i:
                work[at.exponents + (i + 1) * LANES + lane] = _AFTER
        block, opening, closing = i * at.row, at.opening + i * at.step, at.closing + i * at.step
        factor, source = at.factor + block, at.source + block
        output, sink = at.output + block, at.sink + block
        taken = (at.incoming, closing, at.frame, factor, source, output, at.lowest, at.highest)
        rows.take_backward(work, taken, num_labels)
        count = min(longest, num_positions - i)
        window, reached = (0, longest, 1), (source, LANES, at.row)
        rows.sum_products(rising, window, work, reached, at.sums, num_labels, count)
        rows.total_window(work, (at.sums, at.frame, at.lowest, at.highest, at.top), num_labels)
        rows.normalise(work, (at.power, at.scale, at.top), 1)
        watched = (at.lowest, at.highest, at.astray)
        rows.close_backward(
            work, (at.sums, at.frame, opening, at.power, sink) + watched, num_labels
        )
        if rows.largest(work, at.astray) > 0.0:
            _recentre(work, at, from_one, i, min(count, longest - 1), i)
        matrix, sinks = (0, num_labels, 1), (sink, 0, LANES)
        rows.sum_products(transition, matrix, work, sinks, at.incoming, num_labels, num_labels)
    for lane in range(LANES):
        work[at.exponents + lane] = work[at.scale + lane]


@helper
def _close(lanes, model, log_z):
    """Log Z of each lane, and 1 / Z of its scaled messages."""
    work, at, first, peaks = lanes.work, lanes.at, model.first, model.peaks
    for lane in range(LANES):
        total = 0.0
        for c in range(lanes.num_labels):
            total += first[c] * work[at.sink + c * LANES + lane]
        if total == 0.0:
            log_z[lane] = -math.inf
            work[at.inverse + lane] = 0.0
            continue
        if not (total >= LOW and total <= HIGH):
            work[at.highest + lane] = math.inf
        whole = work[at.scale + lane] * math.log(2.0)
        log_z[lane] = math.log(total) + whole + work[at.offset + lane] + peaks
        work[at.inverse + lane] = 1.0 / total


@helper
def _forward(lanes, model, want):
    """Run the forward pass and add up the gradient."""
    work, at, from_one = lanes.work, lanes.at, model.from_one
    first, falling, transition = model.first, model.falling, model.transition
    num_labels, longest = lanes.num_labels, lanes.longest
    num_positions = lanes.lengths[LANES - 1]
    fill(work, at.frame, at.row, 1.0)
    fill(work, at.inside, at.row, 0.0)
    fill(work, at.duration, (longest + num_labels) * at.row, 0.0)
    fill(work, at.astray, LANES, 0.0)
    total = at.peaks  # exponent of Z, where the peaks were
    for lane in range(LANES):
        work[total + lane] = work[at.exponents + lane]
        work[at.scale + lane] = 0.0
        for c in range(num_labels):
            work[at.incoming + c * LANES + lane] = first[c]
    scaled = (total, at.inverse, at.highest)
    rows.posterior_scale(work, (at.posterior, at.scale, at.exponents) + scaled, 1)
    for i in range(num_positions):
        block, opening, closing = i * at.row, at.opening + i * at.step, at.closing + i * at.step
        factor, source = at.factor + block, at.source + block
        output, sink = at.output + block, at.sink + block
        shared = (at.posterior, at.inside)
        taken = (at.incoming, opening, at.frame, factor, source, sink)
        rows.take_forward(work, taken + shared + (at.lowest, at.highest), num_labels)
        count = min(longest, i + 1)
        oldest = (source + (1 - count) * at.row, LANES, at.row)
        window = (longest - count, longest, 1)
        rows.sum_products(falling, window, work, oldest, at.sums, num_labels, count)
        rows.total_window(work, (at.sums, at.frame, at.lowest, at.highest, at.top), num_labels)
        rows.normalise(work, (at.power, at.scale, at.top), 1)
        exponent = at.exponents + (i + 1) * LANES
        rows.posterior_scale(work, (at.posterior, at.scale, exponent) + scaled, 1)
        closed = (at.sums, at.frame, closing, at.power, output) + shared
        written = (at.alpha, at.weight, at.lowest, at.highest, at.astray)
        rows.close_forward(work, closed + written, num_labels)
        if want[1]:
            found = (at.duration + (longest - count) * LANES, longest * LANES, LANES)
            rows.add_products(work, at.weight, oldest, found, num_labels, count)
        if i + 1 == num_positions:
            break
        if rows.largest(work, at.astray) > 0.0:
            used = min(count, longest - 1)
            _recentre(work, at, from_one, i + 1 - used, used, i)
        matrix, ended = (0, 1, num_labels), (at.alpha, 0, LANES)
        rows.sum_products(transition, matrix, work, ended, at.incoming, num_labels, num_labels)
        if want[2]:
            found = (at.transition, at.row, LANES)
            sinks = (sink + at.row, 0, LANES)
            rows.add_products(work, at.sums, sinks, found, num_labels, num_labels)


@helper
def _write(lanes, model, count, want, sums):
    """Hand out the results of the first `count` lanes; check that their counts agree."""
    work, at, sequences, lengths = lanes.work, lanes.at, lanes.sequences, lanes.lengths
    num_labels, longest = lanes.num_labels, lanes.longest
    falling, transition = model.falling, model.transition
    _store_lanes(lanes, at.factor, sums.position, count)
    if want[0]:
        _store_lanes(lanes, at.sink, sums.start, count)
        _store_lanes(lanes, at.output, sums.end, count)
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
                    value = found * falling[place]
                    covered += 0.0 * value
                    sums.duration[b, k, c] = value
        if want[2]:
            for c_src in range(num_labels):
                for c in range(num_labels):
                    place = c_src * num_labels + c
                    found = work[at.transition + place * LANES + lane]
                    value = found * transition[place]
                    covered += 0.0 * value
                    sums.transition[b, c_src, c] = value
        if sums.log_z[b] > -math.inf and not abs(covered - 1.0) < 1e-9:
            sums.certain[b] = False


@kernel
def run_short(queue, batch, model, at, stride, longest, gradient, want, sums):
    """Do groups of eight sequences.

    Parameters
    ----------
    queue : Queue
        Group g is made of the sequences ``batch.order[8 * g : 8 * g + 8]``.
    batch : Sequences
    model : Model
    at : Places
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
    work, log_z = np.zeros(at.size), np.zeros(LANES)
    sequences, lengths = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    lanes = Lanes(work, at, sequences, lengths, stride, model.first.shape[0], longest)
    task = take(queue)
    while task >= 0:
        count = min(LANES, batch.order.shape[0] - LANES * task)
        for lane in range(LANES):
            b = batch.order[LANES * task + min(lane, count - 1)]
            sequences[lane], lengths[lane] = b, batch.lengths[b]
        _load_lanes(lanes, at.factor, batch.scores)
        if batch.has_boundary:
            _load_lanes(lanes, at.opening, batch.start_scores)
            _load_lanes(lanes, at.closing, batch.end_scores)
        fill(work, at.zero, 10 * LANES, 0.0)
        fill(work, at.lowest, LANES, 1.0)
        _exponentials(lanes)
        _backward(lanes, model)
        _close(lanes, model, log_z)
        if gradient:
            _forward(lanes, model, want)
        for lane in range(count):
            b = sequences[lane]
            sums.log_z[b] = log_z[lane]
            low, high = work[at.lowest + lane], work[at.highest + lane]
            sums.certain[b] = low >= LOW and high <= HIGH
        if gradient:
            _write(lanes, model, count, want, sums)
        task = take(queue)

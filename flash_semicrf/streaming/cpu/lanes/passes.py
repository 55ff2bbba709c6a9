"""Both passes and the gradient of eight sequences at once, one to each lane.

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

Positions are done in blocks of `STEPS`: the sources before a block are swept once for all of its
outputs, and the sums over durations and transitions of a block are added up together
(`flash_semicrf.streaming.cpu.lanes.tiles`).

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
from flash_semicrf.streaming.cpu.lanes import rows, tiles
from flash_semicrf.streaming.cpu.lanes.loading import gather_row, scatter_row, scatter_sums
from flash_semicrf.streaming.cpu.lanes.records import Lanes
from flash_semicrf.streaming.cpu.lanes.rows import FRAME, HIGH, LOW
from flash_semicrf.streaming.cpu.lanes.tiles import STEPS
from flash_semicrf.streaming.cpu.lanes.windows import hand_alpha, hand_beta, note_handed
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parts import helper
from flash_semicrf.streaming.cpu.tasks import take

__all__ = ["run_lanes"]

_AFTER = -1e5
"""Binary exponent of what follows a sequence's end: nothing."""

_TINY = 1e-250
"""A sum over sources below this, after a frame has moved, is taken for 0."""


@helper
def _read(lanes, batch):
    """Read the scores as factors, and add up what was taken out of them."""
    work, at, num_labels = lanes.work, lanes.at, lanes.num_labels
    firsts, lengths = lanes.firsts, lanes.lengths
    pace = -num_labels if batch.mirrored else num_labels
    rows.spread(work, at.offsets, LANES, 0.0)
    if not at.step:
        rows.spread(work, at.opening, at.row, 1.0)
    for i in range(lengths[LANES - 1]):
        row = at.factor + i * at.row
        gather_row(work, row, batch.scores, firsts, lengths, i, pace, num_labels)
        rows.spread(work, at.peak, LANES, -math.inf)
        rows.peak_of(work, (row, at.peak), num_labels)
        rows.settle_peak(work, (at.peak, at.offsets + (i + 1) * LANES, at.offset), 1)
        rows.exp_below(work, (row, at.peak, at.lowest), num_labels)
        if at.step:
            opening, closing = at.opening + i * at.step, at.closing + i * at.step
            gather_row(work, opening, batch.opening, firsts, lengths, i, pace, num_labels)
            gather_row(work, closing, batch.closing, firsts, lengths, i, pace, num_labels)
            rows.exp_within(work, (opening, at.zero, at.lowest), num_labels)
            rows.exp_within(work, (closing, at.zero, at.lowest), num_labels)


@helper
def _recentre(lanes, from_one, newest, count, done, most):
    """Bring back the frames that are not within ``[1 / most, most]`` of any lane.

    With them go the `count` sources up to the one in row `newest`, and the sums of the block after
    its first `done` ones. Shifts are powers of two: nothing is rounded.
    """
    work, at = lanes.work, lanes.at
    rows.spread(work, at.astray, LANES, 0.0)
    for c in range(from_one.shape[0]):
        column, near = c * LANES, True
        for i in range(at.frame + column, at.frame + column + LANES):
            near = near and 1 / most <= work[i] <= most
        if near:
            continue
        frame = (at.frame + column, at.shift, newest + column, at.outweighed, at.highest)
        rows.split_frame(work, frame, 1)
        if not from_one[c]:
            rows.spread(work, at.outweighed, LANES, 0.0)
        moved = (at.shift, at.outweighed, at.highest)
        sources = (newest + column, -at.row)
        rows.move_rows(work, sources, count, rows.SMALLEST, *moved)
        sums = (at.far + done * at.row + column, at.row)
        rows.move_rows(work, sums, STEPS - done, _TINY, *moved)


@helper
def _recentre_block(lanes, from_one, block, source):
    """Bring back the frames that might leave their range in a block, whose sources begin in row
    `source`."""
    work, at = lanes.work, lanes.at
    rows.strays(work, (at.frame, at.astray), lanes.num_labels)
    if rows.largest(work, at.astray) > 0.0:
        count = min(block, lanes.longest - 1)
        _recentre(lanes, from_one, source - at.row, count, STEPS, rows.STRAYED)


@helper
def _make_room(lanes, block, base):
    """Drop old sources if a block has no room; return the step of the first row."""
    work, at = lanes.work, lanes.at
    if block + STEPS - base <= at.columns:
        return base
    old = at.source + (block - at.before - base) * at.row
    rows.copy(work, (old, at.source), at.before * at.row // LANES)
    return block - at.before


@helper
def _sum_far(lanes, window, block, source):
    """Sums of a block over the sources before it, which end before row `source`."""
    work, at, longest = lanes.work, lanes.at, lanes.longest
    count = min(block, longest - 1)
    factors = (count + 1, longest + 1 + STEPS, -1)
    oldest = (source - count * at.row, LANES, at.row)
    sums = (at.far, LANES, at.row)
    tiles.sum_tile(window, factors, work, oldest, sums, count, lanes.num_labels)


@helper
def _sum_near(lanes, window, source, j):
    """Complete output j of a block by the sources in it, which begin in row `source`."""
    at = lanes.at
    factors = (j + 1, lanes.longest + 1 + STEPS, -1)
    sums = at.far + j * at.row
    own = (source, LANES, at.row)
    tiles.add_products(window, factors, lanes.work, own, sums, lanes.num_labels, j + 1)


@helper
def _pass_transition(lanes, matrix, row):
    """``incoming = row matrix``, the matrix [from, to] with padded rows."""
    work, at, num_labels = lanes.work, lanes.at, lanes.num_labels
    padded, whole = at.padded, at.padded // STEPS
    vectors, out = (row, 0, LANES), (at.incoming, STEPS * LANES, LANES)
    tiles.sum_tile(matrix, (0, STEPS, padded), work, vectors, out, num_labels, whole)
    if padded % STEPS:
        factors = (whole * STEPS, 0, padded)
        out = (at.incoming + whole * STEPS * LANES, 0, LANES)
        tiles.sum_narrow_tile(matrix, factors, work, vectors, out, num_labels, 1)


@helper
def _enter(lanes, last, end):
    """Begin those of the lanes that end at a boundary, and note which of them have ended before."""
    work, at = lanes.work, lanes.at
    for lane in range(LANES):
        if lanes.lengths[lane] == end:
            for c in range(lanes.num_labels):
                work[at.incoming + c * LANES + lane] = last[c]
        elif lanes.lengths[lane] < end:
            work[at.exponents + end * LANES + lane] = _AFTER


@helper
def _backward(lanes, model, batch, messages):
    """Keep the outputs and the sinks of all positions, and their exponents."""
    work, at, lengths = lanes.work, lanes.at, lanes.lengths
    num_labels, longest, num_positions = lanes.num_labels, lanes.longest, lengths[LANES - 1]
    handed, window, back = lanes.handed, model.window, model.back
    rows.spread(work, at.frame, at.row, 1.0)
    rows.spread(work, at.incoming, at.row, 0.0)
    rows.spread(work, at.scale, LANES, 0.0)
    base = -at.before
    for block in range(0, num_positions, STEPS):
        base = _make_room(lanes, block, base)
        source = at.source + (block - base) * at.row
        _recentre_block(lanes, model.from_one, block, source)
        _sum_far(lanes, window, block, source)
        for j in range(min(STEPS, num_positions - block)):
            i = num_positions - 1 - block - j
            exponents = at.exponents + (i + 1) * LANES
            rows.copy(work, (at.scale, exponents), 1)
            if i + 1 >= lengths[0]:
                _enter(lanes, model.last, i + 1)
            if handed[i + 1] and not batch.mirrored:
                hand_beta(lanes, i + 1, batch.core, model.last_peak, messages)
            opening, closing = at.opening + i * at.step, at.closing + i * at.step
            factor, newest = at.factor + i * at.row, source + j * at.row
            output, sink = at.output + i * at.kept, at.sink + i * at.kept
            taken = (at.incoming, closing, at.frame, factor, newest, output, at.lowest, at.highest)
            rows.take_backward(work, taken, num_labels)
            _sum_near(lanes, window, source, j)
            sums = at.far + j * at.row
            rows.total_window(work, (sums, at.frame, at.lowest, at.highest, at.top), num_labels)
            rows.normalise(work, (at.power, at.scale, at.top), 1)
            watched = (at.lowest, at.highest, at.astray)
            closed = (sums, at.frame, opening, at.power, sink)
            rows.close_backward(work, closed + watched, num_labels)
            if handed[i] and batch.mirrored:
                hand_alpha(lanes, sink, i, batch, model.last_peak, messages)
            if rows.largest(work, at.astray) > 0.0:
                used = min(block + j + 1, longest - 1)
                _recentre(lanes, model.from_one, newest, used, j + 1, FRAME)
            _pass_transition(lanes, back, sink)
    for lane in range(LANES):
        work[at.exponents + lane] = work[at.scale + lane]


@helper
def _close(lanes, model, log_z):
    """Log Z of each lane, and 1 / Z of its scaled messages."""
    work, at, first = lanes.work, lanes.at, model.first
    peaks = model.first_peak + model.last_peak
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
def _count_lanes(lanes, core, position):
    """Note which lanes count the block at a position; whether any does."""
    some = False
    for lane in range(LANES):
        b = lanes.sequences[lane]
        counts = core[b, 0] <= position < core[b, 1]
        lanes.work[lanes.at.counted + lane] = 1.0 if counts else 0.0
        some = some or counts
    return some


@helper
def _correlate(lanes, block, source, steps):
    """Add the first `steps` outputs of a block, with its sources from row `source` on, to the
    gradient by durations; the block is done with them."""
    work, at = lanes.work, lanes.at
    for place in (at.weight, source):
        rows.spread(work, place + steps * at.row, (STEPS - steps) * at.row, 0.0)
    count = min(at.before, block + STEPS) // STEPS
    out_row = at.before * LANES
    rest = (at.duration, out_row, lanes.num_labels, count)
    tiles.add_correlation(work, at.weight, source, at.row, *rest)
    rows.spread(work, at.weight, steps * at.row, 0.0)


@helper
def _add_transitions(lanes, steps):
    """Add the boundaries of a block's first `steps` positions to the gradient by transitions."""
    work, at, num_labels = lanes.work, lanes.at, lanes.num_labels
    for place in (at.begun, at.ended):
        rows.spread(work, place + steps * at.row, (STEPS - steps) * at.row, 0.0)
    given = (at.ended, at.begun, at.row, at.transition)
    tiles.add_pair_outer(work, *given, 0, num_labels // 2, num_labels)
    tiles.add_single_outer(work, *given, num_labels - 1, num_labels % 2, num_labels)


@helper
def _write_marginals(lanes, begin, stop, want, sums):
    """Hand out the marginals of a block's positions."""
    work, at, num_labels = lanes.work, lanes.at, lanes.num_labels
    firsts, lengths = lanes.firsts, lanes.lengths
    for i in range(begin, stop):
        row = (i - begin) * at.row
        scatter_row(work, at.covered + row, sums.position, firsts, lengths, i, num_labels)
        if want[0]:
            scatter_row(work, at.start + row, sums.start, firsts, lengths, i, num_labels)
            scatter_row(work, at.end + row, sums.end, firsts, lengths, i, num_labels)
    for lane in range(LANES):
        b, last = lanes.sequences[lane], lengths[lane] - 1
        if begin == 0:
            for c in range(num_labels):
                sums.initial[b, c] = work[at.start + c * LANES + lane]
        if begin <= last < stop:
            place = (last - begin) * at.row + lane
            for c in range(num_labels):
                work[at.complete + lane] += work[at.covered + place + c * LANES]
                sums.final[b, c] = work[at.end + place + c * LANES]


@helper
def _forward(lanes, model, batch, want, messages, sums):
    """Run the forward pass and add up the gradient."""
    work, at, window, onward = lanes.work, lanes.at, model.window, model.onward
    num_labels, longest, handed = lanes.num_labels, lanes.longest, lanes.handed
    num_positions = lanes.lengths[LANES - 1]
    rows.spread(work, at.frame, at.row, 1.0)
    rows.spread(work, at.inside, at.row, 0.0)
    rows.spread(work, at.duration, at.size - at.duration, 0.0)
    rows.spread(work, at.astray, LANES, 0.0)
    rows.spread(work, at.ended, (STEPS + 1) * at.row, 0.0)
    rows.spread(work, at.source, at.before * at.row, 0.0)  # none before the first
    for lane in range(LANES):
        work[at.total + lane] = work[at.exponents + lane]  # exponent of Z
        work[at.scale + lane] = 0.0
        for c in range(num_labels):
            work[at.incoming + c * LANES + lane] = model.first[c]
    scaled = (at.total, at.inverse, at.highest)
    rows.posterior_scale(work, (at.posterior, at.scale, at.exponents) + scaled, 1)
    base = -at.before
    for block in range(0, num_positions, STEPS):
        base = _make_room(lanes, block, base)
        source = at.source + (block - base) * at.row
        steps = min(STEPS, num_positions - block)
        counts = _count_lanes(lanes, batch.core, block)
        _recentre_block(lanes, model.from_one, block, source)
        _sum_far(lanes, window, block, source)
        for j in range(steps):
            i = block + j
            opening, closing = at.opening + i * at.step, at.closing + i * at.step
            factor, newest = at.factor + i * at.row, source + j * at.row
            output, sink, row = at.output + i * at.row, at.sink + i * at.row, j * at.row
            begun = (at.counted, at.begun + row, at.start + row, at.covered + row)
            taken = (at.incoming, opening, at.frame, factor, newest, sink, at.posterior, at.inside)
            rows.take_forward(work, taken + begun + (at.lowest, at.highest), num_labels)
            _sum_near(lanes, window, source, j)
            total = at.far + row
            rows.total_window(work, (total, at.frame, at.lowest, at.highest, at.top), num_labels)
            rows.normalise(work, (at.power, at.scale, at.top), 1)
            exponent = at.exponents + (i + 1) * LANES
            rows.posterior_scale(work, (at.posterior, at.scale, exponent) + scaled, 1)
            closed = (total, at.frame, closing, at.power, output, at.posterior, at.inside)
            ended = (at.ended + row + at.row, at.end + row)
            written = (at.counted, at.alpha, at.weight + row) + ended
            watched = (at.lowest, at.highest, at.astray)
            rows.close_forward(work, closed + written + watched, num_labels)
            if handed[i + 1]:
                hand_alpha(lanes, at.alpha, i + 1, batch, model.first_peak, messages)
            if i + 1 == num_positions:
                break
            if rows.largest(work, at.astray) > 0.0:
                if want[1] and counts:
                    _correlate(lanes, block, source, j + 1)
                used = min(i + 1, longest - 1)
                _recentre(lanes, model.from_one, newest, used, j + 1, FRAME)
            _pass_transition(lanes, onward, at.alpha)
        _write_marginals(lanes, block, block + steps, want, sums)
        if want[1] and counts:
            _correlate(lanes, block, source, steps)
        if want[2]:
            if counts:
                _add_transitions(lanes, steps)
            rows.copy(work, (at.ended + STEPS * at.row, at.ended), num_labels)


@helper
def _write_sums(lanes, model, count, want, sums):
    """Hand out what is summed up; check that the counts of the first `count` lanes agree."""
    work, at, num_labels, longest = lanes.work, lanes.at, lanes.num_labels, lanes.longest
    firsts, sequences = lanes.firsts, lanes.sequences
    if want[1]:
        for lane in range(LANES):
            firsts[lane] = sequences[lane] * longest * num_labels
        found, factors = (at.duration, LANES, at.before * LANES), (1, 1, longest + 1 + STEPS)
        given = (work, found, model.window, factors, sums.duration, firsts)
        scatter_sums(*given, (longest, num_labels), at.complete)
    if want[2]:
        for lane in range(LANES):
            firsts[lane] = sequences[lane] * num_labels * num_labels
        found, factors = (at.transition, at.row, LANES), (0, at.padded, 1)
        given = (work, found, model.onward, factors, sums.transition, firsts)
        scatter_sums(*given, (num_labels, num_labels), at.complete)
    for lane in range(count):
        b = sequences[lane]
        if sums.log_z[b] > -math.inf and not abs(work[at.complete + lane] - 1.0) < 1e-9:
            sums.certain[b] = False


@kernel
def run_lanes(queue, batch, model, at, stride, longest, want, sums, messages):
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
    want : bool array of shape (3,)
        Start and end marginals; gradients by durations; by transitions.
    sums : Sums
    messages : Messages
    """
    work, log_z = np.zeros(at.size), np.zeros(LANES)
    sequences, lengths = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    firsts, handed = np.zeros(LANES, np.int64), np.zeros(stride + 1, np.bool_)
    num_labels = model.first.shape[0]
    lanes = Lanes(work, at, sequences, lengths, firsts, handed, num_labels, longest)
    task = take(queue)
    while task >= 0:
        count = min(LANES, batch.order.shape[0] - LANES * task)
        for lane in range(LANES):
            b = batch.order[LANES * task + min(lane, count - 1)]
            sequences[lane], lengths[lane] = b, batch.lengths[b]
            first = b * stride + (lengths[lane] - 1 if batch.mirrored else 0)
            firsts[lane] = first * num_labels
        if messages.alpha.shape[0] > 0:
            note_handed(lanes, batch)
        rows.spread(work, at.zero, at.duration - at.zero, 0.0)
        rows.spread(work, at.lowest, LANES, 1.0)
        _read(lanes, batch)
        _backward(lanes, model, batch, messages)
        _close(lanes, model, log_z)
        if at.kept:
            _forward(lanes, model, batch, want, messages, sums)
        for lane in range(count):
            b = sequences[lane]
            sums.log_z[b] = log_z[lane]
            low, high = work[at.lowest + lane], work[at.highest + lane]
            sums.certain[b] = low >= LOW and high <= HIGH
        if at.kept:
            _write_sums(lanes, model, count, want, sums)
        task = take(queue)

"""Segmentations drawn from their distribution, by duration.

As in `flash_semicrf.streaming.cpu.static.sampling`, but what arrives at a segment depends on its
duration,

    gamma_s(k, c) = LSE_{c'} [alpha_s(c') + A_k[c', c]]

and is summed up anew for every duration that a walk looks at: cost about k·C per segment. With a
duration tail durations go on beyond K, with the transitions of K.
"""

from __future__ import annotations

import math

import numpy as np

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import in_float64
from flash_semicrf.streaming.cpu.by_duration.attached import moved, spanned
from flash_semicrf.streaming.cpu.by_duration.batch import batch_of
from flash_semicrf.streaming.cpu.by_duration.model import (
    model_of,
    sequence_of,
    sequences_of,
    transition_place,
)
from flash_semicrf.streaming.cpu.by_duration.tail import reach
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.parts import helper, inlined
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.walks import NEGLIGIBLE, draw, sample_walks
from flash_semicrf.streaming.windows import Forward

__all__ = ["sample", "sample_from"]


@helper
def _arrival(attached, alpha, scores, place, position, label):
    """LSE over c' of alpha[c'] and the transition at `position`, in column `place` of `scores`."""
    width = scores.shape[0] // alpha.shape[0]
    top = -math.inf
    for c in range(alpha.shape[0]):
        into = moved(attached, position, c, label, scores[c * width + place])
        top = max(top, alpha[c] + into)
    if not top > NEG_INF:
        return -math.inf
    total = 0.0
    for c in range(alpha.shape[0]):
        into = moved(attached, position, c, label, scores[c * width + place])
        total += math.exp(alpha[c] + into - top)
    return top + math.log(total)


@helper
def _label(attached, alpha, scores, place, position, following, total, u):
    """Draw a label by alpha(c') and the transition as in `_arrival`, less `total`.

    `following` is the label after it.
    """
    width = scores.shape[0] // alpha.shape[0]
    acc = 0.0
    label = -1
    for c in range(alpha.shape[0]):
        x = alpha[c] + moved(attached, position, c, following, scores[c * width + place]) - total
        if x > NEGLIGIBLE or (label < 0 and x > NEG_INF):
            acc += math.exp(x)
            label = c
            if acc > u:
                break
    return label


@inlined
def _duration(sequence, alpha, offsets, model, stop, label, u):
    """Draw the duration of the segment that ends before `stop`, and what arrives at it."""
    longest, attached = model.max_duration, sequence.attached
    total = alpha[stop - 1, label]
    if sequence.has_boundary:
        total -= sequence.end[stop - 1, label]
    content = 0.0
    acc = 0.0
    duration = 0
    arriving = -math.inf
    last, rate = reach(model.tail, label, longest, stop)
    for k in range(1, last + 1):
        s = stop - k
        content += sequence.scores[s, label]
        if k > longest:
            content += rate
        if not content > NEG_INF:
            break
        j = label * longest + min(k, longest) - 1
        gamma = 0.0
        x = model.first[j]
        if s > 0:
            place = transition_place(model, label, k)
            gamma = _arrival(attached, alpha[s - 1], model.scores, place, s, label)
            x = gamma + model.bias[j]
        x = spanned(attached, s, min(k, longest), label, x)
        x += content + (offsets[s] - offsets[stop]) - total
        if sequence.has_boundary:
            x += sequence.start[s, label]
        if x > NEGLIGIBLE or (duration == 0 and x > NEG_INF):
            acc += math.exp(x)
            duration = k
            arriving = gamma
            if acc > u:
                break
    return duration, arriving


@kernel
def _run(queue, shares, sequences, model, messages, stream, counts, starts, labels):
    """Task i is the samples (sequence, first, last) in row i of `shares`."""
    alphas, shifts, total = messages
    capacity = starts.shape[2]
    task = take(queue)
    while task >= 0:
        b, first_sample, last_sample = shares[task]
        sequence, alpha, offsets = sequence_of(sequences, b), alphas[b], shifts[b]
        for sample in range(first_sample, last_sample):
            state, increment = stream[0, sample, b], stream[1, sample, b]
            u = draw(state, increment, np.uint64(0))
            stop = sequence.length
            label = _label(None, alpha[stop - 1], model.last, 0, stop, 0, total[b, 1], u)
            count = 0
            while stop > 0:
                u = draw(state, increment, np.uint64(2 * count + 1))
                duration, gamma = _duration(sequence, alpha, offsets, model, stop, label, u)
                stop -= duration
                count += 1
                starts[b, sample, capacity - count] = stop
                labels[b, sample, capacity - count] = label
                if stop > 0:
                    u = draw(state, increment, np.uint64(2 * count))
                    place = transition_place(model, label, duration)
                    given = sequence.attached, alpha[stop - 1], model.scores
                    label = _label(*given, place, stop, label, gamma, u)
            counts[b, sample] = count
        task = take(queue)


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    batch = batch_of(potentials, backward=False)
    rows = batch.messages
    given = (batch.sequences, batch.model, (rows.alpha, rows.forward, rows.total))
    return sample_walks(potentials, num_samples, seed, rows.total[:, 1], _run, given)


def sample_from(p: Potentials, forward: Forward, num_samples: int, seed: int) -> SegmentTable:
    """Draw from messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    double = in_float64(p)
    offsets = np.zeros((p.batch_size, p.num_positions + 1))
    log_z = forward.log_z.numpy()
    messages = (forward.alpha.numpy(), offsets, np.stack([np.zeros_like(log_z), log_z], 1))
    given = (sequences_of(double), model_of(double), messages)
    return sample_walks(p, num_samples, seed, log_z, _run, given)

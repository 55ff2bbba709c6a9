"""Hessian-vector products of log Z for static transitions: those of a whole batch.

Messages and expected counts first, as for a gradient; then the derivatives of both directions'
messages, each pass a task; then the correlations of every chunk of every sequence, and the counts
of a duration tail, a sequence a task.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.batches import (
    boundary_products,
    counted_chunks,
    sum_of_chunks,
)
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.parameters import array_of, boundary_arrays, cost_of, padded_labels
from flash_semicrf.streaming.cpu.parts import inlined_owning
from flash_semicrf.streaming.cpu.static.batch import chunks_of, gradients_of_rows, message_rows
from flash_semicrf.streaming.cpu.static.records import Batch, Rows, messages_of, sequence_of
from flash_semicrf.streaming.cpu.static.tangent_blocks import Sweep
from flash_semicrf.streaming.cpu.static.tangent_gradient import duration_tangent, transition_tangent
from flash_semicrf.streaming.cpu.static.tangent_passes import Change, Output, tangent_pass
from flash_semicrf.streaming.cpu.static.tangent_tail import tail_tangent
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.vector import TILE
from flash_semicrf.streaming.cpu.windows import windows_of
from flash_semicrf.streaming.windows import Changes, Tangents

__all__ = ["tangents", "tangents_of_pieces"]


class Direction(NamedTuple):
    """The direction's parameters as kernels read them.

    Attributes
    ----------
    scores, start_scores, end_scores : arrays of shape (B, T, C)
        The latter two (B, 1, 1) zeros when neither is given.
    has_boundary : bool
    lengths : int64 array of shape (B,)
    window, forward, backward : Change
    tail : array of shape (C,)
        Zeros without one.
    """

    scores: np.ndarray
    start_scores: np.ndarray
    end_scores: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    window: Change
    forward: Change
    backward: Change
    tail: np.ndarray


class Derivatives(NamedTuple):
    """Derivatives of the messages, arrays of shape (B, T, C); rows as those of messages.

    `longer` is that of the forward pass, (B, 0, 0) without a tail.
    """

    alpha: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eta: np.ndarray
    longer: np.ndarray


def _direction_of(direction: Potentials, batch: NamedTuple) -> Direction:
    scores = array_of(direction.scores)
    has_boundary, start, end = boundary_arrays(direction, scores)
    by_duration = array_of(direction.duration_bias).T
    num_labels, max_duration = by_duration.shape
    bias = np.zeros((num_labels, max_duration + 1))
    bias[:, 1:] = by_duration
    window = np.zeros((num_labels, max_duration + 3 * TILE))
    window[:, TILE + 1 : TILE + 1 + max_duration] = by_duration
    forward = array_of(direction.transition)
    both = []
    for matrix, weights in (
        (forward, batch.forward.weights),
        (np.ascontiguousarray(forward.T), batch.backward.weights),
    ):
        padded = np.zeros((num_labels, padded_labels(num_labels)))
        padded[:, :num_labels] = matrix
        both.append(Change(matrix, padded.ravel() * weights))
    tail = np.zeros(num_labels)
    if direction.duration_tail is not None:
        tail = array_of(direction.duration_tail)
    durations = Change(bias, window.ravel() * batch.window.weights)
    return Direction(scores, start, end, has_boundary, batch.lengths, durations, *both, tail)


@inlined_owning
def _sweep_of(batch, rows, direction, derivatives, b, backward):
    """Sequence b in the direction of a pass."""
    sequence = sequence_of(batch, b, backward)
    change = sequence_of(direction, b, backward)
    return Sweep(
        sequence.scores,
        sequence.opening,
        sequence.closing,
        sequence.has_boundary,
        change.scores,
        change.opening,
        change.closing,
        change.has_boundary,
        rows.beta[b] if backward else rows.gamma[b],
        rows.gamma[b] if backward else rows.beta[b],
        derivatives.beta[b] if backward else derivatives.gamma[b],
        derivatives.gamma[b] if backward else derivatives.beta[b],
        rows.backward[b] if backward else rows.forward[b],
        rows.forward[b] if backward else rows.backward[b],
        sequence.length,
        backward,
        rows.total[b, 0],
        rows.total[b, 1],
    )


@kernel
def _run_passes(queue, batch, rows, direction, derivatives):
    """Tasks 2b and 2b + 1 are the forward and the backward pass of sequence b."""
    unwanted = np.zeros((0, 0))
    task = take(queue)
    while task >= 0:
        b = task // 2
        backward = task % 2 == 1
        sweep = _sweep_of(batch, rows, direction, derivatives, b, backward)
        transition = batch.backward if backward else batch.forward
        d_transition = direction.backward if backward else direction.forward
        output = Output(
            rows.eta[b] if backward else rows.alpha[b],
            derivatives.eta[b] if backward else derivatives.alpha[b],
            rows.longer_back[b] if backward else rows.longer[b],
            unwanted if backward else derivatives.longer[b],
        )
        window, d_window = batch.window, direction.window
        tail, d_tail = batch.window.tail, direction.tail
        tangent_pass(sweep, window, d_window, transition, d_transition, tail, d_tail, output)
        task = take(queue)


@kernel
def _run_tails(queue, batch, rows, direction, derivatives, mean, segments, beyond):
    b = take(queue)
    while b >= 0:
        sweep = _sweep_of(batch, rows, direction, derivatives, b, False)
        tails = (rows.longer[b], derivatives.longer[b], batch.window.tail, direction.tail)
        tail_tangent(sweep, tails, mean[b], segments[b], beyond[b])
        b = take(queue)


@kernel
def _run_gradients(queue, chunks, batch, rows, direction, derivatives, mean, wanted, sums):
    """Task i is the chunk (sequence, begin, stop) in row i of `chunks`."""
    duration, transition = sums
    task = take(queue)
    while task >= 0:
        b, begin, stop = chunks[task]
        if wanted[0]:
            sweep = _sweep_of(batch, rows, direction, derivatives, b, False)
            changes = direction.window.scores
            duration_tangent(sweep, batch.window, changes, mean[b], begin, stop, duration[task])
        if wanted[1]:
            changes = (derivatives.alpha[b], derivatives.eta[b], mean[b])
            scores, gradient = batch.forward.scores, transition[task]
            messages = messages_of(batch, rows, b)
            transition_tangent(messages, changes, begin, stop, scores, gradient)
        task = take(queue)


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log Z, its derivative and that of its gradient.

    See `flash_semicrf.streaming.dispatch.Backend`. Everything is float64.
    """
    batch, rows = message_rows(potentials, 2)
    return _tangents_of_rows(potentials, direction, wanted, (batch, rows))[:3]


def tangents_of_pieces(
    p: Potentials, direction: Potentials, wanted: set[str], core: Tensor
) -> Tangents:
    """Derivatives and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    batch, rows = message_rows(p, 2)
    windows = windows_of(rows, p, core)
    *found, changes = _tangents_of_rows(p, direction, wanted, (batch, rows), array_of(core))
    return Tangents(*found, windows, changes)


def _tangents_of_rows(
    p: Potentials,
    direction: Potentials,
    wanted: set[str],
    passes: tuple[Batch, Rows],
    core: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Changes]:
    """`tangents` from the messages, and the derivatives of these.

    With `core` (B, 2), those of the parameters that sequences share are of the segments that end in
    these positions, and of the boundaries before them.
    """
    batch, rows = passes
    needed = {"start_scores", "end_scores", *(wanted & {"duration_bias", "transition"})}
    # Counts of durations 1..K: those of the longer ones are differentiated whole.
    log_z, counts = gradients_of_rows(p.replace(duration_tail=None), batch, rows, needed, core)
    towards = _direction_of(direction, batch)
    derivatives = Derivatives(*np.zeros((4, *batch.scores.shape)), np.empty(rows.longer.shape))
    alive = np.flatnonzero(rows.total[:, 1] > -np.inf)
    last = array_of(p.lengths) - 1
    derivatives.gamma[:, 0] = array_of(direction.initial_scores)
    if direction.final_scores is not None:
        derivatives.beta[np.arange(len(last)), last] = array_of(direction.final_scores)
    tasks = np.sort(np.concatenate([2 * alive, 2 * alive + 1]))
    costs = np.repeat(batch.lengths[alive], 2) * cost_of(p)
    threads.run(_run_passes, tasks, costs, (batch, rows, towards, derivatives))
    # Better than <direction, counts>, which multiplies large scores with rounded counts.
    final = (np.arange(len(last)), last)
    weight = counts["end_scores"].numpy()[final]
    means = (weight * (derivatives.alpha + derivatives.beta)[final]).sum(1)
    means /= np.where(weight.sum(1) > 0, weight.sum(1), 1.0)

    want = np.array(["duration_bias" in wanted, "transition" in wanted])
    chunks = chunks_of(batch.lengths, rows.total[:, 1], core)
    chunks = chunks[counted_chunks(chunks, core)]
    duration = np.zeros((len(chunks), *(p.duration_bias.shape if want[0] else (1, 1))))
    transition = np.zeros((len(chunks), *(p.transition.shape if want[1] else (1, 1))))
    if len(chunks) and want.any():
        costs = (chunks[:, 2] - chunks[:, 1]) * cost_of(p)
        given = (chunks, batch, rows, towards, derivatives, means, want, (duration, transition))
        threads.run(_run_gradients, np.arange(len(chunks)), costs, given)
    d, level = derivatives, means[:, None, None]
    start = counts["start_scores"].numpy() * (d.gamma + d.eta - level)
    end = counts["end_scores"].numpy() * (d.alpha + d.beta - level)
    found = boundary_products(start, end, array_of(p.lengths), wanted)
    found["initial_scores"] = start[:, 0].copy()
    for name, parts in (("duration_bias", duration), ("transition", transition)):
        if name in wanted:
            found[name] = counts[name].numpy() * array_of(getattr(direction, name))
            found[name] += sum_of_chunks(parts, chunks, p.batch_size)
    if p.duration_tail is not None and wanted & {"duration_bias", "duration_tail"}:
        segments, found["duration_tail"] = np.zeros((2, p.batch_size, p.num_labels))
        sums = (means, segments, found["duration_tail"])
        costs = batch.lengths[alive] * cost_of(p)
        threads.run(_run_tails, alive, costs, (batch, rows, towards, derivatives, *sums))
        if "duration_bias" in wanted:
            found["duration_bias"][:, -1] += segments
    tensors = {name: torch.from_numpy(found[name]) for name in wanted}
    left_out = log_z.new_zeros((p.batch_size, 2))
    changes = torch.from_numpy(derivatives.alpha), torch.from_numpy(derivatives.beta)
    changes = Changes(counts["end_scores"], *changes, left_out)
    return log_z, torch.from_numpy(means), tensors, changes

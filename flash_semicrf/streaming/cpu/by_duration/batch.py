"""Log Z and its gradients by duration: the passes and gradients of a whole batch.

The kernels each work on one sequence; here they are given to threads: both directions of every
sequence first, then every chunk of every sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.assembly import in_float64
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.batches import (
    boundary_products,
    chunk_bounds,
    counted_chunks,
    sum_of_chunks,
    whole_messages,
)
from flash_semicrf.streaming.cpu.by_duration.attached import attached_like, attached_of
from flash_semicrf.streaming.cpu.by_duration.gradient import Sums, segment_gradient
from flash_semicrf.streaming.cpu.by_duration.model import (
    Messages,
    Model,
    Sequence,
    Weights,
    labels_and_durations,
    messages_of,
    model_of,
    sequence_of,
    sequences_of,
    weights_of,
)
from flash_semicrf.streaming.cpu.by_duration.passes import backward_pass, forward_pass
from flash_semicrf.streaming.cpu.jit import kernel_of_loops
from flash_semicrf.streaming.cpu.parameters import cost_of, forbid
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.windows import forward_windows, windows_of
from flash_semicrf.streaming.windows import Forward, Windows

__all__ = [
    "Batch",
    "batch_of",
    "forward",
    "gradients",
    "gradients_of",
    "gradients_of_pieces",
    "in_lanes",
    "log_partition",
    "log_partition_of_pieces",
    "messages",
]

_TASKS = 8  # chunks of a batch, at least: each has a (K, C, C) gradient of its own
_CHUNK = 256  # positions of a chunk, at least: it starts with a window of K


class Batch(NamedTuple):
    """A problem as the kernels read it, and its messages."""

    sequences: Sequence
    model: Model
    weights: Weights | None  # None with scores of segments or of transitions by position
    messages: Messages


@kernel_of_loops
def _run_passes(queue, sequences, model, weights, rows, keep):
    """Tasks 2b and 2b + 1 are the forward and the backward pass of sequence b."""
    task = take(queue)
    while task >= 0:
        sequence, messages = sequence_of(sequences, task // 2), messages_of(rows, task // 2)
        if task % 2 == 0:
            forward_pass(sequence, model, weights, messages, keep)
        else:
            backward_pass(sequence, model, weights, messages)
        task = take(queue)


@kernel_of_loops
def _run_gradients(queue, sequences, model, weights, rows, chunks, sums):
    """Task i is the chunk (sequence, begin, stop) in row i of `chunks`."""
    task = take(queue)
    while task >= 0:
        b, begin, stop = chunks[task]
        sequence, messages = sequence_of(sequences, b), messages_of(rows, b)
        counts = sums.duration[task], sums.transition[task], sums.beyond[task]
        own = Sums(sums.start[b], sums.end[b], *counts, attached_of(sums.attached, b))
        segment_gradient(sequence, messages, model, weights, begin, stop, own)
        task = take(queue)


def batch_of(p: Potentials, keep: bool = True, backward: bool = True) -> Batch:
    """A batch after its passes: without `keep` log Z alone, without `backward` one direction."""
    double = in_float64(p)  # what kernels compile for: they take too long to do it twice
    model = model_of(double)
    shape = (p.batch_size, p.num_positions, p.num_labels) if keep else (p.batch_size, 1, 1)
    offsets = np.empty((2, p.batch_size, p.num_positions + 1 if keep else 1))
    size = p.num_positions * p.num_labels if keep and p.duration_tail is not None else 1
    tails, total = np.empty((2, p.batch_size, size)), np.empty((p.batch_size, 2))
    messages = Messages(np.empty(shape), np.empty(shape), *offsets, *tails, total)
    sequences = sequences_of(double)
    weights = weights_of(model) if sequences.attached is None else None
    batch = Batch(sequences, model, weights, messages)
    tasks = np.arange(0, 2 * p.batch_size, 1 if backward else 2)
    threads.run(_run_passes, tasks, batch.sequences.length[tasks // 2] * cost_of(p), (*batch, keep))
    return batch


def log_partition(potentials: Potentials) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per thread."""
    batch = batch_of(potentials, keep=False, backward=False)
    return torch.from_numpy(batch.messages.total.sum(1))


def in_lanes(p: Potentials) -> bool:
    """False: there are no kernels for eight sequences at a time."""
    return False


def log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    """Log Z and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    rows = batch_of(p, backward=False).messages
    return torch.from_numpy(rows.total.sum(1)), forward_windows(rows.alpha, rows.forward, p, core)


def forward(p: Potentials) -> Forward:
    """Messages as `sample_from` takes them."""
    rows = batch_of(p, backward=False).messages
    alpha, offsets = torch.from_numpy(rows.alpha), torch.from_numpy(rows.forward)
    alpha += offsets[:, 1:, None]
    return Forward(torch.from_numpy(rows.total.sum(1)), alpha, None)


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients, windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    batch = batch_of(p)
    windows = windows_of(batch.messages, p, core)
    return (*gradients_of(p, batch, wanted, core.numpy()), windows)


def messages(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha and beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    batch = batch_of(potentials)
    return whole_messages(batch.messages, batch.sequences.length)


def gradients(potentials: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradients; see `flash_semicrf.streaming.dispatch.Backend`.

    All in float64, but for those by scores of segments and of transitions by position.
    """
    return gradients_of(potentials, batch_of(potentials), wanted)


def gradients_of(
    p: Potentials, batch: Batch, wanted: set[str], core: np.ndarray | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`gradients`, from the messages.

    With `core` (B, 2), those of the parameters that sequences share are of the segments that end in
    these positions.
    """
    log_z, lengths = batch.messages.total, batch.sequences.length
    chunks = _chunks(lengths, log_z[:, 1], core)
    number, step, transitions = len(chunks), batch.model.step, len(batch.model.scores)
    attached = attached_like(p, wanted)
    sums = Sums(
        *np.zeros((2, *batch.sequences.scores.shape)),
        np.zeros((number, len(batch.model.bias))),
        np.zeros((number, transitions if "transition" in wanted else 1)),
        np.zeros((number, p.num_labels)),
        attached,
    )
    costs = (chunks[:, 2] - chunks[:, 1]) * cost_of(p)
    threads.run(_run_gradients, np.arange(number), costs, (*batch, chunks, sums))
    np.minimum(sums.start, 1.0, out=sums.start)
    found = boundary_products(sums.start, sums.end, lengths, wanted)
    if "scores" in wanted:
        np.clip(found["scores"], 0.0, 1.0, out=found["scores"])
    found["initial_scores"] = sums.start[:, 0]
    if "initial_scores" in wanted and p.initial_scores is not None and p.initial_scores.dim() == 2:
        found["initial_scores"] = _first_segments(batch)
    counted = counted_chunks(chunks, core)
    chunks = chunks[counted]
    sizes = (p.max_duration, p.num_labels)
    most = lengths[:, None, None] / np.arange(1, p.max_duration + 1)[:, None]
    if "duration_bias" in wanted:
        total = sum_of_chunks(sums.duration[counted], chunks, p.batch_size)
        found["duration_bias"] = np.minimum(labels_and_durations(total, *sizes), most)
    if "duration_tail" in wanted:
        found["duration_tail"] = sum_of_chunks(sums.beyond[counted], chunks, p.batch_size)
    if "transition" in wanted:
        rows = sum_of_chunks(sums.transition[counted], chunks, p.batch_size)
        rows = rows.reshape(p.batch_size, p.num_labels, -1)
        pairs = labels_and_durations(rows, step, p.num_labels).swapaxes(1, 2)
        pairs = np.minimum(pairs, most[:, :step, :, None])
        found["transition"] = pairs.reshape(p.batch_size, *p.transition.shape)
    if attached is not None:
        found["segment_scores"], found["transition_scores"] = attached.spans, attached.moves
    return torch.from_numpy(log_z.sum(1)), {n: torch.from_numpy(found[n]) for n in wanted}


def _first_segments(batch: Batch) -> np.ndarray:
    """P(the first segment has duration k and label c), (B, K, C); row K with the longer ones."""
    sequences, model, rows = batch.sequences, batch.model, batch.messages
    batch_size, _, num_labels = sequences.scores.shape
    found = np.zeros((batch_size, model.max_duration, num_labels))
    scores = labels_and_durations(model.first, model.max_duration, num_labels)
    for b in np.flatnonzero(rows.total[:, 1] > -np.inf):
        length = sequences.length[b]
        n = min(model.max_duration, length)
        x = scores[:n] + forbid(sequences.scores[b, :n]).cumsum(0) + rows.beta[b, :n]
        if sequences.has_boundary:
            x = x + forbid(sequences.start[b, :1]) + forbid(sequences.end[b, :n])
        spans = np.zeros((n, num_labels))
        if sequences.attached is not None and sequences.attached.has_spans:
            spans = forbid(sequences.attached.spans[b, 0, :n])
        x = x + spans
        offsets = rows.backward[b, length - np.arange(1, n + 1)] - rows.total[b, 0]
        x += offsets[:, None]
        if model.tail is not None and n == model.max_duration:
            x[-1] = scores[-1] + rows.rest[b, :num_labels] + spans[-1]
            if sequences.has_boundary:
                x[-1] += forbid(sequences.start[b, 0])
            x[-1] += rows.backward[b, length - 1] - rows.total[b, 0]
        found[b, :n] = np.exp(np.minimum(x - rows.total[b, 1], 0.0))
    return found


def _chunks(lengths: np.ndarray, log_z: np.ndarray, core: np.ndarray | None = None) -> np.ndarray:
    """(sequence, begin, stop) of every task; none for infeasible sequences, none across a bound of
    its sequence's core (B, 2)."""
    pieces = max(1, _TASKS // len(lengths))
    chunks = []
    for b in np.flatnonzero(log_z > -np.inf):
        step = max(_CHUNK, -(-lengths[b] // pieces))
        bounds = chunk_bounds(lengths[b], step, () if core is None else core[b])
        chunks += [(b, *bound) for bound in bounds]
    return np.array(chunks, dtype=np.int64).reshape(-1, 3)

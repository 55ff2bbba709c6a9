"""Log Z and its gradients for transitions by duration: the passes and gradients of a whole batch.

The kernels each work on one sequence; here they are given to threads: both directions of every
sequence first, then every chunk of every sequence. Decoding is in
`flash_semicrf.streaming.cpu.by_duration.viterbi`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu import pool
from flash_semicrf.streaming.cpu.by_duration.gradient import (
    Messages,
    Sums,
    end_marginals,
    segment_gradient,
)
from flash_semicrf.streaming.cpu.by_duration.parameters import (
    Arrivals,
    Weights,
    arrivals_of,
    labels_and_durations,
    weights_of,
)
from flash_semicrf.streaming.cpu.by_duration.passes import backward_pass, forward_pass
from flash_semicrf.streaming.cpu.by_duration.viterbi import max_messages, viterbi
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, end_term, forbid
from flash_semicrf.streaming.cpu.static.batch import boundary_arrays, sum_of_chunks, whole_messages
from flash_semicrf.streaming.cpu.tasks import take

__all__ = [
    "first_segments",
    "forward_messages",
    "gradients",
    "gradients_of_rows",
    "log_partition",
    "max_messages",
    "message_rows",
    "messages",
    "viterbi",
]

_TASKS = 8  # chunks of a batch, at least: each has a (K, C, C) gradient of its own
_CHUNK = 256  # positions of a chunk, at least: it starts with a window of K


class _Batch(NamedTuple):
    """The arrays of a batch that kernels read."""

    scores: np.ndarray  # (B, T, C)
    start_scores: np.ndarray  # (B, T, C), or (B, 1, 1) zeros without boundary scores
    end_scores: np.ndarray
    has_boundary: bool
    free_start: bool
    lengths: np.ndarray  # (B,)
    last: np.ndarray  # (C,)
    arrivals: Arrivals
    weights: Weights


class _Rows(NamedTuple):
    """Messages of a batch; see `flash_semicrf.streaming.cpu.by_duration.gradient.Messages`."""

    alpha: np.ndarray  # (B, T, C)
    beta: np.ndarray
    forward: np.ndarray  # (B, T + 1)
    backward: np.ndarray
    rest: np.ndarray  # (B, T * C), or (B, 1) without a tail
    further: np.ndarray
    total: np.ndarray  # (B, 2): log Z = total.sum(1)


def _batch_of(p: Potentials) -> _Batch:
    p = p.to(torch.float64)  # what kernels compile for: they take too long to do it twice
    scores = array_of(p.scores)
    has_boundary, start, end = boundary_arrays(p, scores)
    arrivals = arrivals_of(p)
    return _Batch(
        scores, start, end, has_boundary, p.initial_scores is None, array_of(p.lengths),
        end_term(p), arrivals, weights_of(arrivals),
    )  # fmt: skip


def _empty_rows(p: Potentials, keep: bool) -> _Rows:
    shape = (p.batch_size, p.num_positions, p.num_labels) if keep else (p.batch_size, 1, 1)
    offsets = np.empty((2, p.batch_size, p.num_positions + 1 if keep else 1))
    size = p.num_positions * p.num_labels if keep and p.duration_tail is not None else 1
    tails = np.empty((2, p.batch_size, size))
    return _Rows(np.empty(shape), np.empty(shape), *offsets, *tails, np.empty((p.batch_size, 2)))


@kernel
def _run_passes(queue, batch, rows, keep):
    """Tasks 2b and 2b + 1 are the forward and the backward pass of sequence b."""
    task = take(queue)
    while task >= 0:
        b = task // 2
        if task % 2 == 0:
            offset, value = forward_pass(
                batch.scores[b], batch.start_scores[b], batch.end_scores[b], batch.has_boundary,
                batch.lengths[b], batch.last, batch.arrivals, batch.weights,
                keep, rows.alpha[b], rows.forward[b],
            )  # fmt: skip
            rows.total[b, 0] = offset
            rows.total[b, 1] = value
        else:
            backward_pass(
                batch.scores[b], batch.start_scores[b], batch.end_scores[b], batch.has_boundary,
                batch.lengths[b], batch.last, batch.arrivals, batch.weights,
                rows.beta[b], rows.backward[b], rows.rest[b], rows.further[b],
            )  # fmt: skip
        task = take(queue)


@kernel
def _run_gradients(
    queue, chunks, batch, rows, want_transition, start, end, duration, transition, beyond
):
    """Task i is the chunk (sequence, begin, stop) in row i of `chunks`."""
    task = take(queue)
    while task >= 0:
        b, begin, stop = chunks[task]
        messages = Messages(
            rows.alpha[b], rows.beta[b], rows.forward[b], rows.backward[b], rows.rest[b],
            rows.further[b], batch.lengths[b], rows.total[b, 0], rows.total[b, 1],
        )  # fmt: skip
        sums = Sums(start[b], duration[task], transition[task], beyond[task], want_transition)
        segment_gradient(
            messages, begin, stop, batch.scores[b], batch.start_scores[b], batch.end_scores[b],
            batch.has_boundary, batch.free_start, batch.arrivals, batch.weights, sums,
        )  # fmt: skip
        end_marginals(messages, begin, stop, end[b])
        task = take(queue)


def log_partition(potentials: Potentials) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per thread."""
    batch = _batch_of(potentials)
    rows = _empty_rows(potentials, keep=False)
    _run_forward(potentials, batch, rows, False)
    return torch.from_numpy(rows.total.sum(1))


def forward_messages(potentials: Potentials) -> tuple[_Batch, _Rows]:
    """The batch as kernels read it, and the messages of its forward pass alone."""
    batch = _batch_of(potentials)
    rows = _empty_rows(potentials, keep=True)
    _run_forward(potentials, batch, rows, True)
    return batch, rows


def _run_forward(potentials: Potentials, batch: _Batch, rows: _Rows, keep: bool) -> None:
    """Run the forward passes."""
    costs = batch.lengths * cost_of(potentials)
    pool.run(_run_passes, 2 * np.arange(len(costs)), costs, (batch, rows, keep))


def message_rows(potentials: Potentials) -> tuple[_Batch, _Rows]:
    """What the kernels read, and the messages of both passes."""
    batch = _batch_of(potentials)
    rows = _empty_rows(potentials, keep=True)
    costs = np.repeat(batch.lengths, 2) * cost_of(potentials)
    pool.run(_run_passes, np.arange(len(costs)), costs, (batch, rows, True))
    return batch, rows


def messages(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha and beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    _, rows = message_rows(potentials)
    return whole_messages(rows, array_of(potentials.lengths))


def gradients(potentials: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradient for each sequence.

    Parameters
    ----------
    potentials : Potentials
    wanted : set of str
        Names of parameters; "start_scores" and "end_scores" may be asked for without being given,
        since their gradients are the boundary marginals.

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
    gradients : dict of Tensor
        Of "scores", "start_scores" and "end_scores": (B, T, C) in the dtype of the scores. Of the
        others: a float64 gradient per sequence, (B, ...). All zero where log Z is -inf.
    """
    return gradients_of_rows(potentials, *message_rows(potentials), wanted)


def gradients_of_rows(
    p: Potentials, batch: _Batch, rows: _Rows, wanted: set[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `gradients` returns, from the messages."""
    chunks = _chunks(batch.lengths, rows.total[:, 1])
    want_transition = "transition" in wanted
    start, end = np.zeros((2, *batch.scores.shape))
    row_size = len(batch.arrivals.bias)
    duration = np.zeros((len(chunks), row_size))
    transition = np.zeros((len(chunks), row_size * p.num_labels if want_transition else 1))
    beyond = np.zeros((len(chunks), p.num_labels))
    sums = (start, end, duration, transition, beyond)
    costs = (chunks[:, 2] - chunks[:, 1]) * cost_of(p)
    pool.run(
        _run_gradients, np.arange(len(chunks)), costs, (chunks, batch, rows, want_transition, *sums)
    )
    found = _collect(p, wanted, chunks, start, end, duration, transition, beyond)
    if "initial_scores" in wanted and p.initial_scores is not None and p.initial_scores.dim() == 2:
        found["initial_scores"] = torch.from_numpy(first_segments(batch, rows, p.max_duration))
    return torch.from_numpy(rows.total.sum(1)), found


def first_segments(batch: _Batch, rows: _Rows, max_duration: int) -> np.ndarray:
    """P(the first segment has duration k and label c), (B, K, C); row K with the longer ones."""
    batch_size, _, num_labels = batch.scores.shape
    found = np.zeros((batch_size, max_duration, num_labels))
    scores = labels_and_durations(batch.arrivals.first, max_duration, num_labels)
    for b in np.flatnonzero(rows.total[:, 1] > -np.inf):
        length = batch.lengths[b]
        n = min(max_duration, length)
        x = scores[:n] + forbid(batch.scores[b, :n]).cumsum(0) + rows.beta[b, :n]
        if batch.has_boundary:
            x = x + forbid(batch.start_scores[b, :1]) + forbid(batch.end_scores[b, :n])
        offsets = rows.backward[b, length - np.arange(1, n + 1)] - rows.total[b, 0]
        x += offsets[:, None]
        if batch.arrivals.tail is not None and n == max_duration:
            x[-1] = scores[-1] + rows.rest[b, :num_labels]
            if batch.has_boundary:
                x[-1] += forbid(batch.start_scores[b, 0])
            x[-1] += rows.backward[b, length - 1] - rows.total[b, 0]
        found[b, :n] = np.exp(np.minimum(x - rows.total[b, 1], 0.0))
    return found


def _chunks(lengths: np.ndarray, log_z: np.ndarray) -> np.ndarray:
    """(sequence, begin, stop) of every task; none for infeasible sequences."""
    pieces = max(1, _TASKS // len(lengths))
    chunks = []
    for b in np.flatnonzero(log_z > -np.inf):
        step = max(_CHUNK, -(-lengths[b] // pieces))
        begins = range(0, lengths[b], step)
        chunks += [(b, begin, min(begin + step, lengths[b])) for begin in begins]
    return np.array(chunks, dtype=np.int64).reshape(-1, 3)


def _collect(
    p: Potentials,
    wanted: set[str],
    chunks: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    duration: np.ndarray,
    transition: np.ndarray,
    beyond: np.ndarray,
) -> dict[str, Tensor]:
    """Gradients of the wanted parameters from the marginals and the sums of each chunk."""
    lengths = array_of(p.lengths)
    np.minimum(start, 1.0, out=start)
    found = {
        "start_scores": start,
        "end_scores": end,
        "initial_scores": start[:, 0],
        "final_scores": end[np.arange(p.batch_size), lengths - 1],
    }
    if "scores" in wanted:
        inside = start.copy()
        inside[:, 1:] -= end[:, :-1]
        np.clip(np.cumsum(inside, 1, out=inside), 0.0, 1.0, out=inside)
        inside[np.arange(p.num_positions) >= lengths[:, None]] = 0.0
        found["scores"] = inside
    sizes = (p.max_duration, p.num_labels)
    most = lengths[:, None, None] / np.arange(1, p.max_duration + 1)[:, None]
    if "duration_bias" in wanted:
        total = sum_of_chunks(duration, chunks, p.batch_size)
        found["duration_bias"] = np.minimum(labels_and_durations(total, *sizes), most)
    if "duration_tail" in wanted:
        found["duration_tail"] = sum_of_chunks(beyond, chunks, p.batch_size)
    if "transition" in wanted:
        rows = sum_of_chunks(transition, chunks, p.batch_size)
        rows = rows.reshape(p.batch_size, p.num_labels, -1)
        pairs = labels_and_durations(rows, *sizes).swapaxes(1, 2)
        found["transition"] = np.minimum(pairs, most[..., None])
    tensors = {name: torch.from_numpy(found[name]) for name in wanted}
    by_position = {"scores", "start_scores", "end_scores"}
    return {n: v.to(p.dtype) if n in by_position else v for n, v in tensors.items()}

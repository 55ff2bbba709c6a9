"""Log Z and its gradients for static transitions: the passes and gradients of a whole batch.

The kernels each work on one sequence; here they are given to threads: both directions of every
sequence first, then every chunk of every sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.batches import (
    chunk_bounds,
    counted_chunks,
    sum_of_chunks,
    whole_messages,
)
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.lanes import batch as lanes
from flash_semicrf.streaming.cpu.parameters import (
    array_of,
    boundary_arrays,
    cost_of,
    end_term,
    forbid,
    start_term,
    sum_of_sources,
    transition_of,
    window_of,
)
from flash_semicrf.streaming.cpu.static.gradient import (
    CHUNK,
    add_carry,
    boundary_marginals,
    duration_gradient,
    transition_gradient,
)
from flash_semicrf.streaming.cpu.static.passes import message_pass
from flash_semicrf.streaming.cpu.static.records import (
    Batch,
    Output,
    Rows,
    messages_of,
    sequence_of,
)
from flash_semicrf.streaming.cpu.static.tail import tail_gradient
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.windows import forward_windows, windows_of
from flash_semicrf.streaming.windows import Forward, Windows

__all__ = [
    "batch_of",
    "chunks_of",
    "forward",
    "forward_messages",
    "gradients",
    "gradients_of_pieces",
    "gradients_of_rows",
    "in_lanes",
    "log_partition",
    "log_partition_of_pieces",
    "message_rows",
    "messages",
    "rows_of",
]


class _Sums(NamedTuple):
    """Gradients that `_run_gradients` sums up.

    Attributes
    ----------
    position, start, end : arrays of shape (B, T, C)
        The latter two (B, 1, 1) where they are not wanted.
    carry : float64 array of shape (N, C)
        Segments open at the end of each of N chunks.
    duration : float64 array of shape (N, K, C)
    transition : float64 array of shape (N, C, C)
        These two (N, 1, 1) where they are not wanted.
    """

    position: np.ndarray
    start: np.ndarray
    end: np.ndarray
    carry: np.ndarray
    duration: np.ndarray
    transition: np.ndarray


def batch_of(p: Potentials, backward: bool = True) -> Batch:
    """The arrays that kernels read; without `backward` not those of the backward pass."""
    scores = array_of(p.scores)
    has_boundary, start, end = boundary_arrays(p, scores)
    matrix = forbid(array_of(p.transition))
    ways = (matrix, matrix.T) if backward else (matrix,)
    ways = [transition_of(way) for way in ways]
    first = sum_of_sources(ways[0]) if p.initial_scores is None else start_term(p)
    rest = (array_of(p.lengths), first, end_term(p), window_of(p), ways[0], ways[-1])
    return Batch(scores, start, end, has_boundary, *rest)


def _empty_rows(p: Potentials, keep: bool, longer_of: int = 0) -> Rows:
    """Rows for the messages, if they are kept, and for the G of that many of the passes."""
    shape = (p.batch_size, p.num_positions, p.num_labels) if keep else (p.batch_size, 1, 1)
    rows = [np.empty(shape) for _ in range(4)]
    kept = longer_of if p.duration_tail is not None else 0
    longer = [np.empty(shape if i < kept else (p.batch_size, 0, 0)) for i in range(2)]
    offsets = [np.empty((p.batch_size, p.num_positions + 1 if keep else 1)) for _ in range(2)]
    return Rows(*rows, *longer, *offsets, np.empty((p.batch_size, 2)))


@kernel
def _run_passes(queue, batch, rows, keep):
    """Tasks 2b and 2b + 1 are the forward and the backward pass of sequence b."""
    task = take(queue)
    while task >= 0:
        b = task // 2
        # One call for both directions: each one is compiled, and inlined, by itself.
        backward = task % 2 == 1
        first, last = (batch.last, batch.first) if backward else (batch.first, batch.last)
        transition = batch.backward if backward else batch.forward
        outputs, sources = (rows.eta, rows.beta) if backward else (rows.alpha, rows.gamma)
        longer = rows.longer_back if backward else rows.longer
        offsets = rows.backward if backward else rows.forward
        output = Output(keep, outputs[b], sources[b], longer[b], offsets[b])
        sequence = sequence_of(batch, b, backward)
        offset, value = message_pass(sequence, first, last, batch.window, transition, output)
        if not backward:
            rows.total[b, 0] = offset
            rows.total[b, 1] = value
        task = take(queue)


@kernel
def _run_gradients(queue, chunks, batch, rows, free_start, wanted, sums):
    """Task i is the chunk (sequence, begin, stop) in row i of `chunks`."""
    task = take(queue)
    while task >= 0:
        b, begin, stop = chunks[task]
        messages = messages_of(batch, rows, b)
        start, end, carry = sums.start[b], sums.end[b], sums.carry[task]
        boundary_marginals(messages, begin, stop, sums.position[b], start, end, wanted[0], carry)
        if wanted[1]:
            sequence = sequence_of(batch, b, False)
            duration_gradient(messages, begin, stop, sequence, batch.window, sums.duration[task])
        if wanted[2]:
            scores, gradient = batch.forward.scores, sums.transition[task]
            transition_gradient(messages, begin, stop, scores, free_start, gradient)
        task = take(queue)


@kernel
def _run_tails(queue, batch, rows, core, segments, beyond):
    b = take(queue)
    while b >= 0:
        messages, sequence = messages_of(batch, rows, b), sequence_of(batch, b, False)
        longer, tail = rows.longer[b], batch.window.tail
        counted = core[b, 0], core[b, 1]
        tail_gradient(messages, longer, sequence, tail, counted, segments[b], beyond[b])
        b = take(queue)


@kernel
def _run_carries(queue, chunks, position, carry):
    task = take(queue)
    while task >= 0:
        b, begin, stop = chunks[task]
        add_carry(position[b], begin, stop, carry[task])
        task = take(queue)


def log_partition(potentials: Potentials) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per thread."""
    found = lanes.log_partition(potentials, _log_partition)
    return _log_partition(potentials) if found is None else found


def _log_partition(potentials: Potentials) -> Tensor:
    batch = batch_of(potentials, backward=False)
    rows = _empty_rows(potentials, keep=False)
    _run_forward(potentials, batch, rows, False)
    return torch.from_numpy(rows.total.sum(1))


def in_lanes(p: Potentials) -> bool:
    """Whether the pieces of a problem are done eight at a time, as far as it can be seen."""
    return lanes.model_of(p) is not None


def log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    """Log Z and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    found = lanes.log_partition_of_pieces(p, core, _log_partition_of_pieces)
    return _log_partition_of_pieces(p, core) if found is None else found


def _log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    _, rows = forward_messages(p)
    longer = rows.longer if p.duration_tail is not None else None
    windows = forward_windows(rows.alpha, rows.forward, p, core, longer)
    return torch.from_numpy(rows.total.sum(1)), windows


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients, windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    found = lanes.gradients_of_pieces(p, wanted, core, _gradients_of_pieces)
    return _gradients_of_pieces(p, wanted, core) if found is None else found


def _gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    batch, rows = message_rows(p, 2)
    windows = windows_of(rows, p, core)
    return (*gradients_of_rows(p, batch, rows, wanted, array_of(core)), windows)


def forward_messages(potentials: Potentials) -> tuple[Batch, Rows]:
    """The batch as kernels read it, and the messages of its forward pass alone."""
    batch = batch_of(potentials)
    rows = _empty_rows(potentials, keep=True, longer_of=1)
    _run_forward(potentials, batch, rows, True)
    return batch, rows


def forward(p: Potentials) -> Forward:
    """Messages as `sample_from` takes them."""
    _, rows = forward_messages(p)
    alpha, gamma, offsets = map(torch.from_numpy, (rows.alpha, rows.gamma, rows.forward))
    alpha += offsets[:, 1:, None]
    gamma += offsets[:, :-1, None]
    return Forward(torch.from_numpy(rows.total.sum(1)), alpha, gamma)


def rows_of(p: Potentials, found: Forward) -> Rows:
    """Messages of the forward pass in the form in which kernels read them."""
    log_z, alpha, gamma = (x.numpy() for x in found)
    offsets = np.zeros((p.batch_size, p.num_positions + 1))
    total = np.stack([np.zeros_like(log_z), log_z], 1)
    given = {"alpha": alpha, "gamma": gamma, "forward": offsets, "total": total}
    return _empty_rows(p, keep=False)._replace(**given)


def _run_forward(potentials: Potentials, batch: Batch, rows: Rows, keep: bool) -> None:
    """Run the forward passes."""
    costs = batch.lengths * cost_of(potentials)
    threads.run(_run_passes, 2 * np.arange(len(costs)), costs, (batch, rows, keep))


def message_rows(potentials: Potentials, longer_of: int = 0) -> tuple[Batch, Rows]:
    """The batch as kernels read it, and the messages of both passes.

    `longer_of` is 1 to keep, with a duration tail, the G of the forward pass, 2 that of both.
    """
    batch = batch_of(potentials)
    rows = _empty_rows(potentials, True, longer_of)
    costs = np.repeat(batch.lengths, 2) * cost_of(potentials)
    threads.run(_run_passes, np.arange(len(costs)), costs, (batch, rows, True))
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
    found = lanes.gradients(potentials, wanted, _gradients)
    return _gradients(potentials, wanted) if found is None else found


def _gradients(potentials: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    return gradients_of_rows(potentials, *message_rows(potentials, 1), wanted)


def gradients_of_rows(
    p: Potentials, batch: Batch, rows: Rows, wanted: set[str], core: np.ndarray | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradients from the messages; see `gradients`.

    With `core` (B, 2), those of the parameters that sequences share are of the segments that end in
    these positions.
    """
    ends = bool(wanted & {"start_scores", "end_scores", "initial_scores", "final_scores"})
    want = np.array([ends, "duration_bias" in wanted, "transition" in wanted])
    chunks = chunks_of(batch.lengths, rows.total[:, 1], core)
    shape, dtype = batch.scores.shape, batch.scores.dtype
    position = np.zeros(shape, dtype)
    start, end = (np.zeros(shape if ends else (shape[0], 1, 1), dtype) for _ in range(2))
    carry = np.zeros((len(chunks), p.num_labels))
    duration = np.zeros((len(chunks), *(p.duration_bias.shape if want[1] else (1, 1))))
    transition = np.zeros((len(chunks), *(p.transition.shape if want[2] else (1, 1))))
    free_start = p.initial_scores is None
    if len(chunks):
        sums = _Sums(position, start, end, carry, duration, transition)
        costs = (chunks[:, 2] - chunks[:, 1]) * cost_of(p)
        given = (chunks, batch, rows, free_start, want, sums)
        threads.run(_run_gradients, np.arange(len(chunks)), costs, given)
        _complete(chunks, position, carry)

    found = {"scores": position, "start_scores": start, "end_scores": end}
    counted = counted_chunks(chunks, core)
    for name, parts in (("duration_bias", duration), ("transition", transition)):
        if name in wanted:
            found[name] = sum_of_chunks(parts[counted], chunks[counted], p.batch_size)
    if p.duration_tail is not None and wanted & {"duration_bias", "duration_tail"}:
        segments, found["duration_tail"] = _tail_gradients(p, batch, rows, core)
        if "duration_bias" in wanted:
            found["duration_bias"][:, -1] += segments
    if ends:
        found["initial_scores"] = start[:, 0].astype(np.float64)
        found["final_scores"] = end[np.arange(len(end)), batch.lengths - 1].astype(np.float64)
    log_z = torch.from_numpy(rows.total.sum(1))
    return log_z, {name: torch.from_numpy(found[name]) for name in wanted}


def _tail_gradients(
    p: Potentials, batch: Batch, rows: Rows, core: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Expected segments longer than K, and positions beyond the K-th, both (B, C).

    With `core` (B, 2) those of the segments that end in these positions, and these positions.
    """
    if core is None:
        core = np.stack([np.zeros_like(batch.lengths), batch.lengths], 1)
    shape = (len(batch.lengths), batch.scores.shape[2])
    segments, beyond = np.zeros(shape), np.zeros(shape)
    feasible = np.flatnonzero(rows.total[:, 1] > -np.inf)
    costs = batch.lengths[feasible] * cost_of(p)
    threads.run(_run_tails, feasible, costs, (batch, rows, core, segments, beyond))
    return segments, beyond


def chunks_of(lengths: np.ndarray, log_z: np.ndarray, core: np.ndarray | None = None) -> np.ndarray:
    """(sequence, begin, stop) of every task, in order; none for infeasible sequences.

    No chunk contains a bound of its sequence's core (B, 2).
    """
    return np.array(
        [
            (b, begin, stop)
            for b, length in enumerate(lengths)
            if log_z[b] > -np.inf
            for begin, stop in chunk_bounds(length, CHUNK, () if core is None else core[b])
        ],
        dtype=np.int64,
    ).reshape(-1, 3)


def _complete(chunks: np.ndarray, position: np.ndarray, carry: np.ndarray) -> None:
    """Carry the segments open at the end of each chunk into the next."""
    later = np.flatnonzero(chunks[:, 1] > 0)
    if len(later) == 0:
        return
    running = np.cumsum(carry, 0)
    first = np.flatnonzero(chunks[:, 1] == 0)
    before = np.zeros_like(carry)
    before[1:] = running[:-1]
    before -= before[first][np.searchsorted(first, np.arange(len(chunks)), "right") - 1]
    costs = (chunks[later, 2] - chunks[later, 1]) * threads.position_cost(0, position.shape[2])
    threads.run(_run_carries, later, costs, (chunks, position, before))

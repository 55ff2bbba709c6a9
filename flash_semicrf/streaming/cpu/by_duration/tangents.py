"""Hessian-vector products of log Z for transitions by duration: those of a whole batch.

Each sequence is one task: first its backward, then its forward derivatives; see
`flash_semicrf.streaming.cpu.by_duration.tangent_passes`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.batches import boundary_products
from flash_semicrf.streaming.cpu.by_duration.batch import Batch, batch_of, gradients_of
from flash_semicrf.streaming.cpu.by_duration.model import (
    Weights,
    labels_and_durations,
    messages_of,
    rows_of,
    sequence_of,
    sequences_of,
)
from flash_semicrf.streaming.cpu.by_duration.tangent_passes import (
    backward_tangents,
    forward_tangents,
)
from flash_semicrf.streaming.cpu.jit import kernel_of_loops
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, padded_labels
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.cpu.windows import windows_of
from flash_semicrf.streaming.windows import Changes, Tangents

__all__ = ["tangents", "tangents_of_pieces"]


class Tangent(NamedTuple):
    """Direction of a sequence's positions, and derivatives; of a batch, with a leading axis."""

    scores: np.ndarray  # as in `Sequence`
    start: np.ndarray
    end: np.ndarray
    has_boundary: bool
    alpha: np.ndarray  # (T, C) derivatives of the messages
    beta: np.ndarray  # its last row starts as that of the final scores
    rest: np.ndarray  # (T * C,) row s: of what may follow K positions from s; unused without a tail


class Slopes(NamedTuple):
    """Direction of the shared parameters."""

    bias: np.ndarray  # (R,) derivative of D
    first: np.ndarray  # (R,) of the first segment's term
    scores: np.ndarray  # (C * R,) of A, a row for each c'
    forward: np.ndarray  # times `Weights.forward`
    backward: np.ndarray  # times `Weights.backward`
    tail: np.ndarray  # (C,) zeros without a tail


class Totals(NamedTuple):
    """Derivatives of a sequence's expected counts; of a batch, with a leading axis."""

    start: np.ndarray  # (T, C)
    duration: np.ndarray  # (R,) of all segments
    first: np.ndarray  # (R,) of first segments
    # (C * R,), or (1,) if not wanted: their sum is that of transitions, less dA times the count;
    # the former still lacks the factor `Weights.forward`.
    transition: np.ndarray
    direct: np.ndarray
    beyond: np.ndarray  # (C,) of positions beyond the K-th


def _slopes_of(direction: Potentials, weights: Weights) -> Slopes:
    by_duration = array_of(direction.transition).swapaxes(0, 1)  # (C_src, K, C_dst)
    scores = rows_of(by_duration, 0.0)
    columns = np.zeros((scores.shape[1], padded_labels(len(scores))))
    columns[:, : len(scores)] = scores.T
    bias = array_of(direction.duration_bias)
    first = np.broadcast_to(array_of(direction.initial_scores), bias.shape)
    rows, scores = (rows_of(bias, 0.0), rows_of(first, 0.0)), scores.ravel()
    products = scores * weights.forward, columns.ravel() * weights.backward
    tail = direction.duration_tail
    tail = np.zeros(direction.num_labels) if tail is None else array_of(tail)
    return Slopes(*rows, scores, *products, tail)


@kernel_of_loops
def _run(queue, sequences, model, weights, rows, slopes, directions, core, found, means):
    b = take(queue)
    while b >= 0:
        sequence, messages = sequence_of(sequences, b), messages_of(rows, b)
        given = directions.scores[b], directions.start[b], directions.end[b]
        filled = directions.alpha[b], directions.beta[b], directions.rest[b]
        tangent = Tangent(*given, directions.has_boundary, *filled)
        counts = found.start[b], found.duration[b], found.first[b]
        totals = Totals(*counts, found.transition[b], found.direct[b], found.beyond[b])
        backward_tangents(sequence, messages, tangent, model, weights, slopes)
        counted = core[b, 0], core[b, 1]
        means[b] = forward_tangents(
            sequence, messages, tangent, model, weights, slopes, counted, totals
        )
        b = take(queue)


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log Z, its derivative and that of its gradient, of float64 problems.

    See `flash_semicrf.streaming.dispatch.Backend`.
    """
    return _tangents_of(potentials, direction, wanted, batch_of(potentials))[:3]


def tangents_of_pieces(
    p: Potentials, direction: Potentials, wanted: set[str], core: Tensor
) -> Tangents:
    """Derivatives and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    batch = batch_of(p)
    windows = windows_of(batch.messages, p, core)
    *found, changes = _tangents_of(p, direction, wanted, batch, array_of(core))
    return Tangents(*found, windows, changes)


def _tangents_of(
    p: Potentials,
    direction: Potentials,
    wanted: set[str],
    batch: Batch,
    core: np.ndarray | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Changes]:
    """`tangents` from the messages, and the derivatives of these.

    With `core` (B, 2), those of the parameters that sequences share are of the segments that start
    in these positions.
    """
    want_transition = "transition" in wanted
    needed = {"end_scores", "transition"} if want_transition else {"end_scores"}
    log_z, counts = gradients_of(p, batch, needed, core)
    shape, lengths, size = (
        batch.sequences.scores.shape,
        batch.sequences.length,
        len(batch.model.bias),
    )
    rest = np.zeros(batch.messages.rest.shape)
    given = sequences_of(direction)
    tangent = Tangent(
        given.scores, given.start, given.end, given.has_boundary, *np.zeros((2, *shape)), rest
    )
    if direction.final_scores is not None:
        final = array_of(direction.final_scores)
        tangent.beta[np.arange(p.batch_size), lengths - 1] = final
    flat = p.num_labels * size if want_transition else 1
    found = Totals(
        np.zeros(shape),
        *np.zeros((2, p.batch_size, size)),
        *np.zeros((2, p.batch_size, flat)),
        np.zeros((p.batch_size, p.num_labels)),
    )
    alive = np.flatnonzero(batch.messages.total[:, 1] > -np.inf)
    means = np.zeros(p.batch_size)
    slopes = _slopes_of(direction, batch.weights)
    costs = lengths[alive] * cost_of(p)
    if core is None:
        core = np.stack([np.zeros_like(lengths), lengths], 1)
    threads.run(_run, alive, costs, (*batch, slopes, tangent, core, found, means))
    level = means[:, None, None]
    end = counts["end_scores"].numpy() * (tangent.alpha + tangent.beta - level)
    products = boundary_products(found.start, end, lengths, wanted)
    sizes = (p.max_duration, p.num_labels)
    products["duration_bias"] = labels_and_durations(found.duration, *sizes)
    products["duration_tail"] = found.beyond
    first = labels_and_durations(found.first, *sizes)
    products["initial_scores"] = first.sum(1) if p.initial_scores.dim() == 1 else first
    if want_transition:
        total = found.transition * batch.weights.forward + found.direct
        total = total.reshape(p.batch_size, p.num_labels, size)
        total = labels_and_durations(total, *sizes).swapaxes(1, 2)
        slope = array_of(direction.transition)
        products["transition"] = total + counts["transition"].numpy() * slope
    tensors = {n: torch.from_numpy(np.ascontiguousarray(products[n])) for n in wanted}
    left_out = log_z.new_zeros((p.batch_size, 2))
    changes = torch.from_numpy(tangent.alpha), torch.from_numpy(tangent.beta)
    changes = Changes(counts["end_scores"], *changes, left_out)
    return log_z, torch.from_numpy(means), tensors, changes

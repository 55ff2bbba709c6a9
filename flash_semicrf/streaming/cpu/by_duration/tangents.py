"""Hessian-vector products of log Z by duration: those of a whole batch.

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
from flash_semicrf.streaming.cpu.by_duration.attached import Attached, attached_like, attached_of
from flash_semicrf.streaming.cpu.by_duration.batch import batch_of, gradients_of
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

__all__ = ["tangents"]


class Tangent(NamedTuple):
    """Direction of a sequence's positions, and derivatives; of a batch, with a leading axis."""

    scores: np.ndarray  # as in `Sequence`
    start: np.ndarray
    end: np.ndarray
    has_boundary: bool
    alpha: np.ndarray  # (T, C) derivatives of the messages
    beta: np.ndarray  # its last row starts as that of the final scores
    rest: np.ndarray  # (T * C,) row s: of what may follow K positions from s; unused without a tail
    attached: Attached | None  # direction


class Slopes(NamedTuple):
    """Direction of the shared parameters."""

    bias: np.ndarray  # (R,) derivative of D
    first: np.ndarray  # (R,) of the first segment's term
    scores: np.ndarray  # (C * M,) of A, a row for each c'
    forward: np.ndarray | None  # times `Weights.forward`, if there are any
    backward: np.ndarray | None  # times `Weights.backward`
    tail: np.ndarray  # (C,) zeros without a tail


class Totals(NamedTuple):
    """Derivatives of a sequence's expected counts; of a batch, with a leading axis."""

    start: np.ndarray  # (T, C)
    duration: np.ndarray  # (R,) of all segments
    first: np.ndarray  # (R,) of first segments
    # (C * M,), or (1,) if not wanted: their sum is that of transitions, less dA times the count;
    # the former still lacks the factor `Weights.forward`. Without weights all is in the latter.
    transition: np.ndarray
    direct: np.ndarray
    beyond: np.ndarray  # (C,) of positions beyond the K-th
    attached: Attached | None  # of segments and transitions by position


def _slopes_of(direction: Potentials, weights: Weights | None) -> Slopes:
    num_labels = direction.num_labels
    by_duration = array_of(direction.transition).reshape(-1, num_labels, num_labels)
    scores = rows_of(by_duration.swapaxes(0, 1), 0.0)  # (C_src, M)
    columns = np.zeros((scores.shape[1], padded_labels(len(scores))))
    columns[:, : len(scores)] = scores.T
    bias = array_of(direction.duration_bias)
    first = np.broadcast_to(array_of(direction.initial_scores), bias.shape)
    rows, scores = (rows_of(bias, 0.0), rows_of(first, 0.0)), scores.ravel()
    products: tuple[np.ndarray | None, np.ndarray | None] = None, None
    if weights is not None:
        products = scores * weights.forward, columns.ravel() * weights.backward
    tail = direction.duration_tail
    tail = np.zeros(direction.num_labels) if tail is None else array_of(tail)
    return Slopes(*rows, scores, *products, tail)


@kernel_of_loops
def _run(queue, sequences, model, weights, rows, slopes, directions, found, means):
    b = take(queue)
    while b >= 0:
        sequence, messages = sequence_of(sequences, b), messages_of(rows, b)
        given = directions.scores[b], directions.start[b], directions.end[b]
        filled = directions.alpha[b], directions.beta[b], directions.rest[b]
        along = attached_of(directions.attached, b)
        tangent = Tangent(*given, directions.has_boundary, *filled, along)
        counts = found.start[b], found.duration[b], found.first[b]
        shared = found.transition[b], found.direct[b], found.beyond[b]
        totals = Totals(*counts, *shared, attached_of(found.attached, b))
        backward_tangents(sequence, messages, tangent, model, weights, slopes)
        means[b] = forward_tangents(sequence, messages, tangent, model, weights, slopes, totals)
        b = take(queue)


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log Z, its derivative and that of its gradient, of float64 problems.

    See `flash_semicrf.streaming.dispatch.Backend`.
    """
    p, want_transition = potentials, "transition" in wanted
    batch = batch_of(p)
    apart = want_transition and batch.weights is not None
    needed = {"end_scores", "transition"} if apart else {"end_scores"}
    log_z, counts = gradients_of(p, batch, needed)
    shape, lengths, size = (
        batch.sequences.scores.shape,
        batch.sequences.length,
        len(batch.model.bias),
    )
    rest = np.zeros(batch.messages.rest.shape)
    given = sequences_of(direction)
    filled = (*np.zeros((2, *shape)), rest)
    tangent = Tangent(
        given.scores, given.start, given.end, given.has_boundary, *filled, given.attached
    )
    if direction.final_scores is not None:
        final = array_of(direction.final_scores)
        tangent.beta[np.arange(p.batch_size), lengths - 1] = final
    flat = len(batch.model.scores) if want_transition else 1
    found = Totals(
        np.zeros(shape),
        *np.zeros((2, p.batch_size, size)),
        *np.zeros((2, p.batch_size, flat)),
        np.zeros((p.batch_size, p.num_labels)),
        attached_like(p, wanted, np.float64),
    )
    alive = np.flatnonzero(batch.messages.total[:, 1] > -np.inf)
    means = np.zeros(p.batch_size)
    slopes = _slopes_of(direction, batch.weights)
    costs = lengths[alive] * cost_of(p)
    threads.run(_run, alive, costs, (*batch, slopes, tangent, found, means))
    level = means[:, None, None]
    end = counts["end_scores"].numpy() * (tangent.alpha + tangent.beta - level)
    products = boundary_products(found.start, end, lengths, wanted)
    sizes = (p.max_duration, p.num_labels)
    products["duration_bias"] = labels_and_durations(found.duration, *sizes)
    products["duration_tail"] = found.beyond
    first = labels_and_durations(found.first, *sizes)
    products["initial_scores"] = first.sum(1) if p.initial_scores.dim() == 1 else first
    if want_transition:
        total = found.direct
        if batch.weights is not None:
            total = found.transition * batch.weights.forward + total
        total = total.reshape(p.batch_size, p.num_labels, -1)
        total = labels_and_durations(total, batch.model.step, p.num_labels).swapaxes(1, 2)
        total = total.reshape(p.batch_size, *p.transition.shape)
        if batch.weights is not None:
            total = total + counts["transition"].numpy() * array_of(direction.transition)
        products["transition"] = total
    if found.attached is not None:
        products["segment_scores"] = found.attached.spans
        products["transition_scores"] = found.attached.moves
    tensors = {n: torch.from_numpy(np.ascontiguousarray(products[n])) for n in wanted}
    return log_z, torch.from_numpy(means), tensors

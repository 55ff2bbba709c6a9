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
from flash_semicrf.streaming.cpu import pool
from flash_semicrf.streaming.cpu.by_duration.batch import gradients_of_rows, message_rows
from flash_semicrf.streaming.cpu.by_duration.parameters import labels_and_durations, rows_of
from flash_semicrf.streaming.cpu.by_duration.tangent_parameters import Sequence, Slopes, Totals
from flash_semicrf.streaming.cpu.by_duration.tangent_passes import (
    backward_tangents,
    forward_tangents,
)
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, padded_labels
from flash_semicrf.streaming.cpu.static.batch import boundary_arrays
from flash_semicrf.streaming.cpu.static.tangents import boundary_products
from flash_semicrf.streaming.cpu.tasks import take

__all__ = ["tangents"]


class _Direction(NamedTuple):
    scores: np.ndarray  # (B, T, C)
    start_scores: np.ndarray  # (B, T, C), or (B, 1, 1)
    end_scores: np.ndarray
    has_boundary: bool
    slopes: Slopes


class _Found(NamedTuple):
    """What the kernel fills, by sequence."""

    alpha: np.ndarray  # (B, T, C) derivatives of the messages
    beta: np.ndarray
    rest: np.ndarray  # (B, T * C), or (B, 1) without a tail
    start: np.ndarray  # (B, T, C) of the starts
    duration: np.ndarray  # (B, R)
    first: np.ndarray
    transition: np.ndarray  # (B, C * R), or (B, 1)
    direct: np.ndarray
    beyond: np.ndarray  # (B, C)


def _direction_of(direction: Potentials, batch: NamedTuple) -> _Direction:
    scores = array_of(direction.scores)
    has_boundary, start, end = boundary_arrays(direction, scores)
    by_duration = array_of(direction.transition).swapaxes(0, 1)  # (C_src, K, C_dst)
    arriving = rows_of(by_duration, 0.0)
    columns = np.zeros((arriving.shape[1], padded_labels(len(arriving))))
    columns[:, : len(arriving)] = arriving.T
    bias = array_of(direction.duration_bias)
    first = np.broadcast_to(array_of(direction.initial_scores), bias.shape)
    tail = direction.duration_tail
    slopes = Slopes(
        rows_of(bias, 0.0), rows_of(first, 0.0), arriving.ravel(),
        arriving.ravel() * batch.weights.forward, columns.ravel() * batch.weights.backward,
        np.zeros(len(arriving)) if tail is None else array_of(tail),
    )  # fmt: skip
    return _Direction(scores, start, end, has_boundary, slopes)


@kernel
def _run(queue, batch, rows, direction, mean, found, want_transition):
    b = take(queue)
    while b >= 0:
        sequence = Sequence(
            batch.scores[b], batch.start_scores[b], batch.end_scores[b], batch.has_boundary,
            direction.scores[b], direction.start_scores[b], direction.end_scores[b],
            direction.has_boundary, rows.alpha[b], rows.beta[b], found.alpha[b], found.beta[b],
            rows.rest[b], rows.further[b], found.rest[b], rows.forward[b], rows.backward[b],
            batch.lengths[b], rows.total[b, 0], rows.total[b, 1],
        )  # fmt: skip
        totals = Totals(
            found.start[b], found.duration[b], found.first[b], found.transition[b],
            found.direct[b], found.beyond[b], want_transition,
        )  # fmt: skip
        backward_tangents(sequence, batch.arrivals, batch.weights, direction.slopes)
        mean[b] = forward_tangents(
            sequence, batch.arrivals, batch.weights, direction.slopes, totals
        )
        b = take(queue)


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log Z, its derivative and that of its gradient.

    See `flash_semicrf.streaming.dispatch.Backend`. Everything is float64.
    """
    p = potentials
    batch, rows = message_rows(p)
    needed = {"end_scores", "transition"} if "transition" in wanted else {"end_scores"}
    log_z, counts = gradients_of_rows(p, batch, rows, needed)
    towards = _direction_of(direction, batch)
    size, want_transition = len(batch.arrivals.bias), "transition" in wanted
    flat = p.num_labels * size if want_transition else 1
    found = _Found(
        *np.zeros((2, *batch.scores.shape)),
        np.zeros(rows.rest.shape),
        np.zeros(batch.scores.shape),
        *np.zeros((2, p.batch_size, size)),
        *np.zeros((2, p.batch_size, flat)),
        np.zeros((p.batch_size, p.num_labels)),
    )
    last = (np.arange(p.batch_size), array_of(p.lengths) - 1)
    if direction.final_scores is not None:
        found.beta[last] = array_of(direction.final_scores)
    alive = np.flatnonzero(rows.total[:, 1] > -np.inf)
    means = np.zeros(p.batch_size)
    costs = batch.lengths[alive] * cost_of(p)
    pool.run(_run, alive, costs, (batch, rows, towards, means, found, want_transition))
    level = means[:, None, None]
    end = counts["end_scores"].numpy() * (found.alpha + found.beta - level)
    products = boundary_products(found.start, end, array_of(p.lengths), wanted)
    sizes = (p.max_duration, p.num_labels)
    products["duration_bias"] = labels_and_durations(found.duration, *sizes)
    products["duration_tail"] = found.beyond
    by_label = p.initial_scores.dim() == 1
    first = labels_and_durations(found.first, *sizes)
    products["initial_scores"] = first.sum(1) if by_label else first
    if want_transition:
        total = found.transition * batch.weights.forward + found.direct
        total = total.reshape(p.batch_size, p.num_labels, size)
        total = labels_and_durations(total, *sizes).swapaxes(1, 2)
        slope = array_of(direction.transition)
        products["transition"] = total + counts["transition"].numpy() * slope
    found = {n: torch.from_numpy(np.ascontiguousarray(products[n])) for n in wanted}
    return log_z, torch.from_numpy(means), found

"""Log Z and its gradients for batches of short sequences, eight to a vector.

For static transitions without a tail. Long sequences of a batch, and those whose messages leave the
range of the kernel, as with masks of -1e9 or scores of +-100, are done by
`flash_semicrf.streaming.cpu.static.batch`, and so are batches too small to fill the lanes. No
result depends on what else is in a batch that is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.lanes.passes import run_short
from flash_semicrf.streaming.cpu.lanes.records import Model, Sequences, Sums, places_of
from flash_semicrf.streaming.cpu.lanes.rows import EXPONENT
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, end_term, forbid, start_term

__all__ = ["gradients", "log_partition", "model_of"]

_POSITIONS = 256
"""Longest sequence. The other kernels give the passes of a long one to several threads."""

_WORKSPACE = 4 << 20
"""Bytes that a thread may take, which its caches should hold."""

_SEQUENCES = 4
"""Fewest sequences. A group of eight costs the same whatever its lanes hold."""

_DURATIONS = 64
"""Largest K. The window sum of the other kernels is the faster one for long windows."""


def model_of(p: Potentials) -> Model | None:
    """The shared parameters, or None where the kernel does not take the problem."""
    if p.transition.dim() == 3 or p.duration_tail is not None or p.max_duration > _DURATIONS:
        return None
    duration = forbid(array_of(p.duration_bias)).T  # (C, K)
    peak = _finite_peak(duration, 1)
    duration = duration - peak[:, None]
    transition = forbid(array_of(p.transition)) + peak
    first, last = start_term(p) + peak, end_term(p)
    peaks = _finite_peak(first, 0), _finite_peak(last, 0)
    parts = [duration, transition, first - peaks[0], last - peaks[1]]
    for part in parts:
        if bool((np.abs(part[part > -np.inf]) > EXPONENT).any()):
            return None
    window, transition, first, last = (np.exp(part) for part in parts)
    allowed = window > 0
    from_one = (allowed[:, :-1] | ~allowed[:, 1:]).all(1)
    matrices = (window.ravel(), window[:, ::-1].ravel(), transition.ravel())
    return Model(*matrices, first, last, float(sum(peaks)), from_one)


def _finite_peak(values: np.ndarray, axis: int) -> np.ndarray:
    """Maximum over an axis, 0 where everything is forbidden."""
    peak = values.max(axis)
    return np.where(peak > -np.inf, peak, 0.0)


def _short_ones(p: Potentials) -> np.ndarray:
    """Indices of the sequences that are short enough, by length; whatever else is in the batch."""
    boundary = p.start_scores is not None or p.end_scores is not None
    bytes_per_position = (6 if boundary else 4) * p.num_labels * LANES * 8
    lengths = array_of(p.lengths)
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] <= min(_POSITIONS, _WORKSPACE // bytes_per_position)]


def _run(p: Potentials, gradient: bool, want: np.ndarray) -> Sums | None:
    """Run the kernel, or return None where it does not take the problem."""
    order = _short_ones(p)
    model = model_of(p) if len(order) >= _SEQUENCES else None
    if model is None:
        return None
    scores = array_of(p.scores)
    dtype, shape, num_labels = scores.dtype, (p.batch_size,), p.num_labels
    given = (p.start_scores, p.end_scores)
    has_boundary = any(x is not None for x in given)
    start, end = np.zeros((2, 0), dtype)
    if has_boundary:
        start, end = (np.zeros_like(scores) if x is None else array_of(x) for x in given)
    lengths = array_of(p.lengths)
    batch = Sequences(scores.ravel(), start.ravel(), end.ravel(), has_boundary, lengths, order)
    position = np.zeros(scores.size if gradient else 0, dtype)
    ends = np.zeros((2, scores.size if want[0] else 0), dtype)
    by_duration = (p.max_duration, num_labels) if want[1] else (0, 0)
    by_transition = (num_labels, num_labels) if want[2] else (0, 0)
    by_label = np.zeros((2, *shape, num_labels))
    shared = (np.zeros((*shape, *by_duration)), np.zeros((*shape, *by_transition)))
    sums = Sums(np.empty(shape), np.zeros(shape, np.bool_), position, *ends, *by_label, *shared)
    at = places_of(int(lengths[order[-1]]), num_labels, p.max_duration, has_boundary)
    last = np.append(np.arange(LANES - 1, len(order) - 1, LANES), len(order) - 1)
    costs = lengths[order[last]] * cost_of(p)
    given = (batch, model, at, p.num_positions, p.max_duration, gradient, want, sums)
    threads.run(run_short, np.arange(len(costs)), costs, given)
    return sums


def log_partition(p: Potentials, general: Callable[[Potentials], Tensor]) -> Tensor | None:
    """Log Z (B,) in float64, or None where the kernel does not take the problem.

    Parameters
    ----------
    p : Potentials
    general : callable
        Computes it for sequences that leave the kernel's range.
    """
    sums = _run(p, False, np.zeros(3, np.bool_))
    if sums is None:
        return None
    log_z = torch.from_numpy(sums.log_z)
    rest = np.flatnonzero(~sums.certain)
    if len(rest):
        log_z[rest] = general(_part(p, rest))
    return log_z


def gradients(
    p: Potentials,
    wanted: set[str],
    general: Callable[[Potentials, set[str]], tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """As `static.batch.gradients`; None where `log_partition` returns None."""
    ends = bool(wanted & {"start_scores", "end_scores"})
    want = np.array([ends, "duration_bias" in wanted, "transition" in wanted])
    sums = _run(p, True, want)
    if sums is None:
        return None
    shape = tuple(p.scores.shape)
    found = {
        "scores": sums.position.reshape(shape),
        "start_scores": sums.start.reshape(shape) if ends else None,
        "end_scores": sums.end.reshape(shape) if ends else None,
        "duration_bias": sums.duration,
        "transition": sums.transition,
        "initial_scores": sums.initial,
        "final_scores": sums.final,
    }
    if want[2] and p.initial_scores is None:
        found["transition"] += sums.initial[:, None, :] * _free_sources(p)
    log_z = torch.from_numpy(sums.log_z)
    result = {name: torch.from_numpy(found[name]) for name in wanted}
    rest = np.flatnonzero(~sums.certain)
    if len(rest):
        log_z[rest], others = general(_part(p, rest), wanted)
        for name, values in others.items():
            result[name][rest] = values
    return log_z, result


def _free_sources(p: Potentials) -> np.ndarray:
    """Posterior (C, C) of the source of a first segment without initial scores."""
    scores = forbid(array_of(p.transition))
    weights = np.exp(scores - _finite_peak(scores, 0))
    return weights / np.maximum(weights.sum(0), 1.0)


def _part(p: Potentials, rows: np.ndarray) -> Potentials:
    """The problem of some of the sequences."""
    index = torch.from_numpy(rows)
    per_sequence = ("scores", "start_scores", "end_scores", "lengths")
    given = {name: getattr(p, name) for name in per_sequence}
    return p.replace(**{name: x[index] for name, x in given.items() if x is not None})

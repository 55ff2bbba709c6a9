"""Log Z and its gradients for short sequences and for pieces of long ones, eight to a vector.

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
from flash_semicrf.streaming.cpu.lanes.passes import run_lanes
from flash_semicrf.streaming.cpu.lanes.records import (
    Messages,
    Model,
    Sequences,
    Sums,
    multiple,
    places_of,
)
from flash_semicrf.streaming.cpu.lanes.rows import EXPONENT
from flash_semicrf.streaming.cpu.lanes.tiles import STEPS, WIDTH
from flash_semicrf.streaming.cpu.llvm import LANES
from flash_semicrf.streaming.cpu.parameters import array_of, cost_of, end_term, forbid, start_term
from flash_semicrf.streaming.windows import Windows

__all__ = [
    "gradients",
    "gradients_of_pieces",
    "log_partition",
    "log_partition_of_pieces",
    "model_of",
]

_POSITIONS = 256
"""Longest sequence. The other kernels give the passes of a long one to several threads."""

_WORKSPACE = 4 << 20
"""Bytes that a thread may take, which its caches should hold."""

_SEQUENCES = 4
"""Fewest sequences. A group of eight costs the same whatever its lanes hold."""

_DURATIONS = 512
"""Largest K: the windows of eight sequences should be held by a cache of the thread."""


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
    duration, transition, first, last = (np.exp(part) for part in parts)
    allowed = duration > 0
    from_one = (allowed[:, :-1] | ~allowed[:, 1:]).all(1)
    window = np.zeros((p.num_labels, 1 + p.max_duration + STEPS))
    window[:, 1 : 1 + p.max_duration] = duration
    ways = np.zeros((2, p.num_labels, multiple(p.num_labels, WIDTH)))
    ways[:, :, : p.num_labels] = transition, transition.T
    return Model(
        window.ravel(), ways[0].ravel(), ways[1].ravel(), first, last, *map(float, peaks), from_one
    )


def _mirrored(model: Model) -> Model:
    """The model of sequences that are read from their ends."""
    return model._replace(
        onward=model.back,
        back=model.onward,
        first=model.last,
        last=model.first,
        first_peak=model.last_peak,
        last_peak=model.first_peak,
    )


def _finite_peak(values: np.ndarray, axis: int) -> np.ndarray:
    """Maximum over an axis, 0 where everything is forbidden."""
    peak = values.max(axis)
    return np.where(peak > -np.inf, peak, 0.0)


def _short_ones(p: Potentials) -> np.ndarray:
    """Indices of the sequences that are short enough, by length; whatever else is in the batch."""
    boundary = p.start_scores is not None or p.end_scores is not None
    bytes_per_position = (5 if boundary else 3) * p.num_labels * LANES * 8
    lengths = array_of(p.lengths)
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] <= min(_POSITIONS, _WORKSPACE // bytes_per_position)]


def _run(p: Potentials, want: np.ndarray | None) -> Sums | None:
    """Run the kernel on short sequences, or return None where it does not take the problem."""
    order = _short_ones(p)
    model = model_of(p) if len(order) >= _SEQUENCES else None
    if model is None:
        return None
    return _launch(p, model, order, want)[0]


def _launch(
    p: Potentials,
    model: Model,
    order: np.ndarray,
    want: np.ndarray | None,
    core: np.ndarray | None = None,
) -> tuple[Sums, Messages]:
    """Run the kernel on some sequences, the shortest first.

    Parameters
    ----------
    p : Potentials
    model : Model
    order : int64 array of shape (N,)
    want : bool array of shape (3,), or None
        Gradients as `run_lanes` has them; None for log Z alone.
    core : int64 array of shape (B, 2), optional
        Sequences are pieces, whose messages are handed out at these boundaries.
    """
    gradient = want is not None
    want = np.zeros(3, np.bool_) if want is None else want
    scores, lengths = array_of(p.scores), array_of(p.lengths)
    dtype, shape, num_labels = scores.dtype, (p.batch_size,), p.num_labels
    given = (p.start_scores, p.end_scores) if gradient else (p.end_scores, p.start_scores)
    has_boundary = any(x is not None for x in given)
    opening, closing = np.zeros((2, 0), dtype)
    if has_boundary:
        opening, closing = (np.zeros_like(scores) if x is None else array_of(x) for x in given)
    whole = np.stack([np.zeros_like(lengths), lengths], 1)
    batch = Sequences(
        scores.ravel(),
        opening.ravel(),
        closing.ravel(),
        has_boundary,
        lengths,
        order,
        whole if core is None else core,
        not gradient,
    )
    position = np.zeros(scores.size if gradient else 0, dtype)
    ends = np.zeros((2, scores.size if want[0] else 0), dtype)
    by_duration = (p.max_duration, num_labels) if want[1] else (0, 0)
    by_transition = (num_labels, num_labels) if want[2] else (0, 0)
    by_label = np.zeros((2, *shape, num_labels))
    shared = (np.zeros((*shape, *by_duration)), np.zeros((*shape, *by_transition)))
    sums = Sums(np.empty(shape), np.zeros(shape, np.bool_), position, *ends, *by_label, *shared)
    sides = (0 if core is None else p.batch_size, 2, p.max_duration)
    values = [np.zeros((*sides, num_labels)) for _ in range(2)]
    messages = Messages(*values, *(np.zeros(sides) for _ in range(2)))
    sizes = (int(lengths[order[-1]]), num_labels, p.max_duration)
    at = places_of(*sizes, has_boundary, gradient)
    last = np.append(np.arange(LANES - 1, len(order) - 1, LANES), len(order) - 1)
    costs = lengths[order[last]] * cost_of(p)
    model = model if gradient else _mirrored(model)
    rest = (batch, model, at, p.num_positions, p.max_duration, want, sums, messages)
    threads.run(run_lanes, np.arange(len(costs)), costs, rest)
    return sums, messages


def log_partition(p: Potentials, general: Callable[[Potentials], Tensor]) -> Tensor | None:
    """Log Z (B,) in float64, or None where the kernel does not take the problem.

    Parameters
    ----------
    p : Potentials
    general : callable
        Computes it for sequences that leave the kernel's range.
    """
    sums = _run(p, None)
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
    sums = _run(p, _want(wanted))
    if sums is None:
        return None
    log_z, result = _results(p, sums, wanted)
    rest = np.flatnonzero(~sums.certain)
    if len(rest):
        log_z[rest], others = general(_part(p, rest), wanted)
        for name, values in others.items():
            result[name][rest] = values
    return log_z, result


def log_partition_of_pieces(
    p: Potentials, core: Tensor, general: Callable[..., tuple[Tensor, Windows]]
) -> tuple[Tensor, Windows] | None:
    """As `static.batch.log_partition_of_pieces`; None where the kernel does not take the problem.

    `general` computes it for pieces that leave the kernel's range.
    """
    model = model_of(p)
    if model is None:
        return None
    order = np.argsort(array_of(p.lengths), kind="stable")
    sums, messages = _launch(p, model, order, None, array_of(core))
    log_z, windows = torch.from_numpy(sums.log_z), _windows(messages, both=False)
    rest = np.flatnonzero(~sums.certain)
    if len(rest):
        log_z[rest], others = general(_part(p, rest), core[torch.from_numpy(rest)])
        windows.alpha[rest] = others.alpha
    return log_z, windows


def gradients_of_pieces(
    p: Potentials,
    wanted: set[str],
    core: Tensor,
    general: Callable[..., tuple[Tensor, dict[str, Tensor], Windows]],
) -> tuple[Tensor, dict[str, Tensor], Windows] | None:
    """As `static.batch.gradients_of_pieces`; None where the kernel does not take the problem."""
    model = model_of(p)
    if model is None:
        return None
    order = np.argsort(array_of(p.lengths), kind="stable")
    sums, messages = _launch(p, model, order, _want(wanted), array_of(core))
    log_z, result = _results(p, sums, wanted, array_of(core))
    windows = _windows(messages, both=True)
    rest = np.flatnonzero(~sums.certain)
    if len(rest):
        own = core[torch.from_numpy(rest)]
        log_z[rest], found, others = general(_part(p, rest), wanted, own)
        for name, values in found.items():
            result[name][rest] = values
        windows.alpha[rest], windows.beta[rest] = others.alpha, others.beta
    return log_z, result, windows


def _want(wanted: set[str]) -> np.ndarray:
    ends = bool(wanted & {"start_scores", "end_scores"})
    return np.array([ends, "duration_bias" in wanted, "transition" in wanted])


def _results(
    p: Potentials, sums: Sums, wanted: set[str], core: np.ndarray | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and the gradients wanted, from what the kernel has summed up."""
    shape = tuple(p.scores.shape)
    found = {
        "scores": sums.position.reshape(shape),
        "start_scores": sums.start,
        "end_scores": sums.end,
        "duration_bias": sums.duration,
        "transition": sums.transition,
        "initial_scores": sums.initial,
        "final_scores": sums.final,
    }
    if "transition" in wanted and p.initial_scores is None:
        first = sums.initial[:, None, :] * _free_sources(p)
        found["transition"] += first if core is None else first * (core[:, 0] == 0)[:, None, None]
    for name in wanted & {"start_scores", "end_scores"}:
        found[name] = found[name].reshape(shape)
    return torch.from_numpy(sums.log_z), {name: torch.from_numpy(found[name]) for name in wanted}


def _windows(messages: Messages, both: bool) -> Windows:
    """Logarithms of the messages that were handed out."""
    parts = [(messages.alpha, messages.alpha_level), (messages.beta, messages.beta_level)]
    with np.errstate(divide="ignore"):
        logs = [torch.from_numpy(np.log(x) + level[..., None]) for x, level in parts[: 1 + both]]
    left_out = torch.zeros(len(logs[0]), 2, dtype=torch.float64)
    return Windows(logs[0], logs[1] if both else None, left_out)


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

"""Log Z and its gradients for static transitions: the launches of a whole batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Problem, form_of, power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.boundary_gradient import Marginals, boundary_kernel
from flash_semicrf.streaming.triton.static.chunks import finish
from flash_semicrf.streaming.triton.static.duration_gradient import (
    duration_gradient_kernel,
    longer_gradient_kernel,
)
from flash_semicrf.streaming.triton.static.launch import run_halves, run_passes
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import SPAN, Plan, plan_of
from flash_semicrf.streaming.triton.static.prepare import Tables

__all__ = ["Core", "gradients", "gradients_from", "log_partition"]


def log_partition(potentials: Potentials, always_log: bool = False, narrow: bool = False) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per sequence. The latter two as for `gradients`."""
    p = potentials
    problem, plan = problem_of(p), plan_of(p)
    if narrow:
        return run_passes(p, problem, plan, False, always_log, narrow=True)[1].log_z[1]
    if plan.pays_in_halves(p.batch_size, p.num_positions, p.max_duration):
        return run_halves(p, problem, plan, always_log)[1]
    return run_passes(p, problem, plan, False, always_log)[1].log_z[1]


def gradients(
    potentials: Potentials, wanted: set[str], always_log: bool = False, narrow: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradient for each sequence.

    Parameters
    ----------
    potentials : Potentials
    wanted : set of str
        Names of parameters; "start_scores" and "end_scores" may be asked for without being given.
    always_log : bool
        Run every block of the passes in the log domain; for tests.
    narrow : bool
        Run the passes in float32 where that is certain.

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
    gradients : dict of Tensor
        Of "scores", "start_scores" and "end_scores": (B, T, C) in the dtype of the scores. Of the
        others: a float64 gradient per sequence, (B, ...). All zero where log Z is -inf.
    """
    p = potentials
    plan, problem = plan_of(p), problem_of(p)
    passes = run_passes(p, problem, plan, True, always_log, narrow=narrow)
    return passes[1].log_z[1], gradients_from(p, problem, plan, passes, wanted)


_FEW_PROGRAMS = 256
"""Programs of a gradient that leave multiprocessors idle: each gets more warps."""


class Core(NamedTuple):
    """Part of each sequence that the gradients of shared parameters are summed over."""

    bounds: Tensor  # (B, 2) int64, multiples of the span or the end of a sequence
    span: int  # a multiple of SPAN


def gradients_from(
    p: Potentials,
    problem: Problem,
    plan: Plan,
    passes: tuple[Tables, Messages],
    wanted: set[str],
    core: Core | None = None,
) -> dict[str, Tensor]:
    """Gradients from the messages of both passes, which they overwrite; see `gradients`.

    With `core` those of the transitions and durations are of the segments that end in it.
    """
    tables, messages = passes
    found = _boundary_gradients(p, problem, plan.labels, passes, wanted, core)
    if "duration_bias" in wanted:
        found["duration_bias"] = _duration_gradient(problem, plan.labels, passes, core)
    if plan.has_tail and wanted & {"duration_bias", "duration_tail"}:
        B, _, C = problem.scores.shape
        segments, found["duration_tail"] = to = tables.tail.new_empty((2, B, C))
        arguments = (problem.scores, problem.sizes, tables.log_window, tables.tail, messages, *to)
        warps = max(1, plan.labels // 32)
        launch(longer_gradient_kernel, (B,), *arguments, CP=plan.labels, num_warps=warps)
        if "duration_bias" in wanted:
            found["duration_bias"][:, -1] += segments
    return {name: found[name] for name in wanted}


def _in_core(parts: Tensor, core: Core) -> Tensor:
    """Sum over the chunks of each sequence's core, (B, chunks, ...) to (B, ...)."""
    begin = torch.arange(parts.shape[1], device=parts.device) * core.span
    own = (begin >= core.bounds[:, :1]) & (begin < core.bounds[:, 1:])
    return torch.where(own.view(*own.shape, *(1,) * (parts.dim() - 2)), parts, 0.0).sum(1)


def _span(positions: int, shortest: int) -> int:
    """Positions of a chunk, `shortest` or more: of 8C and 8K positions, so that the gradients that
    the chunks leave to be summed take a quarter of the memory of float32 scores."""
    chunks = max(1, positions // shortest)
    return -(-positions // (chunks * SPAN)) * SPAN


def _boundary_gradients(
    p: Potentials,
    problem: Problem,
    labels: int,
    passes: tuple[Tables, Messages],
    wanted: set[str],
    core: Core | None,
) -> dict[str, Tensor]:
    """Everything but the gradient by the durations; turns the messages into h and u."""
    scores = problem.scores
    tables, messages = passes
    B, T, C = scores.shape
    span = _span(T + 1, 8 * C) if core is None else core.span
    tiles, chunks = span // SPAN, -(-(T + 1) // span)
    want_ends = bool(wanted & {"start_scores", "end_scores"})
    start, end = (torch.empty_like(scores) if want_ends else None for _ in range(2))
    carry = torch.empty((B, chunks, C), dtype=torch.float64, device=scores.device)
    edges = torch.empty((2, B, C), dtype=torch.float64, device=scores.device)
    transition = carry.new_empty((B, chunks, C, C)) if "transition" in wanted else None
    to = Marginals(torch.empty_like(scores), start, end, carry, transition, *edges)
    options = {
        "HAS_INITIAL": p.initial_scores is not None,
        "WANT_DURATION": bool(wanted & {"duration_bias", "duration_tail"}),
        # tl.dot takes 16 rows and more; 64 labels need more shared memory than many devices have.
        "DOT": 16 <= labels <= 64,
        "num_warps": 4 if labels <= (32 if chunks * B > _FEW_PROGRAMS else 16) else 8,
    }
    form = (form_of(p), want_ends, transition is None)
    arguments = (problem, tables.log_matrix, tables.first, messages, to, tiles)
    launch(boundary_kernel, (chunks, B), *arguments, form=form, CP=labels, TT=SPAN, **options)
    found = {"scores": to.position, "start_scores": start, "end_scores": end}
    found["initial_scores"], found["final_scores"] = edges
    pairs = transition if core is None else None
    total = None if transition is None else transition[:, 0]
    if chunks > 1:
        total = finish(to.position, carry, pairs, problem.sizes, span, labels)
    if transition is not None:
        found["transition"] = total if core is None else _in_core(transition, core)
    return found


def _duration_gradient(
    problem: Problem, labels: int, passes: tuple[Tables, Messages], core: Core | None
) -> Tensor:
    tables, messages = passes
    _, T, C, K = problem.sizes
    tile = max(4, min(16, power_of_two_above(K), 512 // labels))
    span = _span(T, max(256, 8 * K))
    chunks = -(-T // span)
    B = len(problem.scores)
    gradient = tables.log_window.new_empty((B, chunks, K, C))
    bounds = None if core is None else core.bounds
    given = (problem.scores, problem.sizes, tables.log_window, messages, bounds)
    grid = (-(-K // tile), chunks, B)
    groups = 4 if math.prod(grid) <= _FEW_PROGRAMS else 1
    form = (problem.scores.dtype, core is None)
    options = {"form": form, "CP": labels, "KT": tile, "G": groups, "num_warps": 4 * groups}
    launch(duration_gradient_kernel, grid, *given, gradient, span, **options)
    return gradient[:, 0] if chunks == 1 else gradient.sum(1)

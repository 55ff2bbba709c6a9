"""Log Z and its gradients for static transitions: the launches of a whole batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Problem, form_of, power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.apart import find_apart
from flash_semicrf.streaming.triton.static.boundary_gradient import (
    Marginals,
    apart_boundary_kernel,
    boundary_kernel,
)
from flash_semicrf.streaming.triton.static.chunks import Closing, finish
from flash_semicrf.streaming.triton.static.duration_gradient import (
    apart_durations_kernel,
    duration_gradient_kernel,
    longer_gradient_kernel,
)
from flash_semicrf.streaming.triton.static.launch import run_halves, run_passes
from flash_semicrf.streaming.triton.static.narrow_boundary import narrow_boundary_kernel
from flash_semicrf.streaming.triton.static.narrow_durations import narrow_durations_kernel
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import SPAN, Plan, plan_of
from flash_semicrf.streaming.triton.static.prepare import Tables

__all__ = ["Core", "gradients", "gradients_from", "log_partition"]


def log_partition(potentials: Potentials, always_log: bool = False) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per sequence."""
    p = potentials
    problem, plan = problem_of(p), plan_of(p)
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
        Take the gradients of float32 scores without arithmetic in float64 where their range allows
        it: for devices that are slow at that. Not with a duration tail.

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
    gradients : dict of Tensor
        Of "scores", "start_scores" and "end_scores": (B, T, C) in the dtype of the scores. Of the
        others: a float64 gradient per sequence, (B, ...). All zero where log Z is -inf.
    """
    p = potentials
    plan, problem = plan_of(p), problem_of(p)
    passes = run_passes(p, problem, plan, True, always_log)
    return passes[1].log_z[1], gradients_from(p, problem, plan, passes, wanted, narrow=narrow)


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
    narrow: bool = False,
) -> dict[str, Tensor]:
    """Gradients from the messages of both passes, which they overwrite; see `gradients`.

    With `core` those of the transitions and durations are of the segments that end in it.
    """
    tables, messages = passes
    apart = None
    if narrow and not plan.has_tail and problem.scores.dtype == torch.float32:
        apart = find_apart(problem, messages, form_of(p))
    found = _boundary_gradients(p, problem, plan.labels, passes, wanted, core, apart)
    if "duration_bias" in wanted:
        found["duration_bias"] = _duration_gradient(problem, plan.labels, passes, core, apart)
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
    flat = torch.bmm(own.to(parts.dtype)[:, None], parts.flatten(2))[:, 0]
    return flat.view(len(parts), *parts.shape[2:]).to(torch.float64)


def _dtype_of_parts(chunks: int, apart: Tensor | None) -> torch.dtype:
    """Of what is still to be summed, in float64, and of what is a gradient."""
    return torch.float64 if chunks == 1 or apart is None else torch.float32


def _span(positions: int, shortest: int) -> int:
    """Positions of a chunk, `shortest` or more: of 8C and 8K positions, so that the gradients that
    the chunks leave to be summed take a quarter of the memory of float32 scores."""
    chunks = max(1, positions // shortest)
    return -(-positions // (chunks * SPAN)) * SPAN


def _span_in(core: Core, B: int, positions: int) -> int:
    """The same between bounds of cores: as long as leaves enough programs, as each leaves numbers
    to be summed; 128 at least, or all between two bounds."""
    parts = range(1, max(1, core.span // 128) + 1)
    spans = [core.span // n for n in parts if core.span % (n * SPAN) == 0]
    enough = (span for span in spans if B * -(-positions // span) > _FEW_PROGRAMS)
    return next(enough, spans[-1])


def _boundary_gradients(
    p: Potentials,
    problem: Problem,
    labels: int,
    passes: tuple[Tables, Messages],
    wanted: set[str],
    core: Core | None,
    apart: Tensor | None,
) -> dict[str, Tensor]:
    """Everything but the gradient by the durations; turns the messages into h and u.

    With flags of the sequences that are `apart` without float64 but for those.
    """
    scores = problem.scores
    tables, messages = passes
    B, T, C = scores.shape
    span = _span(T + 1, 8 * C) if core is None else _span_in(core, B, T + 1)
    tiles, chunks = span // SPAN, -(-(T + 1) // span)
    want_ends = bool(wanted & {"start_scores", "end_scores"})
    start, end = (torch.empty_like(scores) if want_ends else None for _ in range(2))
    carry = torch.empty((B, chunks, C), dtype=torch.float64, device=scores.device)
    edges = torch.empty((2, B, C), dtype=torch.float64, device=scores.device)
    transition = None
    if "transition" in wanted:
        transition = carry.new_empty((B, chunks, C, C), dtype=_dtype_of_parts(chunks, apart))
    to = Marginals(torch.empty_like(scores), start, end, carry, transition, *edges)
    options = {
        "HAS_INITIAL": p.initial_scores is not None,
        "WANT_DURATION": bool(wanted & {"duration_bias", "duration_tail"}),
        # tl.dot takes 16 rows and more; 64 labels need more shared memory than many devices have.
        "DOT": 16 <= labels <= 64,
        "num_warps": 4 if labels <= (32 if chunks * B > _FEW_PROGRAMS else 16) else 8,
    }
    options |= {"CP": labels, "TT": SPAN}
    options["form"] = form_of(p), want_ends, None if transition is None else transition.dtype
    given = (problem, tables.log_matrix, tables.first, messages)
    closing = None
    if apart is None:
        launch(boundary_kernel, (chunks, B), *given, to, tiles, **options)
    else:
        closing = Closing(torch.empty_like(carry), apart)
        arguments = (*given, apart, to, closing.started, tiles)
        warps = {"num_warps": 4 if labels <= 16 else 8}
        launch(narrow_boundary_kernel, (chunks, B), *arguments, **{**options, **warps})
        launch(apart_boundary_kernel, (chunks, B), *given, apart, to, tiles, **options)
    found = {"scores": to.position, "start_scores": start, "end_scores": end}
    found["initial_scores"], found["final_scores"] = edges
    pairs = transition if core is None else None
    total = None if transition is None else transition[:, 0]
    if chunks > 1:
        total = finish(to.position, carry, pairs, problem.sizes, span, labels, closing)
    if transition is not None:
        found["transition"] = total if core is None else _in_core(transition, core)
    return found


def _duration_gradient(
    problem: Problem,
    labels: int,
    passes: tuple[Tables, Messages],
    core: Core | None,
    apart: Tensor | None,
) -> Tensor:
    tables, messages = passes
    _, T, C, K = problem.sizes
    tile = max(4, min(16, power_of_two_above(K), 512 // labels))
    span = _span(T, max(256, 8 * K))
    chunks = -(-T // span)
    B = len(problem.scores)
    dtype = _dtype_of_parts(chunks, apart)
    gradient = tables.log_window.new_empty((B, chunks, K, C), dtype=dtype)
    bounds = None if core is None else core.bounds
    given = (problem.scores, problem.sizes, tables.log_window, messages)
    to = (bounds, gradient, span)
    grid = (-(-K // tile), chunks, B)
    groups = 4 if math.prod(grid) <= _FEW_PROGRAMS else 1
    form = (problem.scores.dtype, core is None, dtype)
    options = {"form": form, "CP": labels, "KT": tile, "G": groups, "num_warps": 4 * groups}
    if apart is None:
        launch(duration_gradient_kernel, grid, *given, *to, **options)
    else:
        launch(narrow_durations_kernel, grid, *given, apart, *to, **options)
        launch(apart_durations_kernel, grid, *given, apart, *to, **options)
    return gradient[:, 0] if chunks == 1 else gradient.sum(1, dtype=torch.float64)

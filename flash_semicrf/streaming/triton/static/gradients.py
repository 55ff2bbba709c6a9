"""Log Z and its gradients for static transitions: the launches of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.static.boundary_gradient import (
    boundary_kernel,
    carry_kernel,
    position_kernel,
)
from flash_semicrf.streaming.triton.static.duration_gradient import (
    duration_gradient_kernel,
    longer_gradient_kernel,
)
from flash_semicrf.streaming.triton.static.launch import (
    SPAN,
    Messages,
    Plan,
    Problem,
    Tables,
    plan_of,
    power_of_two_above,
    problem_of,
    run_passes,
)

__all__ = ["gradients", "log_partition"]


def log_partition(potentials: Potentials, always_log: bool = False) -> Tensor:
    """Log Z (B,) in float64; workspace O(KC) per sequence."""
    plan = plan_of(potentials)
    log_z, _, _ = run_passes(potentials, problem_of(potentials), plan, False, always_log)
    return log_z


def gradients(
    potentials: Potentials, wanted: set[str], always_log: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradient for each sequence.

    Parameters
    ----------
    potentials : Potentials
    wanted : set of str
        Names of parameters; "start_scores" and "end_scores" may be asked for without being given.
    always_log : bool
        Run every block of the passes in the log domain; for tests.

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
    gradients : dict of Tensor
        Of "scores", "start_scores" and "end_scores": (B, T, C) in the dtype of the scores. Of the
        others: a float64 gradient per sequence, (B, ...). All zero where log Z is -inf.
    """
    plan, problem = plan_of(potentials), problem_of(potentials)
    log_z, tables, messages = run_passes(potentials, problem, plan, True, always_log)
    found = _boundary_gradients(potentials, problem, plan, tables, messages, wanted)
    if "duration_bias" in wanted:
        found["duration_bias"] = _duration_gradient(potentials, problem, plan, tables, messages)
    if plan.has_tail and wanted & {"duration_bias", "duration_tail"}:
        segments, found["duration_tail"] = _longer_gradient(
            potentials, problem, plan, tables, messages
        )
        if "duration_bias" in wanted:
            found["duration_bias"][:, -1] += segments
    return log_z, {name: found[name] for name in wanted}


def _span(positions: int, shortest: int) -> int:
    """Positions of a chunk, `shortest` or more: of 8C and 8K positions, so that the gradients that
    the chunks leave to be summed take a quarter of the memory of float32 scores."""
    chunks = max(1, positions // shortest)
    return -(-positions // (chunks * SPAN)) * SPAN


def _boundary_gradients(
    p: Potentials,
    problem: Problem,
    plan: Plan,
    tables: Tables,
    messages: Messages,
    wanted: set[str],
    use_dot: bool | None = None,
) -> dict[str, Tensor]:
    """Everything but the gradient by the durations; turns the messages into h and u."""
    scores = problem.scores
    B, T, C = scores.shape
    span = _span(T + 1, 8 * C)
    tiles, chunks = span // SPAN, -(-(T + 1) // span)
    want_ends = bool(wanted & {"start_scores", "end_scores"})
    want_transition = "transition" in wanted
    position = torch.empty_like(scores)
    start = torch.empty_like(scores) if want_ends else position
    end = torch.empty_like(scores) if want_ends else position
    sizes = [B * chunks * C, B * chunks * C * C if want_transition else 1]
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=scores.device)
    carry, transition = buffer.split(sizes)
    # Apart from the buffer, which would otherwise be kept with them.
    initial, final = torch.empty((2, B, C), dtype=torch.float64, device=scores.device)
    # tl.dot takes 16 rows and more; 64 labels need more shared memory than many devices have.
    dot = 16 <= plan.labels <= 64 if use_dot is None else use_dot
    launch(
        boundary_kernel, (chunks, B),
        scores, problem.start, problem.end, problem.lengths, tables.log_matrix, tables.first,
        messages.inner_log_z, messages.forward, messages.backward, messages.offset, messages.prefix,
        position, start, end, carry, transition, initial, final,
        T, C, messages.prefix.shape[1], tiles,
        HAS_BOUNDARY=problem.has_boundary, HAS_INITIAL=p.initial_scores is not None,
        WANT_ENDS=want_ends, WANT_TRANSITION=want_transition,
        WANT_DURATION=bool(wanted & {"duration_bias", "duration_tail"}), DOT=dot,
        CP=plan.labels, TT=SPAN, num_warps=4 if plan.labels <= 16 else 8,
    )  # fmt: skip
    if chunks > 1:
        launch(carry_kernel, (B,), carry, chunks, C, CP=plan.labels, ROWS=64, num_warps=4)
        launch(
            position_kernel, (-(-T // SPAN), B),
            position, carry, problem.lengths, T, C, chunks, span, CP=plan.labels, TT=SPAN,
            num_warps=4,
        )  # fmt: skip
    found = {"scores": position, "start_scores": start, "end_scores": end}
    found["initial_scores"], found["final_scores"] = initial, final
    if want_transition:
        found["transition"] = transition.view(B, chunks, C, C).sum(1)  # a copy, also of one chunk
    return found


def _duration_gradient(
    p: Potentials, problem: Problem, plan: Plan, tables: Tables, messages: Messages
) -> Tensor:
    B, T, C = problem.scores.shape
    K = p.max_duration
    tile = max(4, min(16, power_of_two_above(K), 512 // plan.labels))
    span = _span(T, max(256, 8 * K))
    chunks = -(-T // span)
    gradient = torch.empty((B, chunks, K, C), dtype=torch.float64, device=p.device)
    launch(
        duration_gradient_kernel, (-(-K // tile), chunks, B),
        problem.scores, problem.lengths, tables.log_window,
        messages.inner_log_z, messages.has_deep, messages.backward, messages.forward,
        messages.born, gradient, T, C, K, messages.born.shape[1], span, CP=plan.labels, KT=tile,
        NARROW=problem.scores.dtype == torch.float32, SPAN=SPAN, num_warps=4,
    )  # fmt: skip
    return gradient[:, 0] if chunks == 1 else gradient.sum(1)


def _longer_gradient(
    p: Potentials, problem: Problem, plan: Plan, tables: Tables, messages: Messages
) -> Tensor:
    """Expected numbers of segments longer than K and of their positions beyond it, (2, B, C)."""
    B, T, C = problem.scores.shape
    found = torch.empty((2, B, C), dtype=torch.float64, device=p.device)
    launch(
        longer_gradient_kernel, (B,),
        problem.scores, problem.lengths, tables.log_window, tables.tail,
        messages.inner_log_z, messages.has_deep, messages.backward, messages.forward, *found,
        T, C, p.max_duration, CP=plan.labels, num_warps=max(1, plan.labels // 32),
    )  # fmt: skip
    return found

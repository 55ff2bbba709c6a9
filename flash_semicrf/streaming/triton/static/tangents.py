"""Hessian-vector products of log Z for static transitions: the launches of a whole batch.

The derivatives of the messages along the direction come from one pass each way; see
`tangent_passes`. Everything else is parallel: with P(start), P(end) the marginals of boundaries,

    d P(c starts at s) = P(start) (d gamma_s + d eta_s - d log Z)
    d P(c ends at t)   = P(end) (d alpha_t + d beta_t - d log Z)

and sums over segments and boundaries, by `tangent_terms`; of segments longer than K, at their ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.prefixes import Prefixes, prefixes_of
from flash_semicrf.streaming.triton.static.launch import plan_of, power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.log_messages import boundary_marginals, log_messages
from flash_semicrf.streaming.triton.static.tangent_passes import tangent_pass_kernel
from flash_semicrf.streaming.triton.static.tangent_terms import (
    duration_tangent_kernel,
    tail_tangent_kernel,
    transition_tangent_kernel,
)

__all__ = [
    "Towards",
    "boundary_tangents",
    "end_tangents",
    "tangents",
    "towards",
]

_TILE = 1024
"""Terms that a program computes at once."""


class Towards(NamedTuple):
    """The direction as kernels read it: contiguous, float64; zeros for what is left out."""

    transition: Tensor
    bias: Tensor
    initial: Tensor
    final: Tensor
    tail: Tensor
    prefixes: Prefixes


def towards(direction: Potentials, labels: int) -> Towards:
    """Prepare a direction for kernels that pad labels to `labels`."""
    q = direction.to(torch.float64)
    nothing = q.scores.new_zeros(q.num_labels)
    final, tail = (nothing if x is None else x for x in (q.final_scores, q.duration_tail))
    given = (q.transition, q.duration_bias, q.initial_scores, final, tail)
    return Towards(*(x.contiguous() for x in given), prefixes_of(problem_of(q), labels))


def end_tangents(
    p: Potentials, log_z: Tensor, alpha: Tensor, beta: Tensor, d_alpha: Tensor, d_beta: Tensor
) -> tuple[Tensor, Tensor]:
    """d log Z (B,), without the common parts of the direction, and d P(end) (B, T, C).

    Messages and their derivatives are (B, T + 1, C).
    """
    marginal, inside = boundary_marginals(p, log_z, (alpha + beta)[:, 1:])
    d = torch.where(inside, (d_alpha + d_beta)[:, 1:], 0.0)
    last = (torch.arange(p.batch_size, device=p.device), p.lengths - 1)
    # Better than <direction, gradient>, which multiplies large scores with rounded counts.
    weight = marginal[last]
    mean = (weight * d[last]).sum(1) / torch.where(log_z > -torch.inf, weight.sum(1), 1.0)
    return mean, marginal * (d - mean[:, None, None])


def boundary_tangents(p: Potentials, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Products for parameters by position and the final scores, from those of starts and ends."""
    inside = torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]
    position = start.cumsum(1)
    position[:, 1:] -= end.cumsum(1)[:, :-1]
    last = (torch.arange(p.batch_size, device=p.device), p.lengths - 1)
    return {
        "scores": torch.where(inside[..., None], position, 0.0),
        "start_scores": start,
        "end_scores": end,
        "final_scores": end[last],
    }


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    plan, problem = plan_of(p), problem_of(p)
    B, T, C = problem.scores.shape
    prefixes, q = prefixes_of(problem, plan.labels), towards(direction, plan.labels)
    m = log_messages(p, problem, plan)
    d_alpha, d_gamma, d_eta, d_beta = (torch.empty_like(m.alpha) for _ in range(4))
    transition, bias = p.transition.contiguous(), p.duration_bias.contiguous()
    has_tail = p.duration_tail is not None
    tail = p.duration_tail.contiguous() if has_tail else bias
    longer, d_longer = (torch.empty_like(m.alpha) if has_tail else d_alpha for _ in range(2))
    sources = max(1, min(plan.labels, _TILE // plan.labels))
    launch(
        tangent_pass_kernel, (B, 2),
        transition, bias, problem.lengths, m.log_z, *prefixes[:4],
        m.alpha, m.gamma, m.eta, m.beta, *q[:4], *q.prefixes[:3],
        d_alpha, d_gamma, d_eta, d_beta, tail, q.tail, longer, d_longer, T, C, p.max_duration,
        HAS_TAIL=has_tail, CP=plan.labels,
        KT=max(4, min(_TILE // plan.labels, power_of_two_above(p.max_duration))),
        SOURCES=sources, num_warps=4,
    )  # fmt: skip
    mean, end = end_tangents(p, m.log_z, m.alpha, m.beta, d_alpha, d_beta)
    start, inside = boundary_marginals(p, m.log_z, (m.gamma + m.eta)[:, :-1])
    start *= torch.where(inside, (d_gamma + d_eta)[:, :-1] - mean[:, None, None], 0.0)
    found = boundary_tangents(p, start, end)
    found["initial_scores"] = start[:, 0]
    shared = (problem.lengths, m.log_z, mean)
    if wanted & {"duration_bias", "duration_tail"}:
        messages = (m.gamma + prefixes.source, m.beta + prefixes.sink)
        messages += (prefixes.deep, prefixes.born)
        derivatives = (d_gamma + q.prefixes.source, d_beta + q.prefixes.sink, q.prefixes.deep)
    if "duration_bias" in wanted:
        found["duration_bias"] = _duration_tangents(
            bias, q.bias, shared, messages, derivatives, plan.labels
        )
        if has_tail:
            closed, inside = boundary_marginals(p, m.log_z, (longer + messages[1])[:, 1:])
            d = torch.where(inside, (d_longer + derivatives[1])[:, 1:] - mean[:, None, None], 0.0)
            found["duration_bias"][:, -1] += (closed * d).sum(1)
    if "duration_tail" in wanted:
        found["duration_tail"] = m.alpha.new_empty((B, C))
        launch(
            tail_tangent_kernel, (B,),
            *shared, *messages[1:], longer, tail, *derivatives[1:], d_longer, q.tail,
            found["duration_tail"], T, C, CP=plan.labels, num_warps=1,
        )  # fmt: skip
    if "transition" in wanted:
        span = 4 * C + 64  # of fewer positions, the parts would take more memory than messages
        chunks = -(-T // span)
        parts = m.alpha.new_empty((B, chunks, C, C))
        launch(
            transition_tangent_kernel, (-(-C // sources), chunks, B),
            transition, q.transition, *shared, m.alpha, m.eta, d_alpha, d_eta, parts, T, C, span,
            CP=plan.labels, SOURCES=sources, num_warps=4,
        )  # fmt: skip
        found["transition"] = parts.sum(1)
    found = {name: found[name] for name in wanted}
    return m.log_z + prefixes.common, mean + q.prefixes.common, found


def _duration_tangents(
    bias: Tensor,
    d_bias: Tensor,
    shared: tuple[Tensor, ...],
    messages: tuple[Tensor, ...],
    derivatives: tuple[Tensor, ...],
    labels: int,
) -> Tensor:
    """Products for the duration scores (B, K, C)."""
    B, rows, C = messages[0].shape
    T, K = rows - 1, len(bias)
    tile = max(4, 512 // labels)
    span = max(256, 8 * K)  # so that the parts take less memory than messages
    chunks = -(-T // span)
    parts = bias.new_empty((B, chunks, K, C), dtype=torch.float64)
    launch(
        duration_tangent_kernel, (K, chunks, B),
        bias, d_bias, *shared, *messages, *derivatives, parts, T, C, K, span,
        CP=labels, TT=tile, num_warps=4,
    )  # fmt: skip
    return parts.sum(1)

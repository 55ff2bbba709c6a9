"""Hessian-vector products of log Z for transitions by duration: the launches of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.by_duration import launch as durational
from flash_semicrf.streaming.triton.by_duration.tangent_passes import (
    duration_start_tangent_kernel,
    duration_tangent_pass_kernel,
    duration_tangent_terms_kernel,
)
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.static.log_messages import boundary_marginals
from flash_semicrf.streaming.triton.static.tangents import boundary_tangents, end_tangents, towards

__all__ = ["tangents"]


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    B, T, C = p.scores.shape
    K = p.max_duration
    inputs = durational.prepare(p)
    q = towards(direction, inputs.constants["CP"])
    log_z, alpha, beta, longer, onward = durational.run_passes(p, inputs, True, False)
    d_alpha, d_beta = torch.empty_like(alpha), torch.empty_like(beta)
    has_tail = inputs.constants["HAS_TAIL"]
    d_longer = torch.empty_like(alpha) if has_tail else d_alpha
    d_onward = torch.empty_like(alpha) if has_tail else d_beta
    initial = q.initial.expand_as(q.bias).contiguous()
    given = (*inputs[:3], inputs.lengths, log_z, *inputs[5:9], alpha, beta, onward)
    by_direction = (q.transition, q.bias, initial)
    derivatives = (*q.prefixes[:3], d_alpha, d_beta, d_onward)
    options = {"HAS_TAIL": has_tail, **inputs.launch}
    launch(
        duration_tangent_pass_kernel, (B, 2),
        *given, *by_direction, q.final, *derivatives, d_longer, inputs.tail, q.tail, T, C, K,
        **options,
    )  # fmt: skip
    mean, end = end_tangents(p, log_z, alpha, beta, d_alpha, d_beta)
    rest = (*given, *by_direction, mean, *derivatives)
    found = {}
    start = torch.zeros_like(end)
    if wanted & {"transition", "duration_bias", "initial_scores"}:
        found["transition"] = log_z.new_empty((B, K, C, C))
        found["duration_bias"], first = log_z.new_empty((2, B, K, C))
        launch(
            duration_tangent_terms_kernel, (K, B),
            *rest, found["transition"], found["duration_bias"], first, T, C, K, **options,
        )  # fmt: skip
        found["initial_scores"] = first if p.initial_scores.dim() == 2 else first.sum(1)
    if wanted & {"scores", "start_scores"}:
        launch(
            duration_start_tangent_kernel, (T, B), *rest, start, T, C, K, **options
        )  # fmt: skip
    if "duration_tail" in wanted:
        open_, inside = boundary_marginals(p, log_z, (longer + onward)[:, 1:])
        d = torch.where(inside, (d_longer + d_onward)[:, 1:] - mean[:, None, None], 0.0)
        found["duration_tail"] = (open_ * d).sum(1)
    found |= boundary_tangents(p, start, end)
    found = {name: found[name] for name in wanted}
    return log_z + inputs.common, mean + q.prefixes.common, found

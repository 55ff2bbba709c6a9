"""Hessian-vector products of log Z for transitions by duration: the launches of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.by_duration.gradient import run_passes
from flash_semicrf.streaming.triton.by_duration.passes import Messages
from flash_semicrf.streaming.triton.by_duration.tangent_passes import (
    duration_start_tangent_kernel,
    duration_tangent_pass_kernel,
    duration_tangent_terms_kernel,
)
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.posterior import (
    boundary_marginals,
    boundary_tangents,
    changes_of,
    direction_of,
    end_tangents,
    windows_of,
)
from flash_semicrf.streaming.triton.prefixes import inputs_of
from flash_semicrf.streaming.triton.records import Parameters, State
from flash_semicrf.streaming.windows import Tangents

__all__ = ["tangents", "tangents_of_pieces"]


def tangents(
    potentials: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
    return _tangents(potentials, direction, wanted, None)[0]


def tangents_of_pieces(
    p: Potentials, direction: Potentials, wanted: set[str], core: Tensor
) -> Tangents:
    """Derivatives and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    found, m, dm = _tangents(p, direction, wanted, core)
    windows = windows_of(p, core, m.alpha, m.beta)
    return Tangents(*found, windows, changes_of(p, direction, core, m, dm))


def _tangents(
    p: Potentials, direction: Potentials, wanted: set[str], core: Tensor | None
) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Messages, Messages]:
    """`tangents`, the messages and their derivatives.

    With `core` (B, 2) the derivatives by transitions and durations are of the segments that start
    in these positions.
    """
    B, T, C = p.scores.shape
    inputs, q = inputs_of(p), direction_of(direction)
    state = run_passes(inputs, both=True)
    log_z, alpha, beta, longer, onward = state.messages
    d_alpha, d_beta = torch.empty_like(alpha), torch.empty_like(beta)
    d_longer, d_onward = d_alpha, d_beta
    if p.duration_tail is not None:
        d_longer, d_onward = torch.empty_like(alpha), torch.empty_like(alpha)
    derivatives = Messages(log_z, d_alpha, d_beta, d_longer, d_onward)
    given = (state, State(q.parameters, q.prefixes, derivatives), inputs.sizes)
    launch(duration_tangent_pass_kernel, (B, 2), *given, **inputs.options)
    mean, end = end_tangents(p, log_z, alpha, beta, d_alpha, d_beta)
    derivatives = derivatives._replace(log_z=mean)
    given = (state, State(q.parameters, q.prefixes, derivatives), inputs.sizes)
    found = {}
    start = torch.zeros_like(end)
    if wanted & {"transition", "duration_bias", "initial_scores"}:
        K = p.max_duration
        to = Parameters(log_z.new_empty((B, K, C, C)), *log_z.new_empty((2, B, K, C)), None, None)
        launch(duration_tangent_terms_kernel, (K, B), *given, core, to, **inputs.options)
        found["transition"], found["duration_bias"] = to.transition, to.bias
        by_duration = p.initial_scores.dim() == 2
        found["initial_scores"] = to.initial if by_duration else to.initial.sum(1)
    if wanted & {"scores", "start_scores"}:
        launch(duration_start_tangent_kernel, (T, B), *given, start, **inputs.options)
    if "duration_tail" in wanted:
        open_, inside = boundary_marginals(p, log_z, (longer + onward)[:, 1:])
        d = torch.where(inside, (d_longer + d_onward)[:, 1:] - mean[:, None, None], 0.0)
        found["duration_tail"] = (open_ * d).sum(1)
    found |= boundary_tangents(p, start, end)
    found = {name: found[name] for name in wanted}
    found = log_z + inputs.prefixes.common, mean + q.prefixes.common, found
    return found, state.messages, derivatives

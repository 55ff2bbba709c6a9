"""Hessian-vector products of log Z for static transitions: the launches of a whole batch.

The derivatives of the messages along the direction come from one pass each way; see
`tangent_passes`. Everything else is parallel: with P(start), P(end) the marginals of boundaries,

    d P(c starts at s) = P(start) (d gamma_s + d eta_s - d log Z)
    d P(c ends at t)   = P(end) (d alpha_t + d beta_t - d log Z)

and sums over segments and boundaries, by `tangent_terms`; of segments longer than K, at their ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
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
from flash_semicrf.streaming.triton.records import Sizes, State, power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.log_messages import LogMessages, log_messages
from flash_semicrf.streaming.triton.static.plan import plan_of
from flash_semicrf.streaming.triton.static.tangent_passes import tangent_pass_kernel
from flash_semicrf.streaming.triton.static.tangent_terms import (
    duration_tangent_kernel,
    tail_tangent_kernel,
    transition_tangent_kernel,
)
from flash_semicrf.streaming.windows import Tangents

__all__ = ["tangents", "tangents_of_pieces"]

_TILE = 1024
"""Terms that a program computes at once."""


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
) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], LogMessages, LogMessages]:
    """`tangents`, the messages and their derivatives.

    With `core` (B, 2) the derivatives by transitions and durations are of the boundaries and of the
    segments that start in these positions.
    """
    inputs, q = inputs_of(p), direction_of(direction)
    sizes, CP = inputs.sizes, inputs.labels
    m = log_messages(p, problem_of(p), plan_of(p))
    dm = LogMessages(m.log_z, *(torch.empty_like(m.alpha) for _ in range(4)), m.alpha)
    if p.duration_tail is not None:
        m, dm = (x._replace(longer=torch.empty_like(m.alpha)) for x in (m, dm))
    tile = max(4, min(_TILE // CP, power_of_two_above(p.max_duration)))
    sources = max(1, min(CP, _TILE // CP))
    state, d = State(inputs.parameters, inputs.prefixes, m), State(q.parameters, q.prefixes, dm)
    options = {"CP": CP, "KT": tile, "SOURCES": sources, "num_warps": 4}
    launch(tangent_pass_kernel, (p.batch_size, 2), state, d, sizes, **options)
    mean, end = end_tangents(p, m.log_z, m.alpha, m.beta, dm.alpha, dm.beta)
    start, inside = boundary_marginals(p, m.log_z, (m.gamma + m.eta)[:, :-1])
    start *= torch.where(inside, (dm.gamma + dm.eta)[:, :-1] - mean[:, None, None], 0.0)
    found = boundary_tangents(p, start, end)
    found["initial_scores"] = start[:, 0]
    given = m, dm
    d = d._replace(messages=dm._replace(log_z=mean))
    if "transition" in wanted:
        found["transition"] = _transition_tangents(state, d, sizes, core, sources)
    if wanted & {"duration_bias", "duration_tail"}:
        # From here on the messages are h and u.
        state, d = _with_prefixes(state), _with_prefixes(d)
        m, dm = state.messages, d.messages
    if "duration_bias" in wanted:
        found["duration_bias"] = _duration_tangents(state, d, sizes, core)
        if p.duration_tail is not None:
            closed, inside = boundary_marginals(p, m.log_z, (m.longer + m.beta)[:, 1:])
            by_end = (dm.longer + dm.beta)[:, 1:] - mean[:, None, None]
            found["duration_bias"][:, -1] += (closed * torch.where(inside, by_end, 0.0)).sum(1)
    if "duration_tail" in wanted:
        to = found["duration_tail"] = m.alpha.new_empty((p.batch_size, p.num_labels))
        launch(tail_tangent_kernel, (p.batch_size,), state, d, sizes, to, CP=CP, num_warps=1)
    found = {name: found[name] for name in wanted}
    return (m.log_z + inputs.prefixes.common, mean + q.prefixes.common, found), *given


def _with_prefixes(state: State) -> State:
    """The state with h in place of gamma and u in place of beta."""
    m, x = state.messages, state.prefixes
    return state._replace(messages=m._replace(gamma=m.gamma + x.source, beta=m.beta + x.sink))


def _duration_tangents(state: State, d: State, sizes: Sizes, core: Tensor | None) -> Tensor:
    """Products for the duration scores (B, K, C)."""
    _, T, C, K = sizes
    span = max(256, 8 * K)  # so that the parts take less memory than messages
    chunks = -(-T // span)
    B = len(sizes.lengths)
    parts = state.messages.alpha.new_empty((B, chunks, K, C))
    labels = power_of_two_above(C)
    options = {"CP": labels, "TT": max(4, 512 // labels), "num_warps": 4}
    launch(duration_tangent_kernel, (K, chunks, B), state, d, sizes, core, parts, span, **options)
    return parts.sum(1)


def _transition_tangents(
    state: State, d: State, sizes: Sizes, core: Tensor | None, sources: int
) -> Tensor:
    """Products for the transitions (B, C, C); `sources` rows of A to a program."""
    _, T, C, _ = sizes
    span = 4 * C + 64  # of fewer positions, the parts would take more memory than messages
    chunks = -(-T // span)
    B = len(sizes.lengths)
    parts = state.messages.alpha.new_empty((B, chunks, C, C))
    options = {"CP": power_of_two_above(C), "SOURCES": sources, "num_warps": 4}
    grid = (-(-C // sources), chunks, B)
    launch(transition_tangent_kernel, grid, state, d, sizes, core, parts, span, **options)
    return parts.sum(1)

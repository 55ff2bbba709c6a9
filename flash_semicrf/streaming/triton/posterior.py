"""Marginals and derivatives of boundaries in plain PyTorch, for both kinds of transitions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.assembly import common_parts, running_total
from flash_semicrf.streaming.triton.prefixes import Inputs, inputs_of
from flash_semicrf.streaming.windows import Changes, Windows, after, before, boundaries, taken

__all__ = [
    "at_ends",
    "boundary_marginals",
    "boundary_tangents",
    "changes_of",
    "common_before",
    "covered",
    "direction_of",
    "end_tangents",
    "left_out",
    "running_scores",
    "windows_of",
    "with_common_parts",
]


def common_before(p: Potentials) -> Tensor:
    """Sum of the common parts of the scores before each position, (B, T + 1, 1)."""
    return running_total(common_parts(p.scores, p.lengths))[..., None]


def left_out(p: Potentials, bounds: Tensor) -> Tensor:
    """Sum of the common parts before each of some boundaries, (B, 2)."""
    return common_before(p)[..., 0].gather(1, bounds)


def with_common_parts(
    p: Potentials, log_z: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z and messages with the common parts of the scores, which the kernels leave out."""
    common = common_before(p)
    total = common[:, -1:]
    return log_z + total[:, 0, 0], alpha + common, beta + (total - common)


def _inside(p: Potentials) -> Tensor:
    """Whether a position belongs to its sequence, (B, T)."""
    return torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]


def at_ends(p: Potentials, by_position: Tensor) -> Tensor:
    """Rows of the last positions of the sequences, (B, T, C) to (B, C)."""
    return by_position[torch.arange(p.batch_size, device=p.device), p.lengths - 1]


def covered(p: Potentials, start: Tensor, end: Tensor) -> Tensor:
    """Sums over the segments that cover a position, from those by start and by end; (B, T, C)."""
    position = start.cumsum(1)
    position[:, 1:] -= end.cumsum(1)[:, :-1]
    return torch.where(_inside(p)[..., None], position, 0.0)


def boundary_marginals(p: Potentials, log_z: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log_weight - log Z) (B, T, C), 0 outside sequences; and what is inside, (B, T, 1)."""
    feasible = log_z > -torch.inf
    inside = (_inside(p) & feasible[:, None])[..., None]
    level = torch.where(feasible, log_z, 0.0)[:, None, None]
    return torch.where(inside, log_weight - level, -torch.inf).exp(), inside


def direction_of(direction: Potentials) -> Inputs:
    """A direction as kernels read it: float64, zeros for what is left out."""
    q = inputs_of(direction.to(torch.float64))
    nothing = q.parameters.transition.new_zeros(direction.num_labels)
    final, tail = (nothing if x is None else x for x in q.parameters[3:])
    return q._replace(parameters=q.parameters._replace(final=final, tail=tail))


def end_tangents(
    p: Potentials, log_z: Tensor, alpha: Tensor, beta: Tensor, d_alpha: Tensor, d_beta: Tensor
) -> tuple[Tensor, Tensor]:
    """d log Z (B,), without the common parts of the direction, and d P(end) (B, T, C).

    Messages and their derivatives are (B, T + 1, C).
    """
    marginal, inside = boundary_marginals(p, log_z, (alpha + beta)[:, 1:])
    d = torch.where(inside, (d_alpha + d_beta)[:, 1:], 0.0)
    # Better than <direction, gradient>, which multiplies large scores with rounded counts.
    weight = at_ends(p, marginal)
    mean = (weight * at_ends(p, d)).sum(1)
    mean /= torch.where(log_z > -torch.inf, weight.sum(1), 1.0)
    return mean, marginal * (d - mean[:, None, None])


def boundary_tangents(p: Potentials, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Products for parameters by position and the final scores, from those of starts and ends."""
    return {
        "scores": covered(p, start, end),
        "start_scores": start,
        "end_scores": end,
        "final_scores": at_ends(p, end),
    }


def running_scores(p: Potentials, inputs: Inputs) -> Tensor:
    """Scores before each boundary (B, T + 1, C) that `inputs` leave to boundaries: `sink` without
    end scores, of which some may forbid."""
    if p.start_scores is None and p.end_scores is None:
        return inputs.prefixes.sink
    return inputs_of(p.replace(start_scores=None, end_scores=None)).prefixes.sink


def windows_of(p: Potentials, core: Tensor, alpha: Tensor, beta: Tensor | None) -> Windows:
    """Windows of messages (B, T + 1, C), with a tail without longer segments."""
    lengths = p.lengths[:, None, None]
    place = before(core, boundaries(p))
    alpha = taken(alpha, place, (place > 0) & (place <= lengths))
    if beta is not None:
        place = after(core, boundaries(p))
        beta = taken(beta, place, (place > 0) & (place < lengths))
    return Windows(alpha, beta, left_out(p, core))


def changes_of(
    p: Potentials, direction: Potentials, core: Tensor, m: NamedTuple, dm: NamedTuple
) -> Changes:
    """Derivatives of alpha and beta (B, T + 1, C) in `dm`, of the messages in `m`."""
    marginal, _ = boundary_marginals(p, m.log_z, (m.alpha + m.beta)[:, 1:])
    return Changes(marginal, dm.alpha[:, 1:], dm.beta[:, 1:], left_out(direction, core))

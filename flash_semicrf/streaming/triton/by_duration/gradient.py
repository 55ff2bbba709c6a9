"""Log Z, messages, samples and gradients for transitions by duration: launches of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.by_duration.passes import (
    Messages,
    duration_pass_kernel,
    duration_start_kernel,
    duration_terms_kernel,
)
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.posterior import (
    at_ends,
    boundary_marginals,
    covered,
    with_common_parts,
)
from flash_semicrf.streaming.triton.prefixes import Inputs, inputs_of
from flash_semicrf.streaming.triton.records import Parameters, State
from flash_semicrf.streaming.triton.sampling import draw
from flash_semicrf.streaming.windows import Forward

__all__ = [
    "forward",
    "gradients",
    "gradients_from",
    "log_partition",
    "messages",
    "run_passes",
    "sample",
]


def run_passes(inputs: Inputs, both: bool, maximum: bool = False) -> State:
    """Run the forward pass, of either semiring, and with `both` the backward pass."""
    alpha = torch.empty_like(inputs.prefixes.sink)
    log_z = alpha.new_empty(len(alpha))
    beta, longer, onward = torch.empty_like(alpha) if both else alpha, alpha, alpha
    if inputs.parameters.tail is not None:
        longer = torch.empty_like(alpha, dtype=torch.int32 if maximum else torch.float64)
        onward = torch.empty_like(alpha) if both else alpha
    found = Messages(log_z, alpha, beta, longer, onward)
    state = State(inputs.parameters, inputs.prefixes, found)
    grid = (len(alpha), 2 if both else 1)
    launch(duration_pass_kernel, grid, state, inputs.sizes, MAX=maximum, **inputs.options)
    return state


def log_partition(potentials: Potentials) -> Tensor:
    """Log Z (B,) in float64; memory O(TC) per sequence."""
    state = run_passes(inputs_of(potentials), both=False)
    return state.messages.log_z + state.prefixes.common


def messages(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha, beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    found = run_passes(inputs_of(potentials), both=True).messages
    return with_common_parts(potentials, *found[:3])


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    inputs = inputs_of(potentials)
    found = run_passes(inputs, both=False).messages
    return draw(inputs, (found.alpha, None, found.log_z), num_samples, seed)


def forward(p: Potentials) -> Forward:
    """Messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    found = run_passes(inputs_of(p), both=False).messages
    return Forward(found.log_z, found.alpha[:, 1:], None)


def gradients(potentials: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradient for each sequence; see `flash_semicrf.streaming.dispatch.Backend`."""
    inputs = inputs_of(potentials)
    state = run_passes(inputs, both=True)
    found = gradients_from(potentials, inputs, state, wanted)
    return state.messages.log_z + inputs.prefixes.common, found


def gradients_from(
    p: Potentials, inputs: Inputs, state: State, wanted: set[str], bounds: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients from the messages of both passes.

    With `bounds` (B, 2) int64 those of the transitions and durations are of the segments that end
    inside, or have their K-th position there, and that of the tail is of the positions inside.
    """
    B, T, C = p.scores.shape
    log_z, _, _, longer, onward = state.messages
    found = {}
    if "duration_tail" in wanted:  # the positions beyond the K-th of their segment
        beyond = boundary_marginals(p, log_z, (longer + onward)[:, 1:])[0]
        if bounds is not None:
            t = torch.arange(T, device=p.device)
            inside = (t >= bounds[:, :1]) & (t < bounds[:, 1:])
            beyond = torch.where(inside[..., None], beyond, 0.0)
        found["duration_tail"] = beyond.sum(1)
    initial_by_duration = p.initial_scores is not None and p.initial_scores.dim() == 2
    if wanted & {"transition", "duration_bias"} or initial_by_duration:
        K = p.max_duration
        to = Parameters(log_z.new_empty((B, K, C, C)), *log_z.new_empty((2, B, K, C)), None, None)
        given = (state, inputs.sizes, bounds, to)
        launch(duration_terms_kernel, (K, B), *given, **inputs.options)
        found["transition"], found["duration_bias"] = to.transition, to.bias
    if wanted - found.keys():
        start, end = log_z.new_empty((2, B, T, C))
        launch(duration_start_kernel, (T, B), state, inputs.sizes, start, end, **inputs.options)
        found["scores"] = covered(p, start, end).clamp(0.0, 1.0).to(p.dtype)
        found["start_scores"], found["end_scores"] = start.to(p.dtype), end.to(p.dtype)
        found["initial_scores"] = to.initial if initial_by_duration else start[:, 0]
        found["final_scores"] = at_ends(p, end)
    return {name: found[name] for name in wanted}

"""Log Z, gradients and decoding for transitions by duration: the launches of a whole batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import common_parts, running_total
from flash_semicrf.streaming.triton.by_duration.passes import (
    duration_pass_kernel,
    duration_start_kernel,
    duration_terms_kernel,
)
from flash_semicrf.streaming.triton.by_duration.traceback import (
    duration_last_segment_kernel,
    duration_traceback_kernel,
)
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.prefixes import prefixes_of
from flash_semicrf.streaming.triton.static.launch import power_of_two_above, problem_of
from flash_semicrf.streaming.triton.static.log_messages import boundary_marginals, with_common_parts
from flash_semicrf.streaming.triton.static.viterbi import collect_table

__all__ = [
    "Inputs",
    "Passes",
    "gradients",
    "log_partition",
    "max_messages",
    "messages",
    "prepare",
    "run_passes",
    "viterbi",
]


class Inputs(NamedTuple):
    """What the kernels read, and their compile-time choices."""

    transition: Tensor
    bias: Tensor
    initial: Tensor
    final: Tensor
    lengths: Tensor
    sink: Tensor
    source: Tensor
    deep: Tensor
    born: Tensor
    common: Tensor
    tail: Tensor
    constants: dict[str, bool | int]

    @property
    def launch(self) -> dict[str, int]:
        """Label padding and warps."""
        return {"CP": self.constants["CP"], "num_warps": 8 if self.constants["CP"] > 32 else 4}


class Passes(NamedTuple):
    """What `duration_pass_kernel` writes; alpha in place of what it was not asked for."""

    log_z: Tensor  # (B,), without the common parts; the best score of the max pass
    alpha: Tensor  # (B, T + 1, C)
    beta: Tensor
    longer: Tensor
    onward: Tensor


def prepare(p: Potentials) -> Inputs:
    """Contiguous tensors, prefixes and constants of a problem."""
    problem = problem_of(p)
    labels = max(4, power_of_two_above(p.num_labels))
    bias = p.duration_bias.contiguous()
    given = (p.initial_scores, p.final_scores, p.duration_tail)
    has_initial, has_final, has_tail = (x is not None for x in given)
    return Inputs(
        p.transition.contiguous(), bias,
        p.initial_scores.expand_as(bias).contiguous() if has_initial else bias,
        p.final_scores.contiguous() if has_final else bias,
        problem.lengths, *prefixes_of(problem, labels),
        p.duration_tail.contiguous() if has_tail else bias,
        {"HAS_INITIAL": has_initial, "HAS_FINAL": has_final, "HAS_TAIL": has_tail, "CP": labels},
    )  # fmt: skip


def run_passes(p: Potentials, inputs: Inputs, both: bool, maximum: bool) -> Passes:
    """Run the forward pass, of either semiring, and with `both` the backward pass."""
    B, T, C = p.scores.shape
    log_z = torch.empty(B, dtype=torch.float64, device=p.device)
    alpha = torch.empty_like(inputs.sink)
    beta, longer, onward = torch.empty_like(alpha) if both else alpha, alpha, alpha
    if inputs.constants["HAS_TAIL"]:
        longer = torch.empty_like(alpha, dtype=torch.int32 if maximum else torch.float64)
        onward = torch.empty_like(alpha) if both else alpha
    launch(
        duration_pass_kernel, (B, 2 if both else 1),
        *inputs[:9], inputs.tail, alpha, beta, longer, onward, log_z, T, C, p.max_duration,
        HAS_FINAL=inputs.constants["HAS_FINAL"], MAX=maximum, **_options(inputs), **inputs.launch,
    )  # fmt: skip
    return Passes(log_z, alpha, beta, longer, onward)


def _options(inputs: Inputs) -> dict[str, bool]:
    return {name: inputs.constants[name] for name in ("HAS_INITIAL", "HAS_TAIL")}


def log_partition(potentials: Potentials) -> Tensor:
    """Log Z (B,) in float64; memory O(TC) per sequence."""
    inputs = prepare(potentials)
    return run_passes(potentials, inputs, False, False).log_z + inputs.common


def gradients(potentials: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z and its gradient for each sequence; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    B, T, C = p.scores.shape
    K = p.max_duration
    inputs = prepare(p)
    log_z, alpha, beta, longer, onward = run_passes(p, inputs, True, False)
    shared = (*inputs[:3], *inputs[4:9], alpha, beta, onward, log_z)
    found = {}
    if "duration_tail" in wanted:  # the positions beyond the K-th of their segment
        found["duration_tail"] = boundary_marginals(p, log_z, (longer + onward)[:, 1:])[0].sum(1)
    initial_by_duration = p.initial_scores is not None and p.initial_scores.dim() == 2
    if wanted & {"transition", "duration_bias"} or initial_by_duration:
        found["transition"] = log_z.new_empty((B, K, C, C))
        found["duration_bias"], initial = log_z.new_empty((2, B, K, C))
        launch(
            duration_terms_kernel, (K, B),
            *shared, found["transition"], found["duration_bias"], initial, T, C, K,
            **_options(inputs), **inputs.launch,
        )  # fmt: skip
    if wanted - found.keys():
        start, end = log_z.new_empty((2, B, T, C))
        launch(
            duration_start_kernel, (T, B),
            *shared, start, end, T, C, K, **_options(inputs), **inputs.launch,
        )  # fmt: skip
        position = start.cumsum(1)
        position[:, 1:] -= end.cumsum(1)[:, :-1]
        inside = torch.arange(T, device=p.device) < p.lengths[:, None]
        position = torch.where(inside[..., None], position.clamp(0.0, 1.0), 0.0)
        found["scores"] = position.to(p.dtype)
        found["start_scores"], found["end_scores"] = start.to(p.dtype), end.to(p.dtype)
        found["initial_scores"] = initial if initial_by_duration else start[:, 0]
        found["final_scores"] = end[torch.arange(B, device=p.device), p.lengths - 1]
    return log_z + inputs.common, {name: found[name] for name in wanted}


def messages(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha, beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    inputs = prepare(potentials)
    found = run_passes(potentials, inputs, True, False)
    return with_common_parts(potentials, *found[:3])


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = explicit_start(potentials)  # the kernels' own first term is a maximum in the max pass
    alpha = run_passes(p, prepare(p), False, True).alpha
    left_out = running_total(common_parts(potentials.scores, potentials.lengths))
    return alpha + left_out[..., None]


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = explicit_start(potentials)
    B, T, C = p.scores.shape
    inputs = prepare(p)
    best, alpha, _, longer, _ = run_passes(p, inputs, False, True)
    codes = torch.empty((B, T, C), dtype=torch.int32, device=p.device)
    starts, labels = torch.empty((2, B, T), dtype=torch.int32, device=p.device)
    counts = torch.empty(B, dtype=torch.int32, device=p.device)
    launch(
        duration_last_segment_kernel, (T, B),
        inputs.transition, inputs.bias, inputs.initial, inputs.lengths, inputs.source, inputs.deep,
        inputs.born, alpha, longer, codes, T, C, p.max_duration,
        **_options(inputs), **inputs.launch,
    )  # fmt: skip
    launch(
        duration_traceback_kernel, (B,),
        inputs.transition, inputs.final, inputs.lengths, alpha, codes, best, starts, labels, counts,
        T, C, p.max_duration,
        HAS_FINAL=inputs.constants["HAS_FINAL"], CP=inputs.constants["CP"], num_warps=1,
    )  # fmt: skip
    return best + inputs.common, collect_table(starts, labels, counts, inputs.lengths)

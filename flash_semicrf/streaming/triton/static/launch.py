"""Sizes, workspaces and launches of the kernels for static transitions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.static.passes import PART, far_kernel, pass_kernel
from flash_semicrf.streaming.triton.static.prepare import prepare_kernel

__all__ = [
    "CHAINS",
    "Messages",
    "Plan",
    "Problem",
    "SPAN",
    "Tables",
    "plan_of",
    "power_of_two_above",
    "problem_of",
    "run_passes",
    "tables_of",
]


SPAN = 32
"""Positions between the running scores that the passes leave for the gradients."""

CHAINS = 4
"""Sums over source labels that run side by side."""


_LONG_WINDOW = 40
"""Blocks in a window from which it pays to run a pass in parts."""


class Plan(NamedTuple):
    """How the passes of a problem are laid out.

    Attributes
    ----------
    labels : int
        C padded to a power of two.
    rows : int
        Steps of a block, R.
    blocks_back : int
        Earlier blocks whose sources a block reads.
    warps : int
        Warps that the labels take.
    groups : int
        Groups of as many warps that share the earlier blocks. More than one slows the steps down;
        the max pass gains by it, the others do not.
    in_parts : bool
        The pass comes in several launches, each after one for its far window.
    has_tail : bool
        There are durations above K.
    """

    labels: int
    rows: int
    blocks_back: int
    warps: int
    groups: int
    in_parts: bool
    has_tail: bool

    @property
    def ring(self) -> int:
        """Blocks of sources that are kept."""
        return self.blocks_back + 1

    @property
    def workspace(self) -> int:
        """float64 elements that one program needs."""
        ring_rows = self.ring * self.rows
        older = self.blocks_of_part * (self.rows + 1) if self.in_parts else 0
        return (2 * ring_rows + 2 * self.ring + 11 + older) * self.labels + ring_rows

    @property
    def max_workspace(self) -> int:
        """float64 elements that one program of the max pass needs."""
        older = self.blocks_of_part * self.rows if self.in_parts else 0
        longer = self.ring if self.has_tail else 0
        return (self.ring * (self.rows + 1) + 4 + longer + older) * self.labels

    @property
    def blocks_of_part(self) -> int:
        """Blocks of a part of a pass."""
        return PART // self.rows

    @property
    def far_groups(self) -> dict[str, int]:
        """Groups and warps of the kernels that sum the far window of a part."""
        groups = min(4, 8 // self.warps)
        return {"G": groups, "num_warps": groups * self.warps}

    def parts(self, T: int) -> list[tuple[int, int]]:
        """(begin, end) of the launches that make up a pass over T positions."""
        if not self.in_parts:
            return [(0, T)]
        return [(begin, min(begin + PART, T)) for begin in range(0, T, PART)]


class Tables(NamedTuple):
    """Output of `prepare_kernel`."""

    window: Tensor
    log_window: Tensor
    matrix: Tensor
    log_matrix: Tensor
    first: Tensor
    tail: Tensor  # empty where there is none


class Problem(NamedTuple):
    """The tensors of a batch that kernels read."""

    scores: Tensor  # (B, T, C)
    start: Tensor  # (B, T, C), or the scores without boundary scores
    end: Tensor
    lengths: Tensor  # (B,) int64
    has_boundary: bool


class Messages(NamedTuple):
    """Log Z and the messages of both passes as `pass_kernel` writes them."""

    inner_log_z: Tensor  # (B,), without the common parts of the scores, as the messages
    has_deep: Tensor  # (B,), int32
    forward: Tensor  # (B, T, C)
    backward: Tensor  # (B, T, C)
    offset: Tensor  # (2, B, T)
    prefix: Tensor  # (B, blocks, C)
    born: Tensor  # (B, blocks, C), int32


def power_of_two_above(number: int) -> int:
    """Smallest power of two that is not below a positive number.

    Plain Python, as the ceilings are: Triton's own helpers take 10 microseconds a call.
    """
    return 1 << (number - 1).bit_length()


def plan_of(
    potentials: Potentials,
    decode: bool = False,
    rows: int | None = None,
    groups: int | None = None,
) -> Plan:
    """Launch parameters by the numbers of labels and durations; the latter two are for tests."""
    labels = max(4, power_of_two_above(potentials.num_labels))
    if rows is None:
        rows = 8 if labels <= 32 else 4
    blocks_back = -(-(potentials.max_duration - 1) // rows)
    warps = {64: 2, 128: 8}.get(labels, 1)
    in_parts = groups is None and blocks_back >= _LONG_WINDOW
    if groups is None:
        groups = 2 if decode and 6 <= blocks_back < _LONG_WINDOW and warps == 1 else 1
    has_tail = potentials.duration_tail is not None
    return Plan(labels, rows, blocks_back, warps, groups, in_parts, has_tail)


def tables_of(potentials: Potentials, plan: Plan, semiring: str = "log") -> Tables:
    """Prepare the parameters that all sequences share."""
    p = potentials
    rows = plan.rows * (plan.blocks_back + 1) + 1
    CP = plan.labels
    tail_rows = 3 if plan.has_tail else 0
    sizes = [rows * CP, rows * CP, 2 * CP * CP, 2 * CP * CP, 2 * CP, tail_rows * CP]
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=p.device)
    tables = Tables(*buffer.split(sizes))
    block = 32
    has_initial, has_final = p.initial_scores is not None, p.final_scores is not None
    launch(
        prepare_kernel, (1 + -(-rows // block),),
        p.transition.contiguous(), p.duration_bias.contiguous(),
        p.initial_scores.contiguous() if has_initial else p.transition,
        p.final_scores.contiguous() if has_final else p.transition,
        p.duration_tail.contiguous() if plan.has_tail else p.transition,
        *tables, p.num_labels, p.max_duration, rows, plan.rows,
        HAS_INITIAL=has_initial, HAS_FINAL=has_final, HAS_TAIL=plan.has_tail, MAX=semiring == "max",
        CP=CP, ROWS=block, num_warps=4,
    )  # fmt: skip
    return tables


def problem_of(potentials: Potentials) -> Problem:
    """Contiguous tensors; zeros for the one of start and end scores that is missing."""
    p = potentials
    scores = p.scores.contiguous()
    start, end = p.start_scores, p.end_scores
    has_boundary = start is not None or end is not None
    if has_boundary:
        start, end = (
            torch.zeros_like(scores) if x is None else x.contiguous() for x in (start, end)
        )
    else:
        start = end = scores
    return Problem(scores, start, end, p.lengths.contiguous(), has_boundary)


def run_passes(
    potentials: Potentials,
    problem: Problem,
    plan: Plan,
    keep: bool,
    always_log: bool = False,
) -> tuple[Tensor, Tables, Messages | None]:
    """Log Z (B,) by the forward pass; with `keep` both passes run, and their messages are kept."""
    p = potentials
    tables = tables_of(p, plan)
    directions = 2 if keep else 1
    B, T, C = problem.scores.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=p.device)

    workspace = empty(B * directions * plan.workspace)
    log_z, has_deep = empty(2, B), empty(B, dtype=torch.int32)
    messages = None
    outputs = (log_z,) * 5
    if keep:
        blocks = T // SPAN + 2
        outputs = (
            empty(B, T, C), empty(B, T, C), empty(2, B, T), empty(B, blocks, C),
            empty(B, blocks, C, dtype=torch.int32),
        )  # fmt: skip
        messages = Messages(log_z[0], has_deep, *outputs)
    for begin, end in plan.parts(T):
        if plan.in_parts:
            launch(
                far_kernel, (plan.blocks_of_part, B * directions), tables.window, workspace, begin,
                plan.blocks_back, plan.ring, plan.workspace, CP=plan.labels, R=plan.rows,
                **plan.far_groups,
            )  # fmt: skip
        launch(
            pass_kernel, (B, directions),
            problem.scores, problem.start, problem.end, problem.lengths, *tables, workspace, log_z,
            has_deep, *outputs, T, C, p.max_duration, begin, end, plan.blocks_back, plan.ring,
            plan.workspace, 1, int(always_log), HAS_BOUNDARY=problem.has_boundary, BACKWARD=keep,
            KEEP=keep, PARTS=plan.in_parts, HAS_TAIL=plan.has_tail, CP=plan.labels, R=plan.rows,
            G=plan.groups, CHAINS=CHAINS, SPAN=SPAN, num_warps=plan.warps * plan.groups,
        )  # fmt: skip
    return log_z[1], tables, messages

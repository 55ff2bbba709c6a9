"""Launches of the tables and of the passes of log Z for static transitions."""

from __future__ import annotations

import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Problem, Sizes, form_of, parameters_of
from flash_semicrf.streaming.triton.static.far import far_kernel
from flash_semicrf.streaming.triton.static.halves import BLOCKS, join_kernel, total_kernel
from flash_semicrf.streaming.triton.static.narrow.launch import run_narrow_passes
from flash_semicrf.streaming.triton.static.passes import Messages, pass_kernel
from flash_semicrf.streaming.triton.static.plan import SPAN, Done, Part, Plan
from flash_semicrf.streaming.triton.static.prepare import Tables, prepare_kernel

__all__ = ["run_halves", "run_passes", "tables_of"]


def tables_of(p: Potentials, sizes: Sizes, plan: Plan, maximum: bool = False) -> Tables:
    """Prepare the parameters that all sequences share."""
    rows = plan.rows * plan.ring + 1
    CP = plan.labels
    elements = [rows * CP, rows * CP, 2 * CP * CP, 2 * CP * CP, 2 * CP]
    if plan.has_tail:
        elements.append(3 * CP)
    buffer = torch.empty(sum(elements), dtype=torch.float64, device=p.device)
    tables = Tables(*torch.split_with_sizes(buffer, elements))
    block = 32
    arguments = (parameters_of(p), tables, sizes, rows, plan.rows)
    grid = (1 + -(-rows // block),)
    options = {"MAX": maximum, "CP": CP, "ROWS": block, "num_warps": 4}
    launch(prepare_kernel, grid, *arguments, form=form_of(p), **options)
    return tables


def run_passes(
    p: Potentials,
    problem: Problem,
    plan: Plan,
    keep: bool,
    always_log: bool = False,
    directions: int = 2,
    narrow: bool = False,
) -> tuple[Tables, Messages]:
    """Log Z by the forward pass; with `keep` messages are kept, and both passes run.

    With `keep` and 1 of the `directions` it is the forward pass alone, and `backward` the memory of
    its messages. With `narrow` passes are in float32 where their results are certain.
    """
    tables = tables_of(p, problem.sizes, plan)
    directions = directions if keep else 1
    B, T, C = problem.scores.shape
    parts = plan.parts(T, always_log=always_log)

    def empty(elements: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(elements, dtype=dtype, device=p.device)

    # Apart, as they are needed for different times.
    workspace, log_z = empty(B * directions * parts[0].stride), empty(2 * B).view(2, B)
    kept = [None] * 5
    blocks = T // SPAN + 2 if keep else 0
    integers = [B, B * blocks * C]
    has_deep, born = torch.split_with_sizes(empty(sum(integers), torch.int32), integers)
    if keep:
        each = [B * T * C] * directions
        elements = [*each, directions * B * T, B * blocks * C]
        *rows, offset, prefix = torch.split_with_sizes(empty(sum(elements)), elements)
        kept = [rows[0], rows[-1], offset, prefix, born]
    messages = Messages(log_z, has_deep, *kept)
    done = None
    form = (form_of(p), keep, narrow, False)
    if narrow:
        flags = run_narrow_passes(problem, plan, tables, messages, directions, form)
        done = Done(flags, directions)
    memory = tables, workspace, messages, done
    _launch_parts(problem, plan, memory, parts, directions, form)
    return tables, messages


def _launch_parts(
    problem: Problem,
    plan: Plan,
    memory: tuple[Tables, torch.Tensor, Messages, Done | None],
    parts: list[Part],
    directions: int,
    form: tuple,
) -> None:
    """Launch a pass, its far windows where it comes in parts; the last of `form` says whether the
    directions meet in the middle."""
    B = len(problem.scores)
    tables, workspace, messages, done = memory
    options = {"HALVES": form[-1], "SPAN": SPAN, **plan.options}
    for part in parts:
        if plan.in_parts:
            grid = (plan.blocks_of_part, B * directions)
            arguments = (tables.window, None, workspace, part, done)
            launch(far_kernel, grid, *arguments, MAX=False, **plan.far_options)
        arguments = (problem, tables, workspace, messages, part, done)
        launch(pass_kernel, (B, directions), *arguments, form=form, **options)


def run_halves(
    p: Potentials, problem: Problem, plan: Plan, always_log: bool = False
) -> torch.Tensor:
    """Log Z (2, B), as in `Messages`, by two passes that meet; not with a duration tail."""
    tables = tables_of(p, problem.sizes, plan)
    B, T, _ = problem.scores.shape
    parts = plan.parts(plan.longest_half(T), always_log=always_log)
    ring, count = plan.ring, -(-plan.ring // BLOCKS)
    sizes = [B * count * ring, 2 * B * parts[0].stride]
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=p.device)
    joined, workspace = buffer.split(sizes)
    log_z = buffer.new_empty(2, B)  # apart from the buffer, which would otherwise be kept with it
    messages = Messages(log_z, *[None] * 6)
    form = (form_of(p), False, False, True)
    _launch_parts(problem, plan, (tables, workspace, messages, None), parts, 2, form)
    constants = {"CP": plan.labels, "R": plan.rows}
    arguments = (problem, tables.log_window, workspace, parts[0], joined)
    warps = max(1, min(4, plan.rows * plan.rows * plan.labels // 256))
    grid = (ring, count, B)
    launch(join_kernel, grid, *arguments, COUNT=BLOCKS, **constants, num_warps=warps)
    arguments = (problem.sizes, workspace, parts[0], joined, count * ring, log_z)
    launch(total_kernel, (B,), *arguments, **constants, TILE=512, num_warps=4)
    return log_z

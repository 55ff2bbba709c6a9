"""Launches of the narrow pass."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.records import Problem
from flash_semicrf.streaming.triton.static.narrow.far import narrow_far_kernel
from flash_semicrf.streaming.triton.static.narrow.memory import NarrowMemory
from flash_semicrf.streaming.triton.static.narrow.passes import narrow_pass_kernel
from flash_semicrf.streaming.triton.static.narrow.tables import NarrowTables, narrow_tables_kernel
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import SPAN, Plan
from flash_semicrf.streaming.triton.static.prepare import Tables

__all__ = ["run_narrow_passes"]


def _tables_of(tables: Tables, durations: int, plan: Plan) -> NarrowTables:
    CP, R, groups = plan.labels, plan.rows, plan.ring + 2
    words = -(-CP // 32)
    floats = [groups * R * CP, 2 * CP * CP]
    integers = [groups * CP, 2 * CP, 2 * words * CP]
    device = tables.window.device
    narrow = NarrowTables(
        *torch.empty(sum(floats), dtype=torch.float32, device=device).split(floats),
        *torch.empty(sum(integers), dtype=torch.int32, device=device).split(integers),
    )
    arguments = (tables, narrow, durations)
    constants = {"CP": CP, "R": R, "WORDS": words}
    launch(narrow_tables_kernel, (groups + 2,), *arguments, **constants, num_warps=4)
    return narrow


def run_narrow_passes(
    problem: Problem, plan: Plan, tables: Tables, messages: Messages, directions: int, form: tuple
) -> Tensor:
    """Run one pass or both into `messages`.

    Returns
    -------
    int32 Tensor of shape (directions, B)
        1 where the results of a pass are certain.
    """
    B, T, _ = problem.scores.shape
    device = problem.scores.device
    narrow = _tables_of(tables, problem.sizes.K, plan)
    memory = NarrowMemory.of(B * directions, plan, device)
    done = torch.empty((directions, B), dtype=torch.int32, device=device)
    constants = {"CP": plan.labels, "R": plan.rows}
    for part in plan.parts(T):
        if plan.in_parts:
            grid = (plan.blocks_of_part, B * directions)
            options = {**constants, "num_warps": plan.warps}
            launch(narrow_far_kernel, grid, narrow, memory, part, **options)
        arguments = (problem, tables.first, narrow, memory, messages, done, part)
        options = {"PARTS": plan.in_parts, **constants, "SPAN": SPAN, "num_warps": plan.warps}
        launch(narrow_pass_kernel, (B, directions), *arguments, form=form, **options)
    return done

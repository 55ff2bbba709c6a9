"""Decoding for static transitions: the launches of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.posterior import common_before
from flash_semicrf.streaming.triton.records import Problem, form_of, problem_of
from flash_semicrf.streaming.triton.static.far import far_kernel
from flash_semicrf.streaming.triton.static.launch import tables_of
from flash_semicrf.streaming.triton.static.max_pass import MaxMessages, max_pass_kernel
from flash_semicrf.streaming.triton.static.plan import Plan, plan_of
from flash_semicrf.streaming.triton.static.prepare import Tables
from flash_semicrf.streaming.triton.static.traceback import (
    last_segment_kernel,
    longer_segment_kernel,
    previous_segment_kernel,
    traceback_kernel,
)
from flash_semicrf.streaming.triton.table import collect_table, walks_of

__all__ = ["decoded", "max_messages", "viterbi"]


def _run_pass(p: Potentials, problem: Problem, plan: Plan) -> tuple[Tables, MaxMessages]:
    """Run the max pass."""
    tables = tables_of(p, problem.sizes, plan, maximum=True)
    B, T, C = problem.scores.shape
    parts = plan.parts(T, maximum=True)
    sizes = [B * T * C, B * T * C, B, B * parts[0].stride]
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=p.device)
    *outputs, workspace = torch.split_with_sizes(buffer, sizes)
    found = MaxMessages(*outputs, torch.empty(B, dtype=torch.int32, device=p.device))
    form = form_of(p)
    for part in parts:
        if plan.in_parts:
            grid = (plan.blocks_of_part, B)
            arguments = (tables.log_window, tables.tail, workspace, part, None)
            launch(far_kernel, grid, *arguments, MAX=True, **plan.far_options)
        arguments = (problem, tables, workspace, found, part)
        launch(max_pass_kernel, (B,), *arguments, form=form, **plan.options)
    return tables, found


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    return decoded(potentials)[:2]


def decoded(p: Potentials) -> tuple[Tensor, SegmentTable, Tensor]:
    """Best scores, segments, and the messages of the max pass, flat: alpha_{p+1} in row p."""
    plan, problem = plan_of(p, decode=True), problem_of(p)
    scores, sizes, CP = problem.scores, problem.sizes, plan.labels
    tables, m = _run_pass(p, problem, plan)
    B, T, C = scores.shape
    codes, pointers = torch.empty((2, B * T * C), dtype=torch.int32, device=p.device)
    given = (scores, sizes, tables, m)
    longer = m.sources
    if plan.has_tail:
        longer = torch.empty_like(m.sources)
        warps = max(1, CP // 32)
        launch(longer_segment_kernel, (B,), *given, longer, pointers, CP=CP, num_warps=warps)
    tile = max(1, 1024 // CP)
    grid, options = (-(-T // tile), B), {"CP": CP, "TT": tile, "num_warps": 4}
    form = (scores.dtype, plan.has_tail)
    launch(last_segment_kernel, grid, *given, longer, pointers, codes, form=form, **options)
    tables_before = (tables.log_matrix, tables.first)
    arguments = (sizes, *tables_before, m, codes, pointers)
    launch(previous_segment_kernel, grid, *arguments, form=(), **options)
    walks = walks_of(B, T, p.device)
    arguments = (sizes, m.best, pointers, walks)
    launch(traceback_kernel, (B,), *arguments, form=(), CP=CP, num_warps=1)
    return m.best, collect_table(walks, sizes), m.alpha


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    _, found = _run_pass(potentials, problem_of(potentials), plan_of(potentials, decode=True))
    alpha = found.alpha.view(potentials.scores.shape)
    return torch.cat([torch.zeros_like(alpha[:, :1]), alpha], 1) + common_before(potentials)

"""Decoding: the launches of a whole batch, for static transitions and by duration."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import common_parts, running_total
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.static.launch import (
    CHAINS,
    Plan,
    Problem,
    plan_of,
    problem_of,
    tables_of,
)
from flash_semicrf.streaming.triton.static.max_pass import far_maxima_kernel, max_pass_kernel
from flash_semicrf.streaming.triton.static.traceback import (
    last_segment_kernel,
    longer_segment_kernel,
    previous_segment_kernel,
    table_kernel,
    traceback_kernel,
)

__all__ = ["collect_table", "max_messages", "viterbi"]


def _messages(p: Potentials, problem: Problem, plan: Plan) -> tuple[Tensor, ...]:
    """Alpha, sources (B, T, C), best scores (B,), whether there are masks (B,), tables."""
    tables = tables_of(p, plan, "max")
    B, T, C = problem.scores.shape
    sizes = [B * T * C, B * T * C, B, B * plan.max_workspace]
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=p.device)
    alpha, sources, best, workspace = buffer.split(sizes)
    masked = torch.empty(B, dtype=torch.int32, device=p.device)
    for begin, end in plan.parts(T):
        if plan.in_parts:
            launch(
                far_maxima_kernel, (plan.blocks_of_part, B), tables.log_window, tables.tail,
                workspace, begin, plan.blocks_back, plan.ring, plan.max_workspace,
                HAS_TAIL=plan.has_tail, CP=plan.labels, R=plan.rows, **plan.far_groups,
            )  # fmt: skip
        launch(
            max_pass_kernel, (B,),
            problem.scores, problem.start, problem.end, problem.lengths, tables.log_window,
            tables.log_matrix, tables.first, tables.tail, workspace, alpha, sources, best, masked,
            T, C, begin, end, plan.blocks_back, plan.ring, plan.max_workspace, 1,
            HAS_BOUNDARY=problem.has_boundary, HAS_TAIL=plan.has_tail, PARTS=plan.in_parts,
            CP=plan.labels, R=plan.rows, G=plan.groups, CHAINS=CHAINS,
            num_warps=plan.warps * plan.groups,
        )  # fmt: skip
    return alpha.view(B, T, C), sources, best, masked, tables


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    plan, problem = plan_of(p, decode=True), problem_of(p)
    alpha, sources, best, masked, tables = _messages(p, problem, plan)
    B, T, C = problem.scores.shape
    # int32: the codes of the last segments, the pointers, the segments, and their numbers.
    cells, rows = B * T * C, B * T
    buffer = torch.empty(2 * cells + 2 * rows + B, dtype=torch.int32, device=p.device)
    codes, pointers, starts, labels, counts = buffer.split([cells, cells, rows, rows, B])
    starts, labels = starts.view(B, T), labels.view(B, T)
    longer = sources
    if plan.has_tail:
        longer = torch.empty_like(sources)
        launch(
            longer_segment_kernel, (B,),
            problem.scores, problem.lengths, masked, sources, tables.log_window, tables.tail,
            longer, pointers, T, C, p.max_duration, CP=plan.labels,
            num_warps=max(1, plan.labels // 32),
        )  # fmt: skip
    tile = max(1, 1024 // plan.labels)
    grid = (-(-T // tile), B)
    launch(
        last_segment_kernel, grid,
        problem.scores, problem.lengths, masked, sources, tables.log_window, longer, pointers,
        codes, T, C, p.max_duration, HAS_TAIL=plan.has_tail, CP=plan.labels, TT=tile, num_warps=4,
    )  # fmt: skip
    launch(
        previous_segment_kernel, grid,
        problem.lengths, alpha, tables.log_matrix, tables.first, codes, pointers, T, C,
        CP=plan.labels, TT=tile, num_warps=4,
    )  # fmt: skip
    launch(
        traceback_kernel,
        (B,),
        problem.lengths,
        best,
        pointers,
        starts,
        labels,
        counts,
        T,
        C,
        CP=plan.labels,
        num_warps=1,
    )
    return best, collect_table(starts, labels, counts, problem.lengths)


def collect_table(starts: Tensor, labels: Tensor, counts: Tensor, lengths: Tensor) -> SegmentTable:
    """Table of the last `counts` entries of each row of `starts` and `labels` (B, T).

    Waits for the device: the number of rows decides a shape.
    """
    B, T = starts.shape
    total = int(counts.sum())
    table = torch.empty((4, total), dtype=torch.int64, device=starts.device)
    launch(
        table_kernel, (B,), starts, labels, counts, lengths, table, T, total, BLOCK=128, num_warps=4
    )
    return SegmentTable(*table)


def max_messages(potentials: Potentials) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    alpha, *_ = _messages(potentials, problem_of(potentials), plan_of(potentials, decode=True))
    left_out = running_total(common_parts(potentials.scores, potentials.lengths))
    return torch.cat([torch.zeros_like(alpha[:, :1]), alpha], 1) + left_out[..., None]

"""The messages of both passes as logarithms, for static transitions.

What the passes store is a number and an offset per row; see `numerics`. Here, for all boundaries at
once, it becomes a logarithm, and the sum over labels across the boundary is taken beside it:

    gamma_t(c) = LSE_{c'} [alpha_t(c') + A[c', c]],    gamma_0 = the initial term
    beta_t(c') = LSE_c [A[c', c] + eta_t(c)],          beta_T = the final scores

Cost T C², in parallel; float64. Messages leave out the common parts of the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.jit import launch
from flash_semicrf.streaming.triton.numerics import decode_log, exp_wide, finite
from flash_semicrf.streaming.triton.posterior import with_common_parts
from flash_semicrf.streaming.triton.prefixes import inputs_of
from flash_semicrf.streaming.triton.records import Problem, problem_of
from flash_semicrf.streaming.triton.sampling import draw
from flash_semicrf.streaming.triton.static.launch import run_passes
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import Plan, plan_of
from flash_semicrf.streaming.triton.static.prepare import Tables
from flash_semicrf.streaming.windows import Forward

__all__ = [
    "LogMessages",
    "forward",
    "log_messages",
    "log_messages_kernel",
    "messages",
    "sample",
]


class LogMessages(NamedTuple):
    """Logarithms of the messages, rows 0..T; those after a sequence's end are arbitrary."""

    log_z: Tensor  # (B,), without the common parts
    alpha: Tensor  # (B, T + 1, C)
    gamma: Tensor  # its last row is arbitrary
    eta: Tensor  # its last row is arbitrary
    beta: Tensor
    longer: Tensor  # G of `by_duration.passes`; alpha where it is not computed


@triton.jit
def log_messages_kernel(
    sizes, matrix_ptr, edge_ptr, stored_ptr, offset_ptr, own_ptr, across_ptr, FORWARD, CP, TT
):
    """Rows 0..T of alpha and gamma if FORWARD, else of eta and beta; program (tile of TT rows, b).

    `stored` (B, T, C) and `offset` (B, T) by `pass_kernel`; `matrix` (CP, CP) the log matrix of the
    pass, `edge` (CP,) gamma_0 or beta_T.
    """
    T, C = sizes.T, sizes.C
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TT + tl.arange(0, TT)
    label = tl.arange(0, CP)[None, :]
    length = tl.load(sizes.lengths + b).to(tl.int32)
    if FORWARD:
        row = t - 1
        edge = t == 0
    else:
        row = t
        edge = t == length
    known = (row >= 0) & (row < length)
    offset = tl.load(offset_ptr + b * T + row, mask=known, other=0.0)
    rows_ptr = stored_ptr + (b * T + row) * C
    value = tl.load(rows_ptr[:, None] + label, mask=known[:, None] & (label < C), other=0.0)
    own = decode_log(value) + offset[:, None]
    if FORWARD:
        own = tl.where(edge[:, None], 0.0, own)
    # Twice over the labels, for the largest term and for the sum: a loop keeps the kernel small.
    top = tl.full([TT, CP], float("-inf"), tl.float64)
    for source in range(C):
        message = tl.load(rows_ptr + source, mask=known, other=0.0)
        x = (decode_log(message) + offset)[:, None] + tl.load(matrix_ptr + source * CP + label)
        top = tl.maximum(top, x)
    top = finite(top)
    total = tl.zeros([TT, CP], tl.float64)
    for source in range(C):
        message = tl.load(rows_ptr + source, mask=known, other=0.0)
        x = (decode_log(message) + offset)[:, None] + tl.load(matrix_ptr + source * CP + label)
        total += exp_wide(x - top)
    across = tl.where(edge[:, None], tl.load(edge_ptr + label), top + tl.log(total))
    place = (b * (T + 1) + t)[:, None] * C + label
    listed = (t <= length)[:, None] & (label < C)
    tl.store(own_ptr + place, own, mask=listed)
    tl.store(across_ptr + place, across, mask=listed)


def _logarithms(
    p: Potentials, plan: Plan, problem: Problem, passes: tuple[Tables, Messages], direction: int
) -> tuple[Tensor, Tensor]:
    """Alpha and gamma, or of direction 1 eta and beta, from what the passes store."""
    tables, stored = passes
    B, T, C = problem.scores.shape
    to = torch.empty((2, B, T + 1, C), dtype=torch.float64, device=p.device).unbind()
    tile = max(1, 1024 // plan.labels)
    grid, options = (-(-(T + 1) // tile), B), {"CP": plan.labels, "TT": tile, "num_warps": 4}
    offsets = stored.offset.view(-1, B * T)
    matrices, edges = tables.log_matrix.view(2, -1), tables.first[: 2 * plan.labels].view(2, -1)
    rows = (stored.backward if direction else stored.forward, offsets[direction])
    arguments = (problem.sizes, matrices[direction], edges[direction], *rows, *to)
    launch(log_messages_kernel, grid, *arguments, FORWARD=direction == 0, **options)
    return to


def log_messages(p: Potentials, problem: Problem, plan: Plan) -> LogMessages:
    """Run both passes and take the logarithms of their messages."""
    passes = run_passes(p, problem, plan, True)
    alpha, gamma = _logarithms(p, plan, problem, passes, 0)
    eta, beta = _logarithms(p, plan, problem, passes, 1)
    return LogMessages(passes[1].log_z[0], alpha, gamma, eta, beta, alpha)


def messages(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha, beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    p = potentials
    found = log_messages(p, problem_of(p), plan_of(p))
    return with_common_parts(p, found.log_z, found.alpha, found.beta)


def _forward(p: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Alpha, gamma and log Z, by the forward pass alone."""
    plan, problem = plan_of(p), problem_of(p)
    passes = run_passes(p, problem, plan, True, directions=1)
    return (*_logarithms(p, plan, problem, passes, 0), passes[1].log_z[0])


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
    return draw(inputs_of(potentials), _forward(potentials), num_samples, seed)


def forward(p: Potentials) -> Forward:
    """Messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
    alpha, gamma, log_z = _forward(p)
    return Forward(log_z, alpha[:, 1:], gamma[:, :-1])

"""Operations on the pieces of long sequences; see `flash_semicrf.streaming.pieces.cutting.Cutting`.

Windows are read from the messages in plain PyTorch, before the gradients overwrite them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.posterior import left_out
from flash_semicrf.streaming.triton.records import problem_of
from flash_semicrf.streaming.triton.static.decoding import decoded
from flash_semicrf.streaming.triton.static.gradient import Core, gradients_from
from flash_semicrf.streaming.triton.static.launch import run_passes
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import plan_of
from flash_semicrf.streaming.windows import Windows, after, before, taken

__all__ = ["gradients_of_pieces", "log_partition_of_pieces", "viterbi_of_pieces"]

_ROUNDINGS = 8.0
"""Largest difference of float32 messages in one window, in roundings times the square root of the
number of steps: four standard deviations of some four roundings a step."""


def log_partition_of_pieces(
    p: Potentials, core: Tensor, narrow: bool = False
) -> tuple[Tensor, Windows]:
    """Log Z and the windows of the forward pass; in float32 with `narrow`."""
    form = {"directions": 1, "narrow": narrow}
    _, messages = run_passes(p, problem_of(p), plan_of(p), keep=True, **form)
    return messages.log_z[1], _windows(p, core, messages, both=False, narrow=narrow)


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor, span: int, narrow: bool = False
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients and the windows of both passes, which are in float32 with `narrow`."""
    plan, problem = plan_of(p), problem_of(p)
    tables, messages = run_passes(p, problem, plan, keep=True, narrow=narrow)
    windows = _windows(p, core, messages, both=True, narrow=narrow)
    found = gradients_from(p, problem, plan, (tables, messages), wanted, Core(core, span))
    return messages.log_z[1], found, windows


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best scores, segments and the windows of the max pass."""
    best, table, alpha = decoded(p)
    place = before(core, p.max_duration)
    valid = (place > 0) & (place <= p.lengths[:, None, None])
    alpha = taken(alpha.view(p.scores.shape), place - 1, valid)
    return best, table, Windows(alpha, None, left_out(p, core))


def _windows(p: Potentials, core: Tensor, messages: Messages, both: bool, narrow: bool) -> Windows:
    lengths = p.lengths[:, None, None]
    place = before(core, p.max_duration)
    valid = (place > 0) & (place <= lengths)
    shape = p.scores.shape
    offset = messages.offset.view(-1, *shape[:2])
    alpha = _logs(messages.forward.view(shape), offset[0], place - 1, valid)
    eta = None
    if both:
        place = after(core, p.max_duration)
        valid = (place > 0) & (place < lengths)
        eta = _logs(messages.backward.view(shape), offset[1], place, valid)
    rounding = 0.0
    if narrow:  # of the mantissas, at random, over a window
        rounding = _ROUNDINGS * torch.finfo(torch.float32).eps * math.sqrt(8 + p.max_duration)
    return Windows(alpha, eta, left_out(p, core), rounding)


def _logs(rows: Tensor, offsets: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """Logarithms of stored messages, in the forms of `flash_semicrf.streaming.triton.numerics`."""
    value = taken(rows, place, valid)
    log = torch.where(value < 0, value + 1.0, value.log())
    return log + taken(offsets, place, valid)[..., None]

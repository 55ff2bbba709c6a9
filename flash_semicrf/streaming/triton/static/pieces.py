"""Operations on the pieces of long sequences; see `flash_semicrf.streaming.pieces.cutting.Cutting`.

Windows are read from the messages in plain PyTorch, before the gradients overwrite them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.posterior import left_out
from flash_semicrf.streaming.triton.records import Problem, problem_of
from flash_semicrf.streaming.triton.static.decoding import decoded
from flash_semicrf.streaming.triton.static.gradient import Core, gradients_from
from flash_semicrf.streaming.triton.static.launch import run_passes
from flash_semicrf.streaming.triton.static.log_messages import logarithms
from flash_semicrf.streaming.triton.static.longer import longer_after, longer_before
from flash_semicrf.streaming.triton.static.passes import Messages
from flash_semicrf.streaming.triton.static.plan import Plan, plan_of
from flash_semicrf.streaming.triton.static.prepare import Tables
from flash_semicrf.streaming.windows import Windows, after, before, boundaries, taken, with_longer

__all__ = ["gradients_of_pieces", "log_partition_of_pieces", "viterbi_of_pieces"]


def log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    """Log Z and the windows of the forward pass."""
    plan, problem = plan_of(p), problem_of(p)
    passes = run_passes(p, problem, plan, keep=True, directions=1)
    windows = _windows(p, core, passes[1], both=False)
    return passes[1].log_z[1], _with_tail(windows, p, core, plan, problem, passes)


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor, span: int
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients and the windows of both passes."""
    plan, problem = plan_of(p), problem_of(p)
    tables, messages = run_passes(p, problem, plan, keep=True)
    windows = _windows(p, core, messages, both=True)
    windows = _with_tail(windows, p, core, plan, problem, (tables, messages))
    found = gradients_from(p, problem, plan, (tables, messages), wanted, Core(core, span))
    return messages.log_z[1], found, windows


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best scores, segments and the windows of the max pass."""
    best, table, alpha = decoded(p)
    place = before(core, p.max_duration)
    valid = (place > 0) & (place <= p.lengths[:, None, None])
    alpha = taken(alpha.view(p.scores.shape), place - 1, valid)
    return best, table, Windows(alpha, None, left_out(p, core))


def _windows(p: Potentials, core: Tensor, messages: Messages, both: bool) -> Windows:
    lengths = p.lengths[:, None, None]
    place = before(core, boundaries(p))
    valid = (place > 0) & (place <= lengths)
    shape = p.scores.shape
    offset = messages.offset.view(-1, *shape[:2])
    alpha = _logs(messages.forward.view(shape), offset[0], place - 1, valid)
    eta = None
    if both:
        place = after(core, boundaries(p))
        valid = (place > 0) & (place < lengths)
        eta = _logs(messages.backward.view(shape), offset[1], place, valid)
    return Windows(alpha, eta, left_out(p, core))


def _with_tail(
    windows: Windows,
    p: Potentials,
    core: Tensor,
    plan: Plan,
    problem: Problem,
    passes: tuple[Tables, Messages],
) -> Windows:
    """With a tail, windows that have the segments longer than K, too."""
    if p.duration_tail is None:
        return windows
    _, gamma = logarithms(p, plan, problem, passes, 0)
    windows = windows._replace(alpha=with_longer(windows.alpha, longer_before(p, core, gamma)))
    if windows.beta is None:
        return windows
    _, beta = logarithms(p, plan, problem, passes, 1)
    return windows._replace(beta=with_longer(windows.beta, longer_after(p, core, beta)))


def _logs(rows: Tensor, offsets: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """Logarithms of stored messages, in the forms of `flash_semicrf.streaming.triton.numerics`."""
    value = taken(rows, place, valid)
    log = torch.where(value < 0, value + 1.0, value.log())
    return log + taken(offsets, place, valid)[..., None]

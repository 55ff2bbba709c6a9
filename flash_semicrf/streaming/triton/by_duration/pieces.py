"""Operations on the pieces of long sequences; see `flash_semicrf.streaming.pieces.cutting.Cutting`.

Messages are logarithms already: windows are taken from them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.by_duration.decoding import decoded
from flash_semicrf.streaming.triton.by_duration.gradient import gradients_from, run_passes
from flash_semicrf.streaming.triton.posterior import running_scores, windows_of
from flash_semicrf.streaming.triton.prefixes import Inputs, inputs_of
from flash_semicrf.streaming.triton.records import State
from flash_semicrf.streaming.windows import Windows, taken, with_longer

__all__ = ["gradients_of_pieces", "log_partition_of_pieces", "viterbi_of_pieces"]


def log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    """Log Z and the windows of the forward pass."""
    inputs = inputs_of(p)
    state = run_passes(inputs, both=False)
    windows = _windows(p, core, inputs, state, both=False)
    return state.messages.log_z + inputs.prefixes.common, windows


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor, span: int
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients and the windows of both passes."""
    inputs = inputs_of(p)
    state = run_passes(inputs, both=True)
    windows = _windows(p, core, inputs, state, both=True)
    found = gradients_from(p, inputs, state, wanted, core)
    return state.messages.log_z + inputs.prefixes.common, found, windows


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best scores, segments and the windows of the max pass."""
    best, table, alpha = decoded(p)
    return best, table, windows_of(p, core, alpha, None)


def _windows(p: Potentials, core: Tensor, inputs: Inputs, state: State, both: bool) -> Windows:
    """Windows; with a tail, too, of what the longer segments that end at a boundary have, and of
    what may follow K positions and more of those that have K behind them K - 1 boundaries on."""
    m = state.messages
    found = windows_of(p, core, m.alpha, m.beta if both else None)
    if p.duration_tail is None:
        return found
    running = running_scores(p, inputs)
    place = core[..., None]
    longer = taken(m.longer, place, place > 0) + taken(running, place, place > 0)
    found = found._replace(alpha=with_longer(found.alpha, longer))
    if found.beta is None:
        return found
    place = place + p.max_duration - 1
    valid = place < p.lengths[:, None, None]
    onward = taken(m.onward, place, valid)
    onward = torch.where(valid[..., None], onward - taken(running, place, valid), onward)
    return found._replace(beta=with_longer(found.beta, onward))

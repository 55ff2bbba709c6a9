"""Operations on the pieces of long sequences; see `flash_semicrf.streaming.pieces.cutting.Cutting`.

Messages are logarithms already: windows are taken from them as they are.
"""

from __future__ import annotations

from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.triton.by_duration.decoding import decoded
from flash_semicrf.streaming.triton.by_duration.gradient import gradients_from, run_passes
from flash_semicrf.streaming.triton.posterior import windows_of
from flash_semicrf.streaming.triton.prefixes import inputs_of
from flash_semicrf.streaming.windows import Windows

__all__ = ["gradients_of_pieces", "log_partition_of_pieces", "viterbi_of_pieces"]


def log_partition_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, Windows]:
    """Log Z and the windows of the forward pass."""
    state = run_passes(inputs_of(p), both=False)
    found = state.messages
    return found.log_z + state.prefixes.common, windows_of(p, core, found.alpha, None)


def gradients_of_pieces(
    p: Potentials, wanted: set[str], core: Tensor, span: int
) -> tuple[Tensor, dict[str, Tensor], Windows]:
    """Log Z, gradients and the windows of both passes."""
    inputs = inputs_of(p)
    state = run_passes(inputs, both=True)
    windows = windows_of(p, core, state.messages.alpha, state.messages.beta)
    found = gradients_from(p, inputs, state, wanted, core)
    return state.messages.log_z + inputs.prefixes.common, found, windows


def viterbi_of_pieces(p: Potentials, core: Tensor) -> tuple[Tensor, SegmentTable, Windows]:
    """Best scores, segments and the windows of the max pass."""
    best, table, alpha = decoded(p)
    return best, table, windows_of(p, core, alpha, None)

"""The numba backend: every CPU problem."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_POSITION, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import (
    HUGE,
    common_parts,
    in_float64,
    running_total,
    without_masks,
)
from flash_semicrf.streaming.cpu.batches import gradients_by_length
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.streaming.tilt import tilted
from flash_semicrf.streaming.windows import Forward, Windows

__all__ = ["NumbaBackend"]


class NumbaBackend:
    """Kernels of `flash_semicrf.streaming.cpu`, imported and compiled when first used."""

    name = "numba"

    def why_not(self, potentials: Potentials) -> str | None:
        """Reason why this backend cannot run the problem, or None."""
        if potentials.device.type != "cpu":
            return f"it needs tensors on the CPU and these are on {potentials.device}"
        return None

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(potentials)
        log_z = _avoiding_masks(problem, _kernels(potentials).log_partition, lambda log_z: log_z)
        return log_z if offset is _NO_OFFSET else log_z + offset[:, -1]

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and gradients; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(potentials)
        kernels = _kernels(potentials)
        log_z, found = _avoiding_masks(
            problem,
            lambda p: gradients_by_length(p, wanted, kernels.gradients),
            lambda found: found[0],
        )
        for name in wanted & set(BY_POSITION):
            found[name] = found[name].to(potentials.dtype)
        return log_z if offset is _NO_OFFSET else log_z + offset[:, -1], found

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward messages; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(potentials)
        log_z, alpha, beta = _kernels(potentials).messages(problem)
        total = offset[:, -1]
        rest = (total[:, None] - offset)[..., None]
        return log_z + total, alpha + offset[..., None], beta + rest

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(in_float64(potentials))
        direction = in_float64(direction)
        log_z, mean, found = _kernels(potentials).tangents(problem, direction, wanted)
        return log_z + offset[:, -1], mean, found

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(potentials, sums=False)
        alpha = _kernels(potentials).max_messages(problem)
        return alpha + offset[..., None]

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, offset = _prepared(potentials, sums=False)
        scores, table = _kernels(potentials).viterbi(problem)
        return scores + offset[:, -1], table

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        problem, _ = _prepared(potentials)
        return _kernels(potentials).sample(problem, num_samples, seed)

    def forward(self, potentials: Potentials) -> Forward:
        """Messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        problem, _ = _prepared(potentials)
        return _kernels(potentials).forward(problem)

    def sample_from(
        self, potentials: Potentials, forward: Forward, num_samples: int, seed: int
    ) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        problem, _ = _prepared(potentials)
        return _kernels(potentials).sample_from(problem, forward, num_samples, seed)

    def slots(self, potentials: Potentials, sums: bool) -> Slots | None:
        """What the threads do at once; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        if potentials.duration_tail is not None or _is_attached(potentials):
            return None
        if sums and _kernels(potentials).in_lanes(potentials):
            return _LANES
        return Slots(torch.get_num_threads(), _OVERHEAD, patient=True)

    def log_partition_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, Windows]:
        """Log Z and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        problem, offset = _prepared(potentials)
        kernels = _kernels(problem)
        log_z, windows = _avoiding_masks(
            problem, lambda p: kernels.log_partition_of_pieces(p, core), lambda found: found[0]
        )
        return log_z + offset[:, -1], _with_offset(windows, core, offset)

    def gradients_of_pieces(
        self, potentials: Potentials, wanted: set[str], core: Tensor, span: int
    ) -> tuple[Tensor, dict[str, Tensor], Windows]:
        """Log Z, gradients, windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        problem, offset = _prepared(potentials)
        kernels = _kernels(problem)
        log_z, found, windows = _avoiding_masks(
            problem,
            lambda p: kernels.gradients_of_pieces(p, wanted, core),
            lambda found: found[0],
        )
        for name in wanted & set(BY_POSITION):
            found[name] = found[name].to(potentials.dtype)
        return log_z + offset[:, -1], found, _with_offset(windows, core, offset)

    def viterbi_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, SegmentTable, Windows]:
        """Best segmentations and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        problem, offset = _prepared(potentials, sums=False)
        scores, table, windows = _kernels(problem).viterbi_of_pieces(problem, core)
        return scores + offset[:, -1], table, _with_offset(windows, core, offset)


_OVERHEAD = 1000
"""Steps of a pass that take as long as cutting and comparing."""

_LANES = Slots(256, _OVERHEAD, patient=False, together=16, least=8, slower=3)
"""Eight pieces in the lanes of vectors, and some for a second thread; on however many threads, so
that results do not depend on their number."""

_NO_OFFSET = torch.zeros(1, 1, dtype=torch.float64, device="cpu")


def _kernels(potentials: Potentials) -> ModuleType:
    """Package of kernels for the kind of problem."""
    if potentials.transition.dim() == 3 or _is_attached(potentials):
        from flash_semicrf.streaming.cpu import by_duration

        return by_duration
    from flash_semicrf.streaming.cpu import static

    return static


def _is_attached(p: Potentials) -> bool:
    """Whether segments or transitions by position have scores of their own."""
    return p.segment_scores is not None or p.transition_scores is not None


def _avoiding_masks(problem: Potentials, run: Callable, log_z_of: Callable) -> Any:
    """``run(problem)``; if possible without the segmentations that pass a mask, which are slow."""
    without = without_masks(problem) if problem.score_range[0] <= -HUGE else None
    if without is not None:
        allowed, least = without
        found = run(allowed)
        if bool((log_z_of(found) >= least).all()):
            return found
    return run(problem)


def _with_offset(windows: Windows, core: Tensor, offset: Tensor) -> Windows:
    if offset is _NO_OFFSET:
        return windows
    return windows._replace(left_out=offset.gather(1, core))


def _prepared(potentials: Potentials, sums: bool = True) -> tuple[Potentials, Tensor]:
    """The problem in one dtype and without huge scores common to all labels, and their sums.

    For `sums` over segmentations, also without steep duration scores; searches for the best one
    have no exponentials that these could leave.

    Returns
    -------
    potentials : Potentials
        All in float32 or all in float64, but for segment scores and transition scores.
    offset : float64 Tensor of shape (B, T + 1), or `_NO_OFFSET`
        What has been taken out before position t of every segmentation's score.
    """
    if sums:
        potentials = tilted(potentials)
    named = potentials.parameters()
    if len({value.dtype for value in named.values()}) > 1:
        named = in_float64(potentials).parameters()
    low, high = potentials.score_range
    if not (low > -HUGE and high < HUGE):
        # Masks, or NaN in the padding. One label at 0 and the others at -1e9 is no problem for
        # the kernels, but all of them at -1e9 would be: exponents need their digits.
        parts = common_parts(named["scores"].detach(), potentials.lengths)
        if bool(parts.any()):
            # In float64: a float32 difference would round what is left.
            named = in_float64(potentials).parameters()
            named["scores"] = named["scores"] - parts[..., None]
            return potentials.replace(**named), running_total(parts)
    problem = potentials.replace(**named)
    vars(problem)["score_range"] = low, high  # of the same scores: they are not read again
    return problem, _NO_OFFSET

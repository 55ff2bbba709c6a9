"""The Triton backend: CUDA tensors, static transitions or transitions by duration.

Triton is imported when a kernel first runs: a machine without it imports this module.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_semicrf.problem.flags import Flagged, flag_values
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.assembly import without_spans
from flash_semicrf.streaming.pieces.plan import Slots, within_memory
from flash_semicrf.streaming.windows import Forward, Windows

__all__ = ["HAS_TRITON", "MAX_LABELS", "TritonBackend"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; whether a GPU can run it is for `TritonBackend.why_not`."""

MAX_LABELS = 128
"""Largest number of labels: exp(A) is held in registers."""

_CAPABILITY = (8, 0)

_PASSES = 4
"""Passes that a multiprocessor runs side by side."""

_OVERHEAD = 1500
"""Steps of a pass that take as long as cutting and comparing."""


@functools.lru_cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one: Triton launches on that."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _kind(potentials: Potentials) -> ModuleType:
    """Package of kernels for the kind of transitions."""
    if potentials.transition.dim() == 3:
        from flash_semicrf.streaming.triton import by_duration as kind
    else:
        from flash_semicrf.streaming.triton import static as kind
    return kind


def _run(name: str, potentials: Potentials, *arguments: Any) -> Any:
    """Call a function of the package of kernels, on the device of the problem."""
    from flash_semicrf.streaming.triton.jit import launched_together

    function = getattr(_kind(potentials), name)
    with _on(potentials.device), torch.no_grad():
        return launched_together(functools.partial(function, potentials, *arguments))


class TritonBackend:
    """Kernels of `flash_semicrf.streaming.triton`."""

    name = "triton"

    def why_not(self, potentials: Potentials) -> str | None:
        """Reason why this backend cannot run the problem, or None."""
        device = potentials.device
        if not HAS_TRITON:
            return "triton is not installed"
        if device.type != "cuda" and not _interpreted():
            return f"it needs tensors on a CUDA device and these are on {device}"
        if torch.version.hip is not None:
            return "its kernels are written and tested for CUDA devices only"
        if device.type == "cuda" and _capability(device.index) < _CAPABILITY:
            return "it needs a device of compute capability 8.0 or newer"
        if potentials.num_labels > MAX_LABELS:
            return f"it takes at most {MAX_LABELS} labels and these are {potentials.num_labels}"
        return without_spans(potentials)

    def values_are_allowed(self, potentials: Potentials) -> bool:
        """Whether validation need not look at the values one tensor at a time.

        Nothing can be waited for while a CUDA graph is captured, so values are not looked at then.
        False as long as the kernel for it is not compiled, which it is with those of the operation.
        """
        from flash_semicrf.streaming.triton.jit import launched_if_compiled
        from flash_semicrf.streaming.triton.values import values_are_allowed

        if potentials.device.type != "cuda" or self.why_not(potentials) is not None:
            return False
        with _on(potentials.device), torch.no_grad():
            if torch.cuda.is_current_stream_capturing():
                return True
            return bool(launched_if_compiled(functools.partial(values_are_allowed, potentials)))

    def flagged(self, potentials: Potentials) -> Flagged:
        """Flags of the sequences of a problem of checked shapes, and lengths of 0 for the bad ones.

        By plain PyTorch as long as the kernel for it is not compiled, which it is with those of the
        operation.
        """
        from flash_semicrf.streaming.triton.jit import launched_if_compiled
        from flash_semicrf.streaming.triton.values import flags_of

        with _on(potentials.device), torch.no_grad():
            found = launched_if_compiled(functools.partial(flags_of, potentials))
        if found is None:
            p, bad = flag_values(potentials)
            return Flagged(p.replace(lengths=p.lengths.masked_fill(bad, 0)), bad)
        lengths, bad = found
        return Flagged(potentials.replace(lengths=lengths), bad)

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("log_partition", potentials)

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and gradients; see `flash_semicrf.streaming.dispatch.Backend`."""
        from flash_semicrf.streaming.triton.jit import is_rehearsal, launched_together
        from flash_semicrf.streaming.triton.scaling import scaled

        p = potentials
        given = {name: value.dtype for name, value in p.parameters().items() if name in wanted}

        def call() -> tuple[Tensor, dict[str, Tensor]]:
            log_z, found = _kind(p).gradients(p, wanted)
            if is_rehearsal() and len(given) == len(wanted):
                # The kernel of the backward pass is compiled with the others.
                scaled(found, log_z, torch.empty_like(log_z, dtype=torch.bool), given)
            return log_z, found

        with _on(p.device), torch.no_grad():
            return launched_together(call)

    def scaled(
        self,
        gradients: dict[str, Tensor],
        weight: Tensor,
        bad: Tensor | None,
        dtypes: dict[str, torch.dtype],
    ) -> dict[str, Tensor]:
        """Gradients of a weighted sum; see `flash_semicrf.streaming.triton.scaling`."""
        from flash_semicrf.streaming.triton.jit import launched_together
        from flash_semicrf.streaming.triton.scaling import scaled

        with _on(weight.device), torch.no_grad():
            return launched_together(functools.partial(scaled, gradients, weight, bad, dtypes))

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward messages; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("messages", potentials)

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("tangents", potentials, direction, wanted)

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("max_messages", potentials)

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("viterbi", potentials)

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _run("sample", potentials, num_samples, seed)

    def forward(self, potentials: Potentials) -> Forward:
        """Messages; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        return _run("forward", potentials)

    def sample_from(
        self, potentials: Potentials, forward: Forward, num_samples: int, seed: int
    ) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        return _run("sample_from", potentials, forward, num_samples, seed)

    def slots(self, potentials: Potentials, sums: bool) -> Slots | None:
        """What the device does at once; see `flash_semicrf.streaming.pieces.cutting.Cutting`.

        None while a CUDA graph is captured: to compare pieces is to wait for them.
        """
        p = potentials
        if p.duration_tail is not None:
            return None
        if p.device.type != "cuda":  # in Triton's interpreter
            return Slots(1, 0, patient=False)
        if torch.cuda.is_current_stream_capturing():
            return None
        slots = Slots(_PASSES * _multiprocessors(p.device.index), _OVERHEAD, patient=False)
        return within_memory(slots, p.transition.numel())

    def log_partition_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, Windows]:
        """Log Z and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        return _run("log_partition_of_pieces", potentials, core)

    def gradients_of_pieces(
        self, potentials: Potentials, wanted: set[str], core: Tensor, span: int
    ) -> tuple[Tensor, dict[str, Tensor], Windows]:
        """Log Z, gradients, windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        return _run("gradients_of_pieces", potentials, wanted, core, span)

    def viterbi_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, SegmentTable, Windows]:
        """Best segmentations and windows; see `flash_semicrf.streaming.pieces.cutting.Cutting`."""
        return _run("viterbi_of_pieces", potentials, core)

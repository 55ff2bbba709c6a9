"""The numba backend: every CPU problem, static transitions or transitions by duration."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flash_semicrf.potentials import Potentials
from flash_semicrf.segments import SegmentTable

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
        return _algorithm(potentials).log_partition(_one_dtype(potentials))

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and gradients; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _algorithm(potentials).gradients(_one_dtype(potentials), wanted)

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _algorithm(potentials, decoding=True).max_messages(_one_dtype(potentials))

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _algorithm(potentials, decoding=True).viterbi(_one_dtype(potentials))


def _algorithm(potentials: Potentials, decoding: bool = False) -> ModuleType:
    """Module of kernels for the kind of transitions."""
    if potentials.transition.dim() == 3:
        from flash_semicrf.streaming.cpu import by_duration as module
    elif decoding:
        from flash_semicrf.streaming.cpu import viterbi as module
    else:
        from flash_semicrf.streaming.cpu import static as module
    return module


def _one_dtype(potentials: Potentials) -> Potentials:
    """The same problem, all in float32 or all in float64: what the kernels know."""
    dtypes = {value.dtype for value in potentials.parameters().values()}
    wide = torch.float32 if dtypes == {torch.float32} else torch.float64
    return potentials.replace(
        **{n: v.detach().to(wide) for n, v in potentials.parameters().items()}
    )

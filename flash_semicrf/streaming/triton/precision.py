"""Which devices and problems the float32 form of the passes is for."""

from __future__ import annotations

import torch

from flash_semicrf.problem.potentials import BY_POSITION, Potentials

__all__ = ["RATIOS", "float64_is_slow", "has_narrow_form"]

RATIOS = {(8, 0): 2, (8, 6): 64, (8, 9): 64, (9, 0): 2, (10, 0): 2, (12, 0): 64, (12, 1): 64}
"""Float32 multiply-adds in the time of one in float64, by compute capability: NVIDIA's tables of
arithmetic throughput in the CUDA C++ Programming Guide."""

_SLOW = 8
"""Ratio from which float32 pays: its form takes twice the instructions, and whole-number ones."""


def float64_is_slow(capability: tuple[int, int]) -> bool:
    """Whether a device is better off with float32; False where that is not known."""
    return RATIOS.get(capability, 1) >= _SLOW


def has_narrow_form(potentials: Potentials) -> bool:
    """Whether there are float32 passes for a problem: transitions that do not depend on the
    duration, no duration tail, and nothing by position that float32 would round."""
    p = potentials
    if p.transition.dim() == 3 or p.duration_tail is not None:
        return False
    given = (getattr(p, name) for name in BY_POSITION)
    return all(x is None or x.dtype != torch.float64 for x in given)

"""Whether kernels may compute in float32."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.validation import check_choice

__all__ = ["Precision", "check_precision", "check_traced_precision"]

Precision: TypeAlias = Literal["auto", "float32", "float64"]
"""Arithmetic of log Z and its gradient: "float32" where a backend has kernels for it, "float64"
everywhere; "auto" is "float32" on GPUs without fast float64, for scores in float32 or narrower."""


def check_precision(precision: str, potentials: Potentials) -> None:
    """Raise ValueError if `precision` is no `Precision`, or would round scores in float64."""
    check_choice("precision", precision, ("auto", "float32", "float64"))
    if precision == "float32" and potentials.dtype == torch.float64:
        raise ValueError(
            'precision="float32" takes scores in float32 or narrower; got torch.float64. Pass '
            'potentials.to(torch.float32), or precision="auto".'
        )


def check_traced_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is the one that compiled and exported models have."""
    if precision != "auto":
        raise ValueError(
            f'Compiled and exported models take precision="auto" alone; got {precision!r}.'
        )

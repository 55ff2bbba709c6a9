"""Checks of single arguments, without imports from this package.

Every error message states the requirement and the value received.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import SupportsIndex, TypeGuard

import torch
from torch import Tensor

__all__ = [
    "check_floating_dtype",
    "check_int",
    "check_number",
    "check_positive_int",
    "check_tensor",
]


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a Tensor; got {type(value).__name__}.")


def check_floating_dtype(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a floating-point torch.dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"`{name}` must be a floating-point torch.dtype; got {value!r}.")


def check_int(name: str, value: object) -> int:
    """`value` as an int of 64 bits; ValueError if it is none."""
    if not _is_int(value) or abs(operator.index(value)) >= 2**63:
        raise ValueError(f"`{name}` must be an integer of 64 bits; got {value!r}.")
    return operator.index(value)


def check_positive_int(name: str, value: object, largest: int = 2**31 - 1) -> int:
    """`value` as an int from 1 to `largest`; ValueError if it is none."""
    if not _is_int(value) or operator.index(value) < 1:
        raise ValueError(f"`{name}` must be an integer >= 1; got {value!r}.")
    if operator.index(value) > largest:
        raise ValueError(f"`{name}` must be at most {largest}; got {value!r}.")
    return operator.index(value)


def _is_int(value: object) -> TypeGuard[SupportsIndex]:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))


def check_number(name: str, value: object, *, zero: bool = False, infinite: bool = False) -> float:
    """`value` as a float > 0, or also 0 or inf if allowed; ValueError if it is none."""
    if (
        not _is_number(value)
        or not (value > 0 or (zero and value == 0))
        or not (infinite or value < math.inf)
    ):
        finite, low = "" if infinite else "finite and ", ">= 0" if zero else "> 0"
        raise ValueError(f"`{name}` must be {finite}{low}; got {value!r}.")
    return float(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

"""Checks of an estimator's parameters that scikit-learn's constraints cannot express."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from sklearn.utils._param_validation import Interval
from skorch.callbacks import Callback

__all__ = ["check_largest", "check_parameters"]


def check_parameters(estimator: Any) -> None:
    """Raise for parameters that are wrong whatever the data.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
        Its parameters meet the constraints of the class.

    Raises
    ------
    ValueError
        For a number that is a bool, numbers that overflow, or entries of `callbacks` that are none.
    """
    for name, constraints in estimator._parameter_constraints.items():
        value = getattr(estimator, name)
        if isinstance(value, bool) and any(isinstance(c, Interval) for c in constraints):
            raise ValueError(f"`{name}` must be a number, not a bool; got {value}.")
    check_largest("alpha", estimator.alpha, estimator.dtype)
    if isinstance(estimator.duration_tail, Real) and estimator.duration_tail > -math.inf:
        check_largest("duration_tail", estimator.duration_tail, estimator.dtype)
    if isinstance(estimator.class_weight, dict):
        for label, weight in estimator.class_weight.items():
            if isinstance(weight, Real):
                check_largest("class_weight", weight, estimator.dtype, f" for label {label!r}")
    for i, entry in enumerate(estimator.callbacks or []):
        named = isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)
        callback = entry[1] if named else entry
        is_class = isinstance(callback, type) and issubclass(callback, Callback)
        if not (callback is None or is_class or isinstance(callback, Callback)):
            raise ValueError(
                "`callbacks` must hold skorch callbacks, or pairs of a name and a callback; got "
                f"{entry!r} at index {i}."
            )


def check_largest(name: str, value: float, dtype: str, where: str = "") -> None:
    """Raise for a factor of the loss whose square overflows, as squares of gradients then do."""
    largest = math.sqrt(torch.finfo(getattr(torch, dtype)).max)
    if abs(value) > largest:
        raise ValueError(
            f"`{name}` must be at most {largest:.1e} in size, or gradients overflow in {dtype}; "
            f"got {value:g}{where}."
        )

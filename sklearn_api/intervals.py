"""Intervals of numbers for ``_parameter_constraints``."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import _param_validation

__all__ = ["Interval"]


class Interval(_param_validation.Interval):
    """Numbers in an interval, but no bools: True, which Python counts as 1, is a mistake."""

    def is_satisfied_by(self, val: Any) -> bool:
        """Whether a parameter has an allowed value."""
        return not isinstance(val, (bool, np.bool_)) and super().is_satisfied_by(val)

"""Names of scikit-learn outside its documented interface, in one place: a release may move them.

Not imports, but relied on as well: estimators declare ``_parameter_constraints``, which
`fit_context` checks, and inherit ``_get_param_names``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sklearn.base import _fit_context
from sklearn.utils import _safe_indexing as safe_indexing
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _get_feature_names as get_feature_names
from sklearn.utils.validation import _num_samples as num_samples

__all__ = [
    "Interval",
    "StrOptions",
    "fit_context",
    "get_feature_names",
    "num_samples",
    "safe_indexing",
]

F = TypeVar("F")


def fit_context(*, prefer_skip_nested_validation: bool) -> Callable[[F], F]:
    """Decorator of `fit` that checks ``_parameter_constraints`` first, with its type."""
    decorator: Callable[[F], F] = _fit_context(
        prefer_skip_nested_validation=prefer_skip_nested_validation
    )
    return decorator

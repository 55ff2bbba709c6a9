"""Checks of the features of each sequence, in messages that name the sequence."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.utils.validation import assert_all_finite, check_array

from sklearn_api._inputs.containers import num_dimensions, to_host
from sklearn_api._sklearn import get_feature_names

__all__ = [
    "all_sparse_or_none",
    "check_finite",
    "check_names",
    "check_num_features",
    "check_sequence",
    "exact_dtype",
]


def exact_dtype(x: Any) -> type:
    """float32 where it holds all values of the dtype of an array, else float64."""
    dtype = getattr(x, "dtype", None)
    narrow = isinstance(dtype, np.dtype) and np.can_cast(dtype, np.float32)
    return np.float32 if narrow else np.float64


def check_sequence(x: Any, index: int, dtype: Any, options: dict[str, Any]) -> Any:
    """One sequence as an array or CSR matrix (T, D); see `check_X`."""
    if num_dimensions(x) != 2:
        shape = tuple(x.shape) if hasattr(x, "shape") else f"{num_dimensions(x)}-D"
        raise ValueError(
            f"Sequence {index} of `X`: Expected 2D array, of shape (T, D); got {shape}. Reshape "
            "your data: `x.reshape(-1, 1)` has one feature at each position."
        )
    x = to_host(x, f"X[{index}]")
    dtype = exact_dtype(x) if dtype is None else dtype
    try:
        return check_array(x, dtype=dtype, input_name="X", **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Sequence {index} of `X`: {error}") from error


def check_finite(x: Any, index: int, allow_nan: bool) -> None:
    """Raise for NaN or infinity, naming the place; `x` is an array or CSR matrix."""
    values = x.data if sp.issparse(x) else x
    try:
        assert_all_finite(values, allow_nan=allow_nan)
    except ValueError as error:
        bad = np.isinf(values) if allow_nan else ~np.isfinite(values)
        where = np.argwhere(bad)[0]
        value = "NaN" if np.isnan(values[tuple(where)]) else "infinity"
        row, column = where if len(where) == 2 else _place_in_csr(x, int(where[0]))
        raise ValueError(
            f"Sequence {index} of `X`: Input X contains {value}, at position {row}, feature "
            f"{column}; it must be finite. `PerPosition(SimpleImputer())` fills NaN."
        ) from error


def _place_in_csr(x: Any, entry: int) -> tuple[int, int]:
    """Row and column of the n-th stored entry."""
    return int(np.searchsorted(x.indptr, entry, side="right")) - 1, int(x.indices[entry])


def check_num_features(estimator: Any, values: list[np.ndarray], reset: bool) -> None:
    """Set the number of features of an estimator (`reset`), and raise where one differs."""
    if reset:
        estimator.n_features_in_ = values[0].shape[1]
    origin = "as in sequence 0" if reset else "as in fit"
    expected = estimator.n_features_in_
    for i, x in enumerate(values):
        if x.shape[1] != expected:
            raise ValueError(
                f"Every sequence of `X` must have {expected} features, {origin}; "
                f"got {x.shape[1]} in sequence {i}."
            )


def check_names(estimator: Any, items: list[Any], reset: bool) -> None:
    """Compare the feature names of all sequences with those of `fit`, or of the first that has."""
    found = [get_feature_names(x) if hasattr(x, "columns") else None for x in items]
    named = [i for i, names in enumerate(found) if names is not None]
    if reset:
        vars(estimator).pop("feature_names_in_", None)
        if named:
            estimator.feature_names_in_ = found[named[0]]
    expected = getattr(estimator, "feature_names_in_", None)
    origin = f"sequence {named[0]}" if reset and named else "fit"
    if expected is None:
        if named:
            warnings.warn(
                f"`X` has feature names in sequence {named[0]}, but {type(estimator).__name__} was "
                "fitted without them: columns are taken in their order.",
                UserWarning,
                stacklevel=4,
            )
        return
    for i in named:
        if not np.array_equal(found[i], expected):
            n = int(np.argmax(found[i] != expected))
            raise ValueError(
                f"The feature names should match those of {origin}, in the same order; got "
                f"{found[i][n]!r} where {expected[n]!r} is expected, column {n} of sequence {i} of "
                "`X`."
            )
    if len(named) < len(items):
        i = next(i for i, names in enumerate(found) if names is None)
        warnings.warn(
            f"Sequence {i} of `X` has no feature names, unlike {origin}: its columns are taken in "
            "their order.",
            UserWarning,
            stacklevel=4,
        )


def all_sparse_or_none(values: list[Any]) -> list[Any]:
    """Dense sequences among sparse ones as CSR, too."""
    if not any(map(sp.issparse, values)):
        return values
    return [x if sp.issparse(x) else sp.csr_array(x) for x in values]

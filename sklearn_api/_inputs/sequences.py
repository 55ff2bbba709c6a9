"""Ragged X in all the forms users hold, and outputs nested as it was.

Everything behind this module sees a `Sequences`: a list of (T_i, D) arrays and the layout they came
in. `Layout.restore` mirrors the input: rows for 2-D X, a 1-D object array for many sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from sklearn.utils.validation import validate_data

from sklearn_api._inputs.containers import sequences_of, to_host
from sklearn_api._inputs.features import (
    all_sparse_or_none,
    check_finite,
    check_names,
    check_num_features,
    check_sequence,
    exact_dtype,
)

__all__ = [
    "Layout",
    "Sequences",
    "check_X",
    "group_starts",
    "object_array",
]

T = TypeVar("T")


def object_array(items: Iterable[Any]) -> np.ndarray:
    """1-D object array of `items`, whatever their shapes.

    ``np.array(items, dtype=object)`` turns arrays of equal length into a 2-D array.

    Examples
    --------
    >>> object_array([np.zeros(2), np.zeros(2)]).shape
    (2,)
    """
    items = list(items)
    result = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        result[i] = item
    return result


@dataclass(frozen=True)
class Layout:
    """The way in which the caller's X nests the sequences of a batch.

    Parameters
    ----------
    kind : {"single", "groups", "many"}
        2-D X; 2-D X with groups; a list, object array or 3-D array of sequences.
    lengths : int64 ndarray of shape (n_sequences,)
    """

    kind: str
    lengths: np.ndarray

    def restore(self, outputs: list[np.ndarray]) -> np.ndarray:
        """Nest one array of per-position outputs per sequence as the caller's X was nested."""
        if self.kind == "single":
            return outputs[0]
        if self.kind == "groups":
            return np.concatenate(outputs)
        return object_array(outputs)

    def restore_lists(self, outputs: list[list[T]]) -> list[T] | list[list[T]]:
        """One list per sequence: as they are, or the one of a single sequence by itself."""
        return outputs[0] if self.kind == "single" else outputs

    def restore_numbers(self, outputs: np.ndarray) -> float | np.ndarray:
        """One number per sequence: as they are, or the one of a single sequence by itself."""
        return float(outputs[0]) if self.kind == "single" else outputs


@dataclass(frozen=True)
class Sequences:
    """Checked input: `values`, a list of (T_i, D) float arrays, and the `layout` it came in.

    Of sparse input the values are CSR matrices.
    """

    values: list[Any]
    layout: Layout

    @property
    def sparse(self) -> bool:
        """Whether the values are sparse."""
        return sp.issparse(self.values[0])

    @property
    def lengths(self) -> np.ndarray:
        """Number of positions of each sequence, int64."""
        return self.layout.lengths


def check_X(
    estimator: Any,
    X: Any,
    groups: Any = None,
    *,
    dtype: Any = np.float32,
    reset: bool = False,
    accept_sparse: bool = False,
    allow_nan: bool = False,
) -> Sequences:
    """Validate X and split it into sequences.

    Parameters
    ----------
    estimator : estimator
        Its ``n_features_in_`` and ``feature_names_in_`` are set (`reset`) or compared.
    X : see the class docstring of `SemiCRFSegmenter`
    groups : array-like of shape (n_rows,), optional
        For 2-D X only: one sequence per id; the rows of an id are contiguous.
    dtype : numpy dtype, list of them, or None
        What the values are converted to; of a list, to the first unless they are of another one.
        None: float32 where it holds all values of the dtype given, else float64.
    reset : bool
        True in `fit`.
    accept_sparse : bool
        Take sparse X, as CSR.
    allow_nan : bool
        Take NaN, but no infinity.

    Returns
    -------
    Sequences

    Raises
    ------
    ValueError
        For NaN or infinity, an empty sequence, a wrong number of features or dimensions, or other
        feature names, naming the sequence.
    TypeError
        For sparse X that is not accepted, or no collection of sequences.

    Warns
    -----
    UserWarning
        Where some sequences, or fit and this call, differ in whether they have feature names.
    """
    options = {
        "accept_sparse": "csr" if accept_sparse else False,
        "ensure_all_finite": False,  # NaN and infinity get a message that names their place
    }
    items, X = sequences_of(X)
    if items is None:
        x = to_host(X, "X")
        options["dtype"] = exact_dtype(x) if dtype is None else dtype
        x = validate_data(estimator, x, reset=reset, **options)
        starts = np.zeros(1, dtype=int) if groups is None else group_starts(groups, x.shape[0])
        stops = np.append(starts[1:], x.shape[0])
        values = [x[start:stop] for start, stop in zip(starts, stops, strict=True)]
        kind = "single" if groups is None else "groups"
        sequences = Sequences(values, Layout(kind, stops - starts))
    else:
        if groups is not None:
            raise ValueError(
                "`groups` names the sequence of each row of a 2-D `X`; here `X` already holds "
                f"{len(items)} sequences."
            )
        if len(items) == 0:
            raise ValueError("`X` must hold at least 1 sequence; got 0 sequences.")
        values = [check_sequence(x, i, dtype, options) for i, x in enumerate(items)]
        check_num_features(estimator, values, reset)
        check_names(estimator, items, reset)
        if accept_sparse:
            values = all_sparse_or_none(values)
        lengths = np.array([x.shape[0] for x in values], dtype=np.int64)
        sequences = Sequences(values, Layout("many", lengths))
    for i, x in enumerate(values):
        check_finite(x, i, allow_nan)
    return sequences


def group_starts(groups: Any, num_rows: int) -> np.ndarray:
    """First row of each group.

    Raises
    ------
    ValueError
        For a wrong number of ids, a missing one, or one whose rows are not contiguous.
    """
    groups = np.asarray(to_host(groups, "groups"))
    if groups.shape == (num_rows, 1):
        groups = groups[:, 0]
    if groups.shape != (num_rows,):
        got = len(groups) if groups.ndim == 1 else f"shape {groups.shape}"
        raise ValueError(f"`groups` must have one id per row of `X`: {num_rows}; got {got}.")
    # NaN differs from itself, and the comparison of pandas' NA is not False either.
    missing = np.array([g is None or (g != g) is not False for g in groups.tolist()], dtype=bool)
    if missing.any():
        raise ValueError(
            f"`groups` must have an id for every row of `X`; got {groups[missing].tolist()[0]!r} "
            f"at row {int(np.argmax(missing))}."
        )
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    seen = set()
    for start, group in zip(starts, groups[starts].tolist(), strict=True):
        if group in seen:
            raise ValueError(
                f"The rows of a group must be contiguous; id {group!r} of `groups` appears again "
                f"at row {start}."
            )
        seen.add(group)
    return starts

"""Out-of-fold predictions of sequences."""

from __future__ import annotations

import warnings
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from sklearn.base import clone
from sklearn.utils.parallel import Parallel, delayed

from sklearn_api._inputs.labels import are_segments
from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.sequences import object_array
from sklearn_api._inputs.targets import check_y
from sklearn_api._responses import final_estimator, get_response
from sklearn_api._sklearn import num_samples as _num_samples
from sklearn_api._sklearn import safe_indexing as _safe_indexing
from sklearn_api.model_selection._splitters import SequenceKFold

__all__ = ["cross_val_predict"]

_METHODS = ("predict", "predict_proba", "predict_boundary_proba", "predict_segments")

Method: TypeAlias = Literal[
    "predict", "predict_proba", "predict_boundary_proba", "predict_segments"
]


class _Piece(NamedTuple):
    """Contiguous rows of one sequence, or a whole one: index, first position, rows."""

    sequence: int
    offset: int
    rows: slice


def cross_val_predict(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    groups: Any = None,
    cv: Any = None,
    n_jobs: int | None = None,
    verbose: int = 0,
    params: dict[str, Any] | None = None,
    pre_dispatch: int | str = "2*n_jobs",
    method: Method = "predict",
) -> Any:
    """Predict every sequence with a model that was fitted without it.

    The function of the same name in scikit-learn does not support probabilities of sequences that
    differ in length.

    Parameters
    ----------
    estimator : estimator of sequences
        `SemiCRFSegmenter`, or a pipeline or search with it; a copy is fitted per fold.
    X : sequences, in the forms that `SemiCRFSegmenter` takes
    y : labels or segments, nested as X
        For 2-D X: labels per row.
    groups : array-like, optional
        Passed to the splitter. For 2-D X also the sequence of each row.
    cv : int, splitter or iterable of (train, test), default=None
        An int or None (5) is `SequenceKFold`; the test sets must partition X.
    n_jobs : int or None, default=None
        Number of folds fitted at a time, as in scikit-learn.
    verbose : int, default=0
        As in joblib.
    params : dict or None, default=None
        Passed to ``fit``; values with one entry per sequence (per row for 2-D X) are split alike.
    pre_dispatch : int or str, default="2*n_jobs"
        As in joblib.
    method : {"predict", "predict_proba", "predict_boundary_proba", "predict_segments"}, \
default="predict"

    Returns
    -------
    predictions : ndarray of shape (T,) or (T, C), object array of those, or lists of Segment
        Nested as by the method of the estimator for X and `groups`. Columns of probabilities are
        the sorted labels of `y`, with 0 for labels that are missing in the training set of a fold.

    Raises
    ------
    ValueError
        If `method` is unknown, the test sets do not partition `X`, or segments are given for a 2-D
        X.

    Warns
    -----
    RuntimeWarning
        If a training set lacks a label, with ``method="predict_proba"``.

    Notes
    -----
    Rows of a 2-D X are passed to the estimator as a list of contiguous pieces, so that rows that
    are not neighbours are never joined. Each piece of a test sequence is predicted without the rows
    before it.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api import SemiCRFSegmenter
    >>> from sklearn_api.model_selection import cross_val_predict
    >>> y = [np.repeat([0, 1, 0], n) for n in ([3, 2, 4], [4, 3, 3], [3, 3, 3])]
    >>> X = [labels[:, None] * 2.0 for labels in y]
    >>> proba = cross_val_predict(SemiCRFSegmenter(), X, y, cv=3, method="predict_proba")
    >>> [p.shape for p in proba]
    [(9, 2), (10, 2), (9, 2)]
    """
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {', '.join(_METHODS)}; got {method!r}.")
    by_row = read_layout(X).kind == "single"
    layout = read_layout(X, groups if by_row else None)
    if by_row and are_segments(y):
        raise ValueError("`y` must hold one label per row of a 2-D `X`; got segments.")
    gold = check_y(y, layout)
    counted = cv is None or isinstance(cv, Integral)
    splitter = SequenceKFold(5 if cv is None else cv) if counted else cv
    folds = list(splitter.split(X, y, groups) if hasattr(splitter, "split") else splitter)
    _check_partition([test for _, test in folds], _num_samples(X))

    starts = np.cumsum(layout.lengths) - layout.lengths if by_row else None
    classes = np.unique(gold.labels)
    jobs = []
    for train, test in folds:
        jobs.append((_pieces(train, starts), _pieces(test, starts)))
    fit = delayed(_fit_and_predict)
    parts = Parallel(n_jobs=n_jobs, verbose=verbose, pre_dispatch=pre_dispatch)(
        fit(clone(estimator), X, y, train, test, params or {}, method, by_row)
        for train, test in jobs
    )
    found: list[list[Any]] = [[] for _ in layout.lengths]
    for (_, test), (outputs, seen) in zip(jobs, parts, strict=True):
        if seen is not None and not np.array_equal(seen, classes):
            outputs = _align(outputs, seen, classes)
        for piece, output in zip(test, outputs, strict=True):
            found[piece.sequence].append((piece.offset, output))
    joined = [_join(sorted(pieces, key=lambda p: p[0]), method) for pieces in found]
    if method == "predict_segments":
        return joined[0] if layout.kind == "single" else joined
    return layout.restore(joined)


def _check_partition(tests: list[np.ndarray], count: int) -> None:
    tested = np.concatenate(tests)
    times = np.bincount(tested, minlength=count)
    if len(times) > count or (times != 1).any():
        wrong = int(tested.max()) if len(times) > count else int(np.flatnonzero(times != 1)[0])
        raise ValueError(
            f"The test sets of `cv` must hold each of the {count} entries of `X` once; got index "
            f"{wrong} {times[wrong]} times."
        )


def _pieces(indices: np.ndarray, starts: np.ndarray | None) -> list[_Piece]:
    """Whole sequences or, given the `starts` of the sequences, contiguous runs of rows."""
    indices = np.sort(indices)
    if starts is None:
        return [_Piece(int(i), 0, slice(None)) for i in indices]
    cut = (np.diff(indices) != 1) | np.isin(indices[1:], starts)
    pieces = []
    for rows in np.split(indices, np.flatnonzero(cut) + 1):
        owner = int(np.searchsorted(starts, rows[0], side="right")) - 1
        rows_slice = slice(int(rows[0]), int(rows[-1]) + 1)
        pieces.append(_Piece(owner, int(rows[0] - starts[owner]), rows_slice))
    return pieces


def _take(values: Any, pieces: list[_Piece], by_row: bool) -> Any:
    """Entries of X, y or a fit parameter that belong to the pieces, one per piece."""
    if by_row:
        return object_array(_safe_indexing(values, p.rows) for p in pieces)
    return _safe_indexing(values, [p.sequence for p in pieces])


def _fit_and_predict(
    estimator: Any,
    X: Any,
    y: Any,
    train: list[_Piece],
    test: list[_Piece],
    params: dict[str, Any],
    method: str,
    by_row: bool,
) -> tuple[list[Any], np.ndarray | None]:
    """Outputs for each test piece; for probabilities also the labels of their columns."""
    count = _num_samples(X)
    params = {
        name: _take(value, train, by_row) if _has_entries(value, count) else value
        for name, value in params.items()
    }
    estimator.fit(_take(X, train, by_row), _take(y, train, by_row), **params)
    outputs = list(get_response(estimator, method)(_take(X, test, by_row)))
    return outputs, final_estimator(estimator).classes_ if method == "predict_proba" else None


def _has_entries(value: Any, count: int) -> bool:
    is_list = hasattr(value, "__len__") and not isinstance(value, (str, dict))
    return is_list and len(value) == count


def _align(outputs: list[np.ndarray], seen: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
    """Outputs with the columns of `seen` labels among those of all labels, and a warning."""
    warnings.warn(
        f"A training set holds the labels {seen.tolist()} of {classes.tolist()}; the others get a "
        "probability of 0.",
        RuntimeWarning,
        stacklevel=3,
    )
    aligned = [np.zeros((len(output), len(classes)), dtype=output.dtype) for output in outputs]
    for new, output in zip(aligned, outputs, strict=True):
        new[:, np.searchsorted(classes, seen)] = output
    return aligned


def _join(pieces: list[tuple[int, Any]], method: str) -> Any:
    """Output of one sequence from those of its pieces, in order."""
    if method != "predict_segments":
        return np.concatenate([output for _, output in pieces])
    return [
        replace(segment, start=segment.start + offset, end=segment.end + offset)
        for offset, segments in pieces
        for segment in segments
    ]

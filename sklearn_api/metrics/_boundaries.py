"""Precision, recall, F1 and errors of the boundaries of segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from sklearn_api.metrics._inputs import read_labels, read_pairs
from sklearn_api.metrics._segments import (
    Average,
    PrecisionRecallF1,
    Segments,
    ZeroDivision,
    check_tolerance,
    match_segments,
    scores_from_counts,
)

_COLUMNS = {"onset": ("starts",), "offset": ("stops",), "both": ("starts", "stops")}


def boundary_precision_recall_f1(
    y_true: Any,
    y_pred: Any,
    *,
    tolerance: float = 0,
    labels: Sequence[Any] | None = None,
    ignore_label: Any = None,
    kind: Literal["onset", "offset", "both"] = "both",
    average: Average = "micro",
    zero_division: ZeroDivision = "warn",
) -> PrecisionRecallF1:
    """Precision, recall and F1 of the onsets and offsets of segments.

    A true and a predicted onset match if their segments have the same label and they differ by at
    most `tolerance` positions; the same holds for offsets. Each takes part in at most one match;
    the matching has as many pairs as possible. This is the usual score of electrocardiogram
    delineation, with a tolerance of 150 ms. The first onset and the last offset of a sequence count
    like all others.

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments, of one sequence or many (see the module).
    tolerance : float
        Largest difference, in positions.
    labels : list or None
        Labels to score, in the order of the result for ``average=None``; None: all that occur in
        either argument, sorted.
    ignore_label : str, number or None
        Background whose boundaries do not count.
    kind : {"onset", "offset", "both"}
        Boundaries to score; "both" counts onsets and offsets together.
    average : {"micro", "macro"} or None
        "micro" pools the counts of all labels, "macro" averages over labels, and None returns an
        array with one score per label.
    zero_division : "warn", 0.0, 1.0 or nan
        Value of a score whose denominator is zero; "warn" gives 0.0 and an
        `sklearn.exceptions.UndefinedMetricWarning`. A macro average excludes nan.

    Returns
    -------
    scores : PrecisionRecallF1
        Named tuple ``(precision, recall, f1)``.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or the two do not fit together.

    Examples
    --------
    >>> from sklearn_api.metrics import boundary_precision_recall_f1
    >>> y_true = ["none", "P", "P", "P", "none", "none"]
    >>> y_pred = ["none", "P", "P", "none", "none", "none"]
    >>> boundary_precision_recall_f1(y_true, y_pred, ignore_label="none", kind="onset").f1
    1.0
    >>> boundary_precision_recall_f1(y_true, y_pred, ignore_label="none").f1
    0.5
    """
    pairs = read_pairs(y_true, y_pred)
    tolerance = check_tolerance(tolerance)
    columns = _columns(kind)
    labels = read_labels(pairs, labels, ignore_label)
    true, pred = Segments.of(pairs, labels, 0), Segments.of(pairs, labels, 1)
    matched = np.zeros(len(labels), dtype=np.int64)
    for column in columns:
        i, _ = match_segments(true, pred, (column,), tolerance)
        matched += np.bincount(true.label[i], minlength=len(labels))
    return scores_from_counts(
        matched,
        len(columns) * true.counts(labels),
        len(columns) * pred.counts(labels),
        average,
        zero_division,
    )


def boundary_errors(
    y_true: Any,
    y_pred: Any,
    *,
    tolerance: float,
    labels: Sequence[Any] | None = None,
    ignore_label: Any = None,
    kind: Literal["onset", "offset", "both"] = "both",
) -> dict[Any, np.ndarray]:
    """Signed errors of matched boundaries: predicted minus true position.

    Boundaries are matched as by `boundary_precision_recall_f1`; of the matchings with the most
    pairs, the one with the smallest sum of absolute errors is used. Unmatched boundaries have no
    error, so errors should be reported together with precision and recall.

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments, of one sequence or many (see the module).
    tolerance : float
        Largest difference of a match, in positions; `numpy.inf` sets no limit.
    labels : list or None
        Labels to compare; None: all that occur in either argument, sorted.
    ignore_label : str, number or None
        Background whose boundaries do not count.
    kind : {"onset", "offset", "both"}
        Boundaries to compare; "both" lists errors of onsets, then of offsets.

    Returns
    -------
    errors : dict of label to int64 ndarray of shape (number of matches,)
        Errors in positions, in order of sequence and position.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or the two do not fit together.

    Examples
    --------
    >>> from sklearn_api.metrics import boundary_errors
    >>> errors = boundary_errors([(3, 7, "P")], [(2, 9, "P")], tolerance=2)
    >>> errors["P"].tolist()
    [-1, 2]
    """
    pairs = read_pairs(y_true, y_pred)
    tolerance = check_tolerance(tolerance)
    columns = _columns(kind)
    labels = read_labels(pairs, labels, ignore_label)
    true, pred = Segments.of(pairs, labels, 0), Segments.of(pairs, labels, 1)
    found: dict[Any, list[np.ndarray]] = {label: [] for label in labels}
    for column in columns:
        i, j = match_segments(true, pred, (column,), tolerance)
        errors = getattr(pred, column)[j] - getattr(true, column)[i]
        for n, label in enumerate(labels):
            found[label].append(errors[true.label[i] == n])
    return {label: np.concatenate(parts) for label, parts in found.items()}


def _columns(kind: str) -> tuple[str, ...]:
    if not isinstance(kind, str) or kind not in _COLUMNS:
        raise ValueError(f"`kind` must be 'onset', 'offset' or 'both'; got {kind!r}.")
    return _COLUMNS[kind]

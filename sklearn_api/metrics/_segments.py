"""Precision, recall and F1 of segments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning

from sklearn_api.metrics._inputs import Segmentation, read_labels, read_pairs
from sklearn_api.metrics._matching import match_in_order

Average: TypeAlias = Literal["micro", "macro"] | None
ZeroDivision: TypeAlias = Literal["warn"] | float


class PrecisionRecallF1(NamedTuple):
    """Precision, recall and F1: numbers, or arrays with one element per label.

    Attributes
    ----------
    precision : float or ndarray of shape (n_labels,)
        Share of matched among predicted.
    recall : float or ndarray of shape (n_labels,)
        Share of matched among true.
    f1 : float or ndarray of shape (n_labels,)
        Harmonic mean of precision and recall.
    """

    precision: float | np.ndarray
    recall: float | np.ndarray
    f1: float | np.ndarray


def segment_precision_recall_f1(
    y_true: Any,
    y_pred: Any,
    *,
    tolerance: float = 0,
    labels: Sequence[Any] | None = None,
    ignore_label: Any = None,
    average: Average = "micro",
    zero_division: ZeroDivision = "warn",
) -> PrecisionRecallF1:
    """Precision, recall and F1 of segments.

    A true and a predicted segment match if they have the same label and both onset and offset
    differ by at most `tolerance` positions. Each takes part in at most one match; the matching has
    as many pairs as possible.

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments, of one sequence or many (see the module).
    tolerance : float
        Largest difference of onsets and of offsets, in positions.
    labels : list or None
        Labels to score, in the order of the result for ``average=None``; None: all that occur in
        either argument, sorted.
    ignore_label : str, number or None
        Background whose segments do not count.
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
    >>> from sklearn_api.metrics import segment_precision_recall_f1
    >>> y_true = ["a", "a", "a", "b", "b", "a"]
    >>> y_pred = ["a", "a", "b", "b", "b", "a"]
    >>> scores = segment_precision_recall_f1(y_true, y_pred)
    >>> round(scores.f1, 3)
    0.333
    >>> segment_precision_recall_f1(y_true, y_pred, tolerance=1).f1
    1.0
    """
    pairs = read_pairs(y_true, y_pred)
    tolerance = check_tolerance(tolerance)
    labels = read_labels(pairs, labels, ignore_label)
    true, pred = Segments.of(pairs, labels, 0), Segments.of(pairs, labels, 1)
    i, _ = match_segments(true, pred, ("starts", "stops"), tolerance)
    matched = np.bincount(true.label[i], minlength=len(labels))
    return scores_from_counts(
        matched, true.counts(labels), pred.counts(labels), average, zero_division
    )


class Segments(NamedTuple):
    """All segments of scored labels in all sequences, ordered by label, sequence, start."""

    label: np.ndarray
    sequence: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(
        cls, pairs: list[tuple[Segmentation, Segmentation]], labels: list[Any], side: int
    ) -> Segments:
        """Segments of one side of the pairs."""
        index = {label: n for n, label in enumerate(labels)}
        sequences = [pair[side] for pair in pairs]
        label = np.array([index.get(x, -1) for s in sequences for x in s.labels], dtype=np.int64)
        flat = cls(
            label,
            np.repeat(np.arange(len(sequences)), [len(s.labels) for s in sequences]),
            np.concatenate([s.starts for s in sequences]),
            np.concatenate([s.stops for s in sequences]),
        )
        # Stable: segments are in order of sequence and start already.
        order = np.argsort(label, kind="stable")
        order = order[label[order] >= 0]
        return cls(*(column[order] for column in flat))

    def counts(self, labels: list[Any]) -> np.ndarray:
        """Number of segments of every label, of shape (n_labels,)."""
        return np.bincount(self.label, minlength=len(labels))


def match_segments(
    true: Segments, pred: Segments, columns: tuple[str, ...], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Match segments of one label and one sequence by the named columns."""
    end = max(true.stops.max(initial=0), pred.stops.max(initial=0))
    within = int(min(tolerance, end))  # positions are integers: the fraction decides nothing
    # Labels and sequences are laid out one after another, too far apart for a match between them,
    # so that one pass matches all.
    gap = int(end + within + 1)
    n_sequences = 1 + max(true.sequence.max(initial=0), pred.sequence.max(initial=0))
    true_points, pred_points = (
        np.stack([getattr(side, name) for name in columns], axis=1)
        + ((side.label * n_sequences + side.sequence) * gap)[:, None]
        for side in (true, pred)
    )
    return match_in_order(true_points, pred_points, within)


def check_tolerance(tolerance: float) -> float:
    """Tolerance in positions, which may be infinite; ValueError if it is invalid."""
    if not isinstance(tolerance, Real) or isinstance(tolerance, bool) or not tolerance >= 0:
        raise ValueError(f"`tolerance` must be a number of positions >= 0; got {tolerance!r}.")
    return tolerance


def scores_from_counts(
    matched: np.ndarray,
    n_true: np.ndarray,
    n_pred: np.ndarray,
    average: Average,
    zero_division: ZeroDivision,
) -> PrecisionRecallF1:
    """Scores from counts per label; ValueError for an unknown option."""
    if average not in ("micro", "macro", None):
        raise ValueError(f"`average` must be 'micro', 'macro' or None; got {average!r}.")
    warn = isinstance(zero_division, str) and zero_division == "warn"
    if not warn and not (
        isinstance(zero_division, Real) and (zero_division in (0, 1) or np.isnan(zero_division))
    ):
        raise ValueError(f"`zero_division` must be 'warn', 0, 1 or nan; got {zero_division!r}.")
    value = 0.0 if warn else float(zero_division)
    if average == "micro" or (average == "macro" and len(matched) == 0):
        matched, n_true, n_pred = (np.atleast_1d(x.sum()) for x in (matched, n_true, n_pred))
    undefined = []
    scores = []
    for name, top, bottom, missing in [
        ("precision", matched, n_pred, "predicted"),
        ("recall", matched, n_true, "true"),
        ("F1", 2 * matched, n_true + n_pred, "true or predicted"),
    ]:
        zero = bottom == 0
        if zero.any():
            undefined.append(f"{name} (nothing {missing})")
        scores.append(np.where(zero, value, top / np.where(zero, 1, bottom)))
    if warn and undefined:
        warnings.warn(
            f"Set to 0.0 where undefined: {', '.join(undefined)}. `zero_division` sets the value.",
            UndefinedMetricWarning,
            stacklevel=3,
        )
    if average is None:
        return PrecisionRecallF1(*scores)
    return PrecisionRecallF1(*(_mean(score) for score in scores))


def _mean(scores: np.ndarray) -> float:
    """Mean of the entries that are not nan; nan if there are none."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else float("nan")

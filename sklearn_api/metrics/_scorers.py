"""Scorers for scikit-learn's model selection."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from sklearn_api.metrics._errors import frame_error_rate, segment_error_rate
from sklearn_api.metrics._segments import PrecisionRecallF1
from sklearn_api.responses import get_response

_ERRORS = (frame_error_rate, segment_error_rate)


class _SegmentScorer:
    """Callable ``(estimator, X, y)``; a class, not a closure, so that it can be pickled."""

    def __init__(
        self, metric: Callable, sign: int, response_method: str, kwargs: dict[str, Any]
    ) -> None:
        self._metric = metric
        self._sign = sign
        self._response_method = response_method
        self._kwargs = kwargs

    def __call__(self, estimator: Any, X: Any, y: Any) -> float:
        score = self._metric(y, get_response(estimator, self._response_method)(X), **self._kwargs)
        if isinstance(score, PrecisionRecallF1):
            score = score.f1
        if not isinstance(score, Real):
            raise ValueError(
                f"`metric` must return one number to be a scorer; {_name(self._metric)} returned "
                f"{score!r}."
            )
        return self._sign * float(score)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._kwargs.items())
        sign = "" if self._sign > 0 else ", greater_is_better=False"
        response = (
            "" if self._response_method == "predict" else ", response_method='predict_segments'"
        )
        return f"make_segment_scorer({_name(self._metric)}{sign}{response}{options})"


def make_segment_scorer(
    metric: Callable,
    *,
    greater_is_better: bool | None = None,
    response_method: str = "predict",
    **kwargs: Any,
) -> Callable[[Any, Any, Any], float]:
    """Make a scorer for `GridSearchCV`, `cross_val_score` and others from a metric.

    scikit-learn's own `make_scorer` handles arrays only; this one takes ragged sequences as they
    are.

    Parameters
    ----------
    metric : callable
        Function of ``(y_true, y_pred, **kwargs)`` that returns a number, or precision, recall and
        F1, of which F1 is taken.
    greater_is_better : bool or None
        False: the scorer returns the metric with its sign changed. None: False for the error rates
        of this module, True for all else.
    response_method : {"predict", "predict_segments"}
        Method of the estimator whose result is scored. Labels per position join adjacent segments
        of one label; segments do not.
    **kwargs
        Options of `metric`.

    Returns
    -------
    scorer : callable
        Function of ``(estimator, X, y)``; the larger, the better. It can be pickled if `metric`
        can.

    Raises
    ------
    TypeError, ValueError
        If `metric` cannot be called or `response_method` is not one of the above.

    Examples
    --------
    >>> from sklearn_api.metrics import make_segment_scorer, segment_precision_recall_f1
    >>> make_segment_scorer(segment_precision_recall_f1, tolerance=3, ignore_label="none")
    make_segment_scorer(segment_precision_recall_f1, tolerance=3, ignore_label='none')
    """
    if not callable(metric):
        raise TypeError(f"`metric` must be a function of (y_true, y_pred); got {metric!r}.")
    if response_method not in ("predict", "predict_segments"):
        raise ValueError(
            f"`response_method` must be 'predict' or 'predict_segments'; got {response_method!r}."
        )
    if greater_is_better is None:
        greater_is_better = metric not in _ERRORS
    return _SegmentScorer(metric, 1 if greater_is_better else -1, response_method, kwargs)


def _name(metric: Callable) -> str:
    return getattr(metric, "__name__", repr(metric))

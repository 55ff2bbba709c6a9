"""Scorers of segments for scikit-learn's model selection."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

from sklearn_api._responses import get_response
from sklearn_api.metrics._errors import frame_error_rate, segment_error_rate
from sklearn_api.metrics._scorer_base import MetricScorer
from sklearn_api.metrics._segments import PrecisionRecallF1

_ERRORS = (frame_error_rate, segment_error_rate)


class _SegmentScorer(MetricScorer):
    maker = "make_segment_scorer"
    responses = ("predict", "predict_segments")

    def _score(self, estimator: Any, X: Any, y: Any) -> float:
        score = self._metric(y, get_response(estimator, self._response_method)(X), **self._kwargs)
        if isinstance(score, PrecisionRecallF1):
            score = score.f1
        if not isinstance(score, Real):
            raise ValueError(
                f"`metric` must return one number to be a scorer; {self._name} returned {score!r}."
            )
        return self._sign * float(score)


def make_segment_scorer(
    metric: Callable[..., Any],
    *,
    greater_is_better: bool | None = None,
    response_method: Literal["predict", "predict_segments"] = "predict",
    **kwargs: Any,
) -> Callable[[Any, Any, Any], float]:
    """Make a scorer for `GridSearchCV`, `cross_val_score` and others from a metric.

    It supports ragged sequences; scikit-learn's `make_scorer` supports arrays only.

    Parameters
    ----------
    metric : callable
        Function of ``(y_true, y_pred, **kwargs)`` that returns a number, or precision, recall and
        F1, of which F1 is taken.
    greater_is_better : bool or None
        False: the scorer returns the metric with its sign changed. None: False for the error rates
        of this module, True for all other metrics.
    response_method : {"predict", "predict_segments"}
        Method of the estimator whose result is scored. Labels per position merge adjacent segments
        of one label; segments keep them separate.
    **kwargs
        Options of `metric`.

    Returns
    -------
    scorer : callable
        Function of ``(estimator, X, y, groups=None)``; larger is better. It can be pickled if
        `metric` can.

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
    if greater_is_better is None:
        greater_is_better = metric not in _ERRORS
    return _SegmentScorer(metric, greater_is_better, response_method, kwargs)

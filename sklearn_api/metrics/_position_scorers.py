"""Scorers from metrics of positions and from the likelihood of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.targets import check_y
from sklearn_api._responses import final_estimator, get_response
from sklearn_api.metrics._scorer_base import MetricScorer, SequenceScorer


class _PositionScorer(MetricScorer):
    maker = "make_position_scorer"
    responses = ("predict", "predict_proba")

    def _score(self, estimator: Any, X: Any, y: Any) -> float:
        layout = read_layout(X)
        gold = check_y(y, layout).position_labels
        output = get_response(estimator, self._response_method)(X)
        flat = output if layout.kind == "single" else np.concatenate(list(output))
        kwargs = dict(self._kwargs)
        if self._response_method == "predict_proba":
            classes = final_estimator(estimator).classes_
            if "labels" in inspect.signature(self._metric).parameters:
                # Labels of the model that are absent from a fold have a column, too.
                kwargs.setdefault("labels", classes)
            if len(classes) == 2:
                flat = flat[:, 1]
        return self._sign * float(self._metric(gold, flat, **kwargs))


def make_position_scorer(
    metric: Callable[..., Any],
    *,
    greater_is_better: bool = True,
    response_method: Literal["predict", "predict_proba"] = "predict",
    **kwargs: Any,
) -> Callable[[Any, Any, Any], float]:
    """Make a scorer of ragged sequences from a metric of scikit-learn.

    The metric is applied to the concatenated positions of all sequences, with equal weights.

    Parameters
    ----------
    metric : callable
        Function of ``(y_true, y_pred, **kwargs)`` that returns a number, such as
        `sklearn.metrics.balanced_accuracy_score` or `sklearn.metrics.log_loss`.
    greater_is_better : bool, default=True
        False: the scorer returns the metric with its sign changed.
    response_method : {"predict", "predict_proba"}, default="predict"
        Method of the estimator. For two labels, the metric receives the probabilities of the
        second, as with `sklearn.metrics.make_scorer`. Its argument ``labels``, if it has one, is by
        default all labels of the model.
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
    >>> from sklearn.metrics import f1_score
    >>> from sklearn_api.metrics import make_position_scorer
    >>> make_position_scorer(f1_score, average="macro")
    make_position_scorer(f1_score, average='macro')
    """
    return _PositionScorer(metric, greater_is_better, response_method, kwargs)


class _LogLikelihoodScorer(SequenceScorer):
    """Log-probability of the true segmentations under a model, in nats per position.

    A proper score of the whole distribution over segmentations, including boundaries and durations:
    it distinguishes models that predict the same labels. It is -inf if the model forbids a true
    segment or transition (`min_duration`, `transition_constraints`). True segments longer than the
    `max_duration` of the model are split first, as in training, which favours a small K: use a
    score of segments to choose K.

    Parameters
    ----------
    estimator : fitted `SemiCRFSegmenter`, or pipeline or search with it
    X, y : sequences and their labels or segments
    groups : array-like of shape (n_rows,), optional
        For 2-D X.

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api import SemiCRFSegmenter
    >>> from sklearn_api.metrics import log_likelihood_scorer
    >>> y = [np.repeat([0, 1, 0], n) for n in ([3, 2, 4], [4, 3, 3])]
    >>> X = [labels[:, None] * 2.0 for labels in y]
    >>> -0.5 < log_likelihood_scorer(SemiCRFSegmenter(alpha=0.1).fit(X, y), X, y) < 0
    True
    """

    __name__ = "log_likelihood_scorer"

    def __repr__(self) -> str:
        return self.__name__

    def _score(self, estimator: Any, X: Any, y: Any) -> float:
        value = get_response(estimator, "log_likelihood")(X, y)
        return float(np.sum(value) / read_layout(X).lengths.sum())


log_likelihood_scorer = _LogLikelihoodScorer()

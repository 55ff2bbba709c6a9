"""Base classes of scorers of sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from sklearn.utils.metadata_routing import MetadataRequest

from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.nested import as_sequences

__all__ = ["MetricScorer", "SequenceScorer"]


class SequenceScorer:
    """Callable ``(estimator, X, y, groups=None)``; a subclass scores in `_score`.

    With metadata routing, scikit-learn passes `groups`: the sequence of each row of a 2-D X.
    """

    def __call__(self, estimator: Any, X: Any, y: Any, groups: Any = None) -> float:
        """Score of a fitted estimator; larger is better.

        Parameters
        ----------
        estimator : fitted estimator of sequences
        X, y : sequences and their labels or segments
        groups : array-like of shape (n_rows,), optional
            For 2-D X: the sequence of each row.

        Returns
        -------
        float"""
        if groups is not None and read_layout(X).kind == "single":
            X, y = as_sequences(X, groups), as_sequences(y, groups)
        return self._score(estimator, X, y)

    def _score(self, estimator: Any, X: Any, y: Any) -> float:
        raise NotImplementedError

    def get_metadata_routing(self) -> MetadataRequest:
        """Metadata request for `groups`, as in the splitters."""
        request = MetadataRequest(owner=self)
        request.score.add_request(param="groups", alias=True)
        return request


class MetricScorer(SequenceScorer):
    """Scorer made from a metric; a class, not a closure, so that it can be pickled.

    In a subclass, `maker` is the name of the function that creates it, and `responses` the methods
    of an estimator that it can score, the default first.

    Parameters
    ----------
    metric : callable
        Function of ``(y_true, y_pred, **kwargs)``.
    greater_is_better : bool
        False: the sign of the metric is changed.
    response_method : str
        One of `responses`.
    kwargs : dict
        Options of `metric`.
    """

    maker: ClassVar[str]
    responses: ClassVar[tuple[str, str]]

    def __init__(
        self,
        metric: Callable[..., Any],
        greater_is_better: bool,
        response_method: str,
        kwargs: dict[str, Any],
    ) -> None:
        if not callable(metric):
            raise TypeError(f"`metric` must be a function of (y_true, y_pred); got {metric!r}.")
        if response_method not in self.responses:
            one, two = self.responses
            raise ValueError(
                f"`response_method` must be {one!r} or {two!r}; got {response_method!r}."
            )
        self._metric = metric
        self._sign = 1 if greater_is_better else -1
        self._response_method = response_method
        self._kwargs = kwargs

    @property
    def _name(self) -> str:
        return getattr(self._metric, "__name__", repr(self._metric))

    def __repr__(self) -> str:
        response = self._response_method
        shown = [self._name]
        shown += [] if self._sign > 0 else ["greater_is_better=False"]
        shown += [] if response == self.responses[0] else [f"response_method={response!r}"]
        shown += [f"{name}={value!r}" for name, value in self._kwargs.items()]
        return f"{self.maker}({', '.join(shown)})"

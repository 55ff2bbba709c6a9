"""Methods of an estimator, also where a pipeline or a search stands before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.pipeline import Pipeline

__all__ = ["final_estimator", "find_response", "get_response"]


def find_response(estimator: Any, method: str) -> Callable[..., Any] | None:
    """Method of a fitted estimator as a function of X, and of whatever else it takes.

    Pipelines and searches hand on the methods that scikit-learn knows; those of
    `SemiCRFSegmenter` alone, such as `predict_segments`, `predict_topk`, `sample` and
    `log_likelihood`, are reached through their last step.

    Parameters
    ----------
    estimator : fitted estimator, Pipeline, or search over either
    method : str

    Returns
    -------
    callable, or None where there is no such method

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_api import SemiCRFSegmenter
    >>> from sklearn_api.preprocessing import PerPosition
    >>> X, y = [np.array([[0.0], [0.0], [9.0], [9.0]])], [np.array([0, 0, 1, 1])]
    >>> pipeline = make_pipeline(PerPosition(StandardScaler()), SemiCRFSegmenter()).fit(X, y)
    >>> [(s.start, s.end) for s in find_response(pipeline, "predict_segments")(X)[0]]
    [(0, 1), (2, 3)]
    """
    own = getattr(estimator, method, None)
    if own is not None:
        return own
    if isinstance(estimator, Pipeline):
        last = find_response(estimator.steps[-1][1], method)
        if last is None or len(estimator.steps) == 1:
            return last
        return lambda X, *args, **kwargs: last(estimator[:-1].transform(X), *args, **kwargs)
    if hasattr(estimator, "best_estimator_"):
        return find_response(estimator.best_estimator_, method)
    return None


def get_response(estimator: Any, method: str) -> Callable[..., Any]:
    """Like `find_response`, for a method that must be there.

    Raises
    ------
    AttributeError
        If it is not, naming the estimator.
    """
    response = find_response(estimator, method)
    if response is None:
        raise AttributeError(f"`estimator` must have the method {method!r}; got {estimator!r}.")
    return response


def final_estimator(estimator: Any) -> Any:
    """Last step of a pipeline, best estimator of a search, or the estimator itself."""
    if isinstance(estimator, Pipeline):
        return final_estimator(estimator.steps[-1][1])
    if hasattr(estimator, "best_estimator_"):
        return final_estimator(estimator.best_estimator_)
    return estimator

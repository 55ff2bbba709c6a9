"""The layout of X without a fitted estimator, for splitters and scorers."""

from __future__ import annotations

from typing import Any

import numpy as np

from sklearn_api._inputs.containers import sequences_of
from sklearn_api._inputs.sequences import Layout, group_starts
from sklearn_api._sklearn import num_samples

__all__ = ["read_layout"]


def read_layout(X: Any, groups: Any = None) -> Layout:
    """Layout of X; its values are not looked at.

    Parameters
    ----------
    X : sequences, in the forms that `SemiCRFSegmenter` takes, or what a pipeline makes them of
    groups : array-like of shape (n_rows,), optional
        Used for 2-D X only: one sequence per id.

    Returns
    -------
    Layout

    Raises
    ------
    ValueError
        For an empty X, or rows of a group that are not contiguous.

    Examples
    --------
    >>> read_layout([np.zeros((3, 2)), np.zeros((5, 2))]).lengths
    array([3, 5])
    >>> read_layout(np.zeros((4, 2)), groups=[7, 7, 7, 1]).lengths
    array([3, 1])
    """
    items, X = sequences_of(X, raw=True)
    num_rows = num_samples(X if items is None else items)
    if num_rows == 0:
        raise ValueError("`X` must hold at least 1 sequence or row; got 0.")
    if items is not None:
        return Layout("many", np.array([num_samples(x) for x in items], dtype=np.int64))
    if groups is None:
        return Layout("single", np.array([num_rows]))
    return Layout("groups", np.diff(group_starts(groups, num_rows), append=num_rows))

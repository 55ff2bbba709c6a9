"""How X is nested, told without a fitted estimator: for splitters and scorers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import _num_samples

from sklearn_api.sequences import Layout, _group_starts, _holds_sequences

__all__ = ["read_layout"]


def read_layout(X: Any, groups: Any = None) -> Layout:
    """Layout of X; its values are not looked at.

    Parameters
    ----------
    X : sequences, in the forms that `SemiCRFSegmenter` takes
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
    if _num_samples(X) == 0:
        raise ValueError("`X` must hold at least 1 sequence or row; got 0.")
    if _holds_sequences(X):
        return Layout("many", np.array([_num_samples(x) for x in X], dtype=np.int64))
    num_rows = _num_samples(X)
    if groups is None:
        return Layout("single", np.array([num_rows]))
    return Layout("groups", np.diff(_group_starts(groups, num_rows), append=num_rows))

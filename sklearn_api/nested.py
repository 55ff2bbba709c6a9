"""Sequences in the one form that scikit-learn's tools take as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sklearn_api.sequences import _is_segments, object_array

__all__ = ["as_sequences"]


def as_sequences(items: Iterable[Any]) -> np.ndarray:
    """Object array of sequences: X or y as `cross_val_score`, `GridSearchCV`, ... can index it.

    Those take a list of lists, and several sequences of one length, for a table.

    Parameters
    ----------
    items : iterable of sequences
        Of labels per position, of features (T_i, D), or of segments.

    Returns
    -------
    object ndarray of shape (n_sequences,)
        Lists and tuples are made arrays; a list of segments, an object array of them.

    Raises
    ------
    ValueError
        For an element that is no sequence, naming its index.

    Examples
    --------
    >>> y = as_sequences([["a", "a", "b"], ["b", "a", "a"]])
    >>> y.shape, y[0].tolist()
    ((2,), ['a', 'a', 'b'])
    """
    result = []
    for i, item in enumerate(items):
        if isinstance(item, (list, tuple)):
            item = object_array(item) if _is_segments(item) else np.asarray(item)
        if isinstance(item, str) or not hasattr(item, "__len__"):
            raise ValueError(
                f"`items` must hold sequences; got {item!r} at index {i}. One sequence alone goes "
                "in a list."
            )
        result.append(item)
    return object_array(result)

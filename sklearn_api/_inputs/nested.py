"""Sequences in the one form that scikit-learn's tools take as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sklearn_api._inputs.containers import to_host
from sklearn_api._inputs.labels import are_segments, as_labels, is_nested
from sklearn_api._inputs.sequences import group_starts, object_array
from sklearn_api._sklearn import num_samples, safe_indexing

__all__ = ["as_sequences"]


def as_sequences(items: Iterable[Any], groups: Any = None) -> np.ndarray:
    """Object array of sequences: X or y as `cross_val_score`, `GridSearchCV`, ... can index it.

    Those take a list of lists, and several sequences of one length, for a table.

    Parameters
    ----------
    items : iterable of sequences
        Of labels per position, of features (T_i, D), or of segments.
    groups : array-like of shape (n_rows,), optional
        Then `items` are the rows, or labels, of all sequences one after the other, and these are
        their sequences: rows of an id are contiguous.

    Returns
    -------
    object ndarray of shape (n_sequences,)
        Lists and tuples are made arrays; a list of segments, an object array of them.

    Raises
    ------
    ValueError
        For an element that is no sequence, or labels of several kinds, naming its index.

    Examples
    --------
    >>> y = as_sequences([["a", "a", "b"], ["b", "a", "a"]])
    >>> y.shape, y[0].tolist()
    ((2,), ['a', 'a', 'b'])
    >>> as_sequences(["a", "a", "b"], groups=[7, 7, 9])[1].tolist()
    ['b']
    """
    if groups is not None:
        items = to_host(items, "items")
        starts = group_starts(groups, num_samples(items))
        stops = [*starts[1:], num_samples(items)]
        items = [safe_indexing(items, slice(a, b)) for a, b in zip(starts, stops, strict=True)]
    result = []
    for i, item in enumerate(items):
        if isinstance(item, (list, tuple)):
            item = _as_array(item, i)
        if isinstance(item, str) or not hasattr(item, "__len__"):
            raise ValueError(
                f"`items` must hold sequences; got {item!r} at index {i}. One sequence alone goes "
                "in a list."
            )
        result.append(item)
    return object_array(result)


def _as_array(item: list[Any] | tuple[Any, ...], index: int) -> np.ndarray:
    if are_segments(item):
        return object_array(item)
    if any(map(is_nested, item)):
        return np.asarray(item)
    return as_labels(list(item), "items", lambda t: f"position {t} of sequence {index}")

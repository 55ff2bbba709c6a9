"""Containers that hold X and y: one sequence or many, and the arrays in them.

Arrays, frames, matrices and tensors are recognised by their `shape`; lists, and all else that can
be iterated over, by their entries. Iterators are read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from numbers import Number
from typing import Any

import numpy as np
import torch

__all__ = ["listed", "num_dimensions", "sequences_of", "to_host"]

_X = (
    "`X` must be one sequence of shape (T, D), or a list, tuple or other ordered collection of "
    "such sequences"
)


def to_host(values: Any, name: str) -> Any:
    """Tensors as arrays in main memory, masked arrays without their mask; all else as it is.

    Raises
    ------
    ValueError
        For a masked array that masks an entry, or a sparse tensor.
    """
    if isinstance(values, torch.Tensor):
        if values.layout != torch.strided:
            raise ValueError(
                f"`{name}` must hold dense tensors or scipy's sparse matrices; got a tensor of "
                f"layout {values.layout}."
            )
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, np.ma.MaskedArray):
        masked = np.argwhere(np.ma.getmaskarray(values))
        if len(masked):
            raise ValueError(
                f"`{name}` must not mask entries: fill them, or leave them out. Got a mask at "
                f"index {tuple(masked[0].tolist())}."
            )
        return values.data
    return values


def num_dimensions(values: Any) -> int:
    """Dimensions of an array, frame, matrix or tensor; nested lists count by their depth."""
    if hasattr(values, "shape"):
        return len(values.shape)
    if hasattr(values, "__array__"):
        return np.ndim(values)
    depth = 0
    while isinstance(values, (list, tuple)):
        depth += 1
        values = values[0] if len(values) else None
    return depth + np.ndim(values) if hasattr(values, "shape") else depth


def listed(values: Any, requirement: str) -> list[Any]:
    """Entries of an ordered collection or an iterator.

    Parameters
    ----------
    values : iterable
    requirement : str
        Beginning of the message: "`y` must be ...".

    Raises
    ------
    TypeError
        For a string, a dict, a set, or what cannot be iterated over.
    """
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        small = values is None or isinstance(values, (str, bytes, Number))
        shown = f"{values!r:.60}" if small else f"a {type(values).__name__}"
        raise TypeError(f"{requirement}; got {shown}.")
    return list(values)


def sequences_of(X: Any, raw: bool = False) -> tuple[list[Any] | None, Any]:
    """The sequences that X holds, or None where X is the rows of one; and X, which can be read.

    Parameters
    ----------
    X : see Notes of `SemiCRFSegmenter`
    raw : bool
        Take also what a pipeline has yet to make features of: sequences of tokens or of numbers.

    Returns
    -------
    sequences : list, or None for one sequence
    rows : X itself, as a list where it was an iterator
        Of shape (T, D), for one sequence.

    Raises
    ------
    TypeError, ValueError
        For another form.
    """
    if not hasattr(X, "shape") and hasattr(X, "__array__"):
        X = np.asarray(X)
    shape = getattr(X, "shape", (None,))
    if len(shape) == 2:
        return None, X
    if len(shape) not in (1, 3):
        raise ValueError(f"{_X}; got {_of_shape(shape)}")
    items = listed(X, _X)
    if not items or len(shape) == 3:
        return items, X
    token = _first_token(items)
    dimensions = set(map(num_dimensions, items))
    plain = token is None and all(isinstance(item, (list, tuple)) for item in items)
    if plain and dimensions == {1} and len(set(map(len, items))) == 1:
        return None, items  # as `tolist` makes them of an array
    if raw:
        return (None if 0 in dimensions else items), items
    if token is not None:
        raise TypeError(
            f"`X` must hold numbers; got {token[0]!r:.60} at {token[1]}. "
            "`sklearn_api.preprocessing.TokenFeatures` makes features of dicts and strings."
        )
    if 2 in dimensions:
        return items, X
    if dimensions == {0}:
        raise ValueError(f"{_X}; got {_of_shape((len(items),))}")
    held = " and ".join(f"{number}-D" for number in sorted(dimensions))
    raise ValueError(
        f"{_X}; got a {type(X).__name__} of {held} arrays. Reshape your data: "
        "`[x.reshape(-1, 1) for x in X]` makes sequences with one feature at each position of 1-D "
        "signals, `np.stack(X)` one sequence of its rows."
    )


def _of_shape(shape: tuple[int, ...]) -> str:
    text = f"an array of shape {tuple(shape)}."
    if len(shape) == 1:
        text += " Reshape your data: `x.reshape(-1, 1)` has one feature at each position."
    return text


def _first_token(items: list[Any]) -> tuple[Any, str] | None:
    """A dict or string among what is first in each of some nested lists, and where it is."""
    for i, item in enumerate(items):
        depth = 0
        while isinstance(item, (list, tuple)) and len(item):
            item, depth = item[0], depth + 1
        if isinstance(item, (dict, str)):
            return item, f"position 0 of sequence {i}" if depth else f"index {i}"
    return None

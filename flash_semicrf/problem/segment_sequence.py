"""`Segment`, and sequences of them that are kept as columns."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, overload

import numpy as np

__all__ = ["Segment", "Segments"]

_BLOCK = 4096
"""Objects for which an iterator converts the columns at a time."""

_SHOWN = 10
"""Most segments that are printed in full."""


@dataclass(slots=True)
class Segment:
    """Labelled segment of a sequence.

    Parameters
    ----------
    start, end : int
        First and last position, both inclusive.
    label : int
        Class index, 0..C-1.
    score : float
        Contribution of the segment to the score of its segmentation, including its transition
        term.

    Examples
    --------
    >>> Segment(start=3, end=5, label=1).duration
    3
    """

    start: int
    end: int
    label: int
    score: float = 0.0

    @property
    def duration(self) -> int:
        """Number of positions covered."""
        return self.end - self.start + 1


class Segments(Sequence[Segment]):
    """Read-only sequence of `Segment` that makes the objects when they are asked for.

    It compares, iterates, indexes and slices as the list of its segments, so `list` makes that
    list. The segments themselves are columns of numbers: a million of them take milliseconds to
    make and to compare, and the columns are there for computation.

    Parameters
    ----------
    start, end : integer array-like of shape (N,)
        First and last position of each segment, both inclusive.
    label : array-like of shape (N,)
        Class indices, or labels of any kind.
    score : array-like of shape (N,), optional
        Values of ``Segment.score``; zeros by default.

    Raises
    ------
    TypeError
        If `start` or `end` are not integers.
    ValueError
        If the columns do not have one dimension and one length.

    Notes
    -----
    Arrays are not copied, and slices share memory with the whole. Every access to a segment makes
    a new object: assigning to its attributes changes that object, not the sequence. ``list(x)`` is
    a list that can be changed.

    Examples
    --------
    >>> segments = Segments(start=[0, 3], end=[2, 5], label=[1, 0])
    >>> segments[1]
    Segment(start=3, end=5, label=0, score=0.0)
    >>> segments == [Segment(0, 2, 1), Segment(3, 5, 0)]
    True
    >>> segments.duration
    array([3, 3])
    """

    __slots__ = ("_end", "_label", "_score", "_start")

    def __init__(self, start: Any, end: Any, label: Any, score: Any = None) -> None:
        self._start, self._end = _read_only(_bounds(start)), _read_only(_bounds(end))
        self._label = _read_only(_labels(label))
        if score is None:
            score = np.broadcast_to(np.float64(0.0), self._start.shape)
        self._score = _read_only(np.asarray(score, dtype=np.float64))
        shapes = [column.shape for column in self._columns]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(
                "`start`, `end`, `label` and `score` must have one shape (N,); got "
                f"{', '.join(map(str, shapes))}."
            )

    @property
    def start(self) -> np.ndarray:
        """First position of each segment: int64, shape (N,), read-only."""
        return self._start

    @property
    def end(self) -> np.ndarray:
        """Last position of each segment, inclusive: int64, shape (N,), read-only."""
        return self._end

    @property
    def label(self) -> np.ndarray:
        """Label of each segment: int64, or objects if they are not integers; read-only."""
        return self._label

    @property
    def score(self) -> np.ndarray:
        """Score of each segment: float64, shape (N,), read-only."""
        return self._score

    @property
    def duration(self) -> np.ndarray:
        """Number of positions that each segment covers: int64, shape (N,)."""
        duration: np.ndarray = self._end - self._start + 1
        return duration

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self._start, self._end, self._label, self._score

    def __len__(self) -> int:
        return len(self._start)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Segments: ...
    def __getitem__(self, index: int | slice) -> Segment | Segments:
        if isinstance(index, slice):
            part = Segments.__new__(Segments)
            part._start, part._end = self._start[index], self._end[index]
            part._label, part._score = self._label[index], self._score[index]
            return part
        if not hasattr(index, "__index__"):
            kind = type(index).__name__
            raise TypeError(f"Segments indices must be integers or slices, not {kind}")
        i, count = operator.index(index), len(self)
        if not -count <= i < count:
            raise IndexError("Segments index out of range")
        return Segment(*(column.item(i) for column in self._columns))

    def __iter__(self) -> Iterator[Segment]:
        if len(self) <= _BLOCK:
            return self._objects()
        blocks = (self[i : i + _BLOCK] for i in range(0, len(self), _BLOCK))
        return chain.from_iterable(block._objects() for block in blocks)

    def _objects(self) -> Iterator[Segment]:
        return map(Segment, *(column.tolist() for column in self._columns))

    def __reversed__(self) -> Iterator[Segment]:
        return iter(self[::-1])

    def __contains__(self, value: object) -> bool:
        return any(map(operator.eq, self, repeat(value)))

    def index(self, value: Any, start: int = 0, stop: int = sys.maxsize) -> int:
        """Index of the first segment in ``[start, stop)`` that equals a value.

        Raises
        ------
        ValueError
            If there is none.
        """
        first, last, _ = slice(start, stop).indices(len(self))
        for i, segment in enumerate(self[first:last], first):
            if segment == value:
                return i
        raise ValueError(f"{value!r} is not in Segments")

    def count(self, value: Any) -> int:
        """Number of segments that equal a value."""
        return operator.countOf(self, value)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Segments):
            return all(map(np.array_equal, self._columns, other._columns))
        if isinstance(other, list):
            return len(self) == len(other) and all(map(operator.eq, self, other))
        return NotImplemented

    def __add__(self, other: Sequence[Segment]) -> list[Segment]:
        return [*self, *other] if isinstance(other, (list, Segments)) else NotImplemented

    def __radd__(self, other: list[Segment]) -> list[Segment]:
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def __repr__(self) -> str:
        if len(self) <= _SHOWN:
            return f"Segments({list(self)})"
        ends = [*map(repr, self[:3]), "...", *map(repr, self[-3:])]
        return f"Segments([{', '.join(ends)}], length={len(self)})"

    def __reduce__(self) -> tuple[type[Segments], tuple[np.ndarray, ...]]:
        return Segments, self._columns


def _read_only(column: np.ndarray) -> np.ndarray:
    view = column.view()
    view.flags.writeable = False
    return view


def _bounds(values: Any) -> np.ndarray:
    column = np.asarray(values)
    if column.size and column.dtype.kind not in "iu":
        raise TypeError(f"`start` and `end` must be integers; got dtype {column.dtype}.")
    return column.astype(np.int64, copy=False)


def _labels(values: Any) -> np.ndarray:
    """Labels as int64, or else as Python objects, which compare by their own rules."""
    column = np.asarray(values)
    if column.dtype.kind in "iu" or not column.size:
        return column.astype(np.int64, copy=False)
    return column.astype(object) if column is values else np.array(list(values), dtype=object)

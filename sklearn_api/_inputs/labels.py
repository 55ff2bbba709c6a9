"""Labels and segments as users write them: distinguished, checked, brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from flash_semicrf.problem.segments import Segment, Segments, whole_number
from sklearn_api._inputs.containers import num_dimensions

__all__ = [
    "are_segments",
    "as_labels",
    "is_nested",
    "label_kind",
    "read_classes",
    "read_segments",
    "which_nested",
]

_LABELS = "must hold labels of one kind: strings, whole numbers or bools"


def is_nested(entry: Any) -> bool:
    """Whether an entry of a sequence is a segment, or a sequence itself, rather than a label."""
    if isinstance(entry, Segment):
        return True
    if isinstance(entry, (str, bytes)) or not hasattr(entry, "__len__"):
        return False
    return not hasattr(entry, "shape") or num_dimensions(entry) > 0


def which_nested(entries: list[Any] | np.ndarray) -> np.ndarray:
    """`is_nested` of all entries of a sequence, bool ndarray of shape (N,)."""
    none = np.zeros(len(entries), dtype=bool)
    if isinstance(entries, np.ndarray) and entries.ndim == 1 and entries.dtype != object:
        return none
    if all(issubclass(kind, (str, Real)) for kind in set(map(type, entries))):
        return none
    return np.array([is_nested(entry) for entry in entries], dtype=bool)


def are_segments(entries: Iterable[Any]) -> bool:
    """Whether entries are the segments of one sequence; there must be one.

    Three numbers in a list may be a segment, as JSON has it, or the labels of three positions: with
    a string as the last of them they are a segment.
    """
    first = next(iter(entries), None)
    if isinstance(first, Segment):
        return True
    if not isinstance(first, (tuple, list, np.ndarray)) or len(first) != 3:
        return False
    start, stop, label = first
    bounded = whole_number(start) is not None and whole_number(stop) is not None
    return bounded and (isinstance(first, tuple) or isinstance(label, str))


def read_segments(
    given: Sequence[Any] | np.ndarray, name: str, index: int
) -> list[tuple[int, int, Any]]:
    """`_read_segment` of all segments of sequence `index`."""
    if isinstance(given, Segments) and _are_plain(given):
        columns = (given.start, given.end + 1, given.label)
        return list(zip(*(column.tolist() for column in columns), strict=True))
    place = f"segment {{}} of sequence {index}"
    return [_read_segment(entry, name, place.format(n)) for n, entry in enumerate(given)]


def _are_plain(segments: Segments) -> bool:
    """Whether all bounds are valid, and all labels strings, whole numbers or bools of Python."""
    kinds = {int} if segments.label.dtype == np.int64 else set(map(type, segments.label.tolist()))
    valid = (segments.start >= 0) & (segments.end >= segments.start)
    return kinds <= {str, int, bool} and bool(valid.all())


def _read_segment(given: Any, name: str, place: str) -> tuple[int, int, Any]:
    """Start, exclusive stop and label of a segment, as Python objects.

    Parameters
    ----------
    given : Segment, or tuple, list or array (start, stop, label)
    name : str
        Of the argument, for the message.
    place : str
        Where it is: "segment 3 of sequence 1".

    Raises
    ------
    TypeError
        If it is none of these, a bound is no whole number, or the label no string or number.
    ValueError
        If it is empty or starts before position 0.
    """
    if isinstance(given, Segment):
        start, stop, label = given.start, given.end, given.label
    elif isinstance(given, (tuple, list, np.ndarray)) and len(given) == 3:
        start, stop, label = given
    else:
        raise TypeError(
            f"Segments of `{name}` must be (start, end, label) tuples with an exclusive end; got "
            f"{given!r} as {place}."
        )
    start, stop = whole_number(start), whole_number(stop)
    label = _plain(label)
    if start is None or stop is None or _kind_of(label) is None:
        raise TypeError(
            f"Segments of `{name}` must be (int, int, str or number); got {given!r} as {place}."
        )
    stop += isinstance(given, Segment)  # its end is inclusive
    if not 0 <= start < stop:
        raise ValueError(
            f"Segments of `{name}` must have 0 <= start < end; got start={start} and end={stop} as "
            f"{place}."
        )
    return start, stop, label


def _plain(label: Any) -> Any:
    """A label without its wrapping as a scalar of numpy, or as a tensor."""
    return label.item() if getattr(label, "ndim", None) == 0 else label


def label_kind(labels: np.ndarray) -> str | None:
    """Kind of checked labels: "strings", "numbers" or "bools"; None of no labels."""
    return _kind_of(labels[0]) if len(labels) else None


def _kind_of(label: Any) -> str | None:
    """Kind of a label; None for what cannot be one, such as None or NaN."""
    is_nan = isinstance(label, Real) and label != label
    return None if is_nan else _kind_of_type(type(label))


def _kind_of_type(kind: type) -> str | None:
    if issubclass(kind, str):
        return "strings"
    if issubclass(kind, (bool, np.bool_)):
        return "bools"
    return "numbers" if issubclass(kind, Real) else None


def as_labels(values: list[Any] | np.ndarray, name: str, place: Callable[[int], str]) -> np.ndarray:
    """Labels as an array, none of them changed in kind.

    Parameters
    ----------
    values : list or ndarray of shape (N,)
    name : str
        Of the argument, for the message.
    place : callable
        Where the n-th one is: "position 3 of sequence 1".

    Returns
    -------
    ndarray of shape (N,)
        Of strings, an object array stays one.

    Raises
    ------
    ValueError
        For labels of several kinds, missing ones, and numbers that are not whole.
    """
    array = values if isinstance(values, np.ndarray) else None
    if array is None or array.dtype.kind not in "biufU":
        kinds = set(map(_kind_of_type, set(map(type, values))))
        if len(kinds) > 1 or None in kinds:
            values = [_plain(value) for value in values]
            kinds = set(map(_kind_of, values))
        if len(kinds) > 1 or None in kinds:
            _refuse(values, name, place)
        if array is None or "strings" not in kinds:
            array = np.array(list(values))
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.trunc(array))
        if not whole.all():
            n = int(np.argmin(whole))
            continuous = np.isfinite(array[n])  # both in scikit-learn's words
            problem = "Unknown label type: continuous" if continuous else "Input y contains NaN"
            raise ValueError(f"{problem}. `{name}` {_LABELS}; got {array[n]} at {place(n)}.")
    return array


def read_classes(classes: Any) -> np.ndarray:
    """Sorted, distinct labels that a user lists as the classes.

    Raises
    ------
    TypeError
        If they are not an array, list or other collection.
    ValueError
        As `as_labels`.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise TypeError(f"`classes` must be an array or list of labels; got {classes!r}.")
    return np.unique(as_labels(list(classes), "classes", "index {}".format))


def _refuse(values: list[Any], name: str, place: Callable[[int], str]) -> NoReturn:
    """Raise for the first value that is no label, or else for the first of another kind."""
    kinds = [_kind_of(value) for value in values]
    first = next(n for n, kind in enumerate(kinds) if kind is None or kind != kinds[0])
    n = kinds.index(None) if None in kinds else first
    among = "" if None in kinds else f", after {kinds[0]}"
    raise ValueError(f"`{name}` {_LABELS}; got {values[n]!r} at {place(n)}{among}.")

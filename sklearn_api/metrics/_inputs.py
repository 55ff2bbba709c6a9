"""Conversion of true and predicted segmentations from every form that the metrics accept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np

from flash_semicrf.problem.segments import Segments
from sklearn_api._inputs.labels import are_segments, is_nested, read_segments


@dataclass(frozen=True)
class Segmentation:
    """Segments of one sequence, ordered, half-open, not overlapping.

    Parameters
    ----------
    starts, stops : int64 ndarray of shape (N,)
        Bounds of the segments.
    labels : list of length N
        Their labels, as plain Python objects.
    length : int or None
        Number of positions; None if unknown, as for a list of segments.
    """

    starts: np.ndarray
    stops: np.ndarray
    labels: list[Any]
    length: int | None

    @classmethod
    def empty(cls) -> Segmentation:
        """Segmentation of unknown length without segments."""
        none = np.empty(0, dtype=np.int64)
        return cls(none, none, [], None)

    def without(self, label: Any) -> Segmentation:
        """Segmentation without the segments of one label; itself for None."""
        if label is None:
            return self
        keep = [i for i, other in enumerate(self.labels) if other != label]
        return Segmentation(
            self.starts[keep], self.stops[keep], [self.labels[i] for i in keep], self.length
        )


def read_pairs(y_true: Any, y_pred: Any) -> list[tuple[Segmentation, Segmentation]]:
    """Pairs of true and predicted segmentations, checked against each other.

    Raises
    ------
    TypeError
        If an argument has none of the accepted forms.
    ValueError
        If the two do not fit together, or segments overlap.
    """
    true, true_is_one = _read(y_true, "y_true")
    pred, pred_is_one = _read(y_pred, "y_pred")
    # An empty list is one sequence without segments if the other argument is one sequence.
    if true_is_one and _is_empty_list(y_pred):
        pred = [Segmentation.empty()]
    if pred_is_one and _is_empty_list(y_true):
        true = [Segmentation.empty()]
    if len(true) != len(pred):
        raise ValueError(
            "`y_true` and `y_pred` must hold the same number of sequences; got "
            f"{len(true)} and {len(pred)}."
        )
    if not true:
        raise ValueError("`y_true` and `y_pred` must hold at least one sequence; got 0.")
    for i, (one, two) in enumerate(zip(true, pred, strict=True)):
        _check_lengths(one, two, i)
    kinds = [_label_kind(true, "y_true"), _label_kind(pred, "y_pred")]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ValueError(
            f"`y_true` and `y_pred` must hold labels of one kind; got {kinds[0]} and {kinds[1]}."
        )
    return list(zip(true, pred, strict=True))


def read_one(y: Any, name: str) -> Segmentation:
    """Segmentation from an argument that must be one sequence, in any form.

    Raises
    ------
    TypeError
        If it has none of the accepted forms.
    ValueError
        If it holds another number of sequences, or strings and numbers.
    """
    sequences, _ = _read(y, name)
    if len(sequences) != 1:
        raise ValueError(f"`{name}` must be one sequence; got {len(sequences)}.")
    _label_kind(sequences, name)
    return sequences[0]


def read_labels(
    pairs: Iterable[tuple[Segmentation, Segmentation]],
    labels: Sequence[Any] | None,
    ignore_label: Any,
) -> list[Any]:
    """Labels to score: the given ones, or all that occur, sorted, except `ignore_label`.

    Raises
    ------
    TypeError, ValueError
        If a label is invalid, repeated, or equal to `ignore_label`.
    """
    present = {label for pair in pairs for one in pair for label in one.labels}
    check_ignore_label(present, ignore_label)
    if labels is None:
        return sorted(present - {ignore_label})
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"`labels` must be a list of labels; got {labels!r}.")
    labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
    if not labels:
        raise ValueError("`labels` must name at least one label; got an empty list.")
    for i, label in enumerate(labels):
        _check_kind(present, label, f"labels[{i}]")
        if label in labels[:i]:
            raise ValueError(f"`labels` must not repeat a label; got {label!r} again at index {i}.")
    if ignore_label is not None and ignore_label in labels:
        raise ValueError(f"`labels` must not contain `ignore_label`; got {ignore_label!r} in both.")
    return labels


def check_ignore_label(present: Iterable[Any], ignore_label: Any) -> None:
    """Raise an error for an `ignore_label` that cannot occur, such as 0 among strings."""
    if ignore_label is not None:
        _check_kind(present, ignore_label, "ignore_label")


def _check_kind(present: Iterable[Any], label: Any, name: str) -> None:
    if not isinstance(label, str | Number | np.generic):
        raise TypeError(f"`{name}` must be one label, a string or a number; got {label!r}.")
    for other in present:
        if isinstance(other, str) != isinstance(label, str):
            raise ValueError(
                f"`{name}` must be a {_kind(other)} like the labels of `y_true`; got {label!r}."
            )


def _kind(label: Any) -> str:
    return "string" if isinstance(label, str) else "number"


def _label_kind(sequences: list[Segmentation], name: str) -> str | None:
    """Kind of the labels, "strings" or "numbers"; None if there are none."""
    found = None
    for i, sequence in enumerate(sequences):
        # Within one sequence labels agree already, unless it was read from segments.
        for label in sequence.labels:
            kind = _kind(label) + "s"
            if found not in (None, kind):
                raise ValueError(
                    f"`{name}` must hold labels of one kind; got {found}, then {label!r} at "
                    f"sequence {i}."
                )
            found = kind
    return found


def _check_lengths(true: Segmentation, pred: Segmentation, i: int) -> None:
    if true.length is not None and pred.length is not None:
        if true.length != pred.length:
            raise ValueError(
                "`y_true` and `y_pred` must have the same number of positions; got "
                f"{true.length} and {pred.length} at sequence {i}."
            )
        return
    for one, length, name in [(pred, true.length, "y_pred"), (true, pred.length, "y_true")]:
        if length is not None and len(one.stops) and one.stops[-1] > length:
            raise ValueError(
                f"Segments of `{name}` must end at or before the length of the sequence, {length}; "
                f"got {one.stops[-1]} at sequence {i}."
            )


def _is_empty_list(y: Any) -> bool:
    return isinstance(y, list | tuple | Segments) and len(y) == 0


def _read(y: Any, name: str) -> tuple[list[Segmentation], bool]:
    """Segmentations of one argument, and whether it is a single sequence."""
    if not isinstance(y, list | tuple | Segments):
        if isinstance(y, str | dict | set) or not hasattr(y, "__array__"):
            raise TypeError(f"`{name}` must be an array or a list; got {type(y).__name__}.")
        y = np.asarray(y)
        if y.ndim not in (1, 2):
            raise ValueError(
                f"`{name}` must have 1 dimension (one sequence) or 2 (one per row); got {y.ndim}."
            )
        if y.ndim == 1 and y.dtype != object:
            return [_read_sequence(y, name, 0)], True
    items = y if isinstance(y, Segments) else list(y)
    if items and (_is_label(items[0]) or are_segments(items)):
        return [_read_sequence(items, name, 0)], True
    return [_read_sequence(item, name, i) for i, item in enumerate(items)], False


def _is_label(item: Any) -> bool:
    return isinstance(item, str | Number | np.generic)


def _read_sequence(sequence: Any, name: str, i: int) -> Segmentation:
    if isinstance(sequence, str) or not hasattr(sequence, "__len__"):
        raise TypeError(
            f"`{name}` must hold one array or list per sequence; got {sequence!r} at sequence {i}."
        )
    is_list = isinstance(sequence, list | tuple | Segments)
    if is_list and len(sequence) == 0:
        return Segmentation.empty()
    sequence = sequence if is_list else np.asarray(sequence)
    may_nest = is_list or sequence.dtype == object or sequence.shape[1:] == (3,)
    if may_nest and is_nested(next(iter(sequence), None)):
        return _read_segments(sequence, name, i)
    return _read_positions(sequence, name, i)


def _read_segments(segments: Sequence[Any], name: str, i: int) -> Segmentation:
    ordered = sorted(read_segments(segments, name, i), key=lambda segment: segment[:2])
    for (_, end, _), (start, _, _) in zip(ordered, ordered[1:], strict=False):
        if start < end:
            raise ValueError(
                f"Segments of `{name}` must not overlap; got one that starts at {start} before "
                f"another ends at {end} in sequence {i}."
            )
    labels = [label for _, _, label in ordered]
    ends = np.array([segment[:2] for segment in ordered], dtype=np.int64)
    return Segmentation(ends[:, 0], ends[:, 1], labels, None)


def _read_positions(labels: Any, name: str, i: int) -> Segmentation:
    """Segmentation of labels per position into maximal runs of one label."""
    if isinstance(labels, list | tuple):
        # np.asarray would turn a mixture of strings and numbers into strings.
        array = np.empty(len(labels), dtype=object)
        for t, label in enumerate(labels):
            array[t] = label
    else:
        array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must have labels of shape (T,) with T >= 1 per sequence; got shape "
            f"{array.shape} at sequence {i}."
        )
    if array.dtype == object:
        _check_objects(array, name, i)
    elif array.dtype.kind not in "Ubiuf":
        raise TypeError(
            f"`{name}` must hold strings or numbers; got dtype {array.dtype} at sequence {i}."
        )
    elif array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(
            f"`{name}` must not contain NaN; got NaN at position {np.isnan(array).argmax()} of "
            f"sequence {i}."
        )
    cuts = np.flatnonzero(np.asarray(array[1:] != array[:-1], dtype=bool)) + 1
    starts = np.concatenate([[0], cuts]).astype(np.int64)
    stops = np.append(starts[1:], len(array))
    runs = [x.item() if isinstance(x, np.generic) else x for x in array[starts]]
    return Segmentation(starts, stops, runs, len(array))


def _check_objects(array: np.ndarray, name: str, i: int) -> None:
    first = array[0]
    for t, label in enumerate(array):
        # NaN is the only label that differs from itself.
        if not _is_label(label) or _kind(label) != _kind(first) or label != label:
            raise TypeError(
                f"`{name}` must hold strings only or numbers only; got {label!r} at position {t} "
                f"of sequence {i}."
            )

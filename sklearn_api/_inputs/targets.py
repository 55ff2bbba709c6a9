"""Gold segmentations y in all the forms users hold.

Everything behind this module sees a `GoldSegments`, all gold segments of a batch as flat half-open
arrays, and once the classes are known the `SegmentTable` that `encode_labels` makes of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import column_or_1d

from flash_semicrf.problem.segments import (
    Segment,
    Segments,
    SegmentTable,
    bio_to_segments,
    segments_to_bio,
)
from sklearn_api._inputs.containers import listed, to_host
from sklearn_api._inputs.labels import (
    as_labels,
    is_nested,
    label_kind,
    read_segments,
    which_nested,
)
from sklearn_api._inputs.sequences import Layout

__all__ = ["GoldSegments", "check_y", "encode_labels"]


@dataclass(frozen=True)
class GoldSegments:
    """Gold segments of a batch, ordered by sequence and start; each sequence is tiled.

    Parameters
    ----------
    sequence, start, stop : int64 ndarray of shape (N,)
        Segment n covers positions ``[start[n], stop[n])`` of sequence ``sequence[n]``.
    labels : ndarray of shape (N,)
        As the user names them.
    """

    sequence: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    labels: np.ndarray

    @property
    def position_labels(self) -> np.ndarray:
        """Labels of all positions of all sequences, one after the other."""
        return np.repeat(self.labels, self.stop - self.start)

    @property
    def bio_tags(self) -> np.ndarray:
        """BIO tags of all positions of all sequences, one after the other."""
        sizes = (self.stop - self.start).tolist()
        rows = zip(sizes, self.labels, strict=True)
        tags = [segments_to_bio([(0, size, label)], size) for size, label in rows]
        return np.array([tag for part in tags for tag in part], dtype=object)


def check_y(y: Any, layout: Layout, tagging: str | None = None) -> GoldSegments:
    """Validate y against the layout of X and turn it into segments.

    Parameters
    ----------
    y : nested as X
        Labels per position, whose maximal runs are the segments; or the segments themselves, as
        half-open ``(start, stop, label)`` tuples, lists or rows, or as `Segment` objects, whose end
        is inclusive.
    layout : Layout
    tagging : {None, "bio"}
        "bio": labels per position are BIO tags, read by
        `flash_semicrf.problem.segments.bio_to_segments`.

    Returns
    -------
    GoldSegments

    Raises
    ------
    TypeError
        For what holds no labels or segments, or bounds of segments that are not whole numbers.
    ValueError
        For lengths that do not match X, segments that do not tile their sequence, or labels that
        are missing, of several kinds or not whole numbers.

    Warns
    -----
    UserWarning
        For the label -100, which elsewhere stands for an unknown one.
    """
    if y is None:
        raise ValueError("Fitting and scoring requires y to be passed, but the target y is None.")
    lengths = layout.lengths
    parts = _parts_of_y(y, layout)
    if len(parts) != len(lengths):
        raise ValueError(
            f"`y` must have one entry per sequence of `X`: {len(lengths)}; got {len(parts)}."
        )
    read = [_read_part(part, i, int(lengths[i])) for i, part in enumerate(parts)]
    in_segments = [isinstance(part, list) for part in read]
    if any(in_segments) and not all(in_segments):
        i, j = in_segments.index(True), in_segments.index(False)
        raise ValueError(
            "`y` must hold either segments or labels per position; got segments in sequence "
            f"{i} and labels in sequence {j}."
        )
    if all(in_segments):
        gold = _tiles(read, lengths)
    elif tagging is None:
        gold = _runs(_joined(read), lengths)
    else:
        gold = _tiles([_read_tags(tags, i) for i, tags in enumerate(read)], lengths)
    if label_kind(gold.labels) == "numbers" and (gold.labels == -100).any():
        count = int((gold.position_labels == -100).sum())
        warnings.warn(
            f"`y` holds the label -100 at {count} positions. It is a label like any other here, "
            "though elsewhere it stands for an unknown one: a later release will read it so.",
            UserWarning,
            stacklevel=3,
        )
    return gold


def _parts_of_y(y: Any, layout: Layout) -> list[Any]:
    """The entries of y for each sequence."""
    y = _array_of(y, "y")
    if isinstance(y, np.ndarray) and y.ndim == 0:
        y = y.item()
    if not isinstance(y, (np.ndarray, Segments)):
        y = listed(y, "`y` must hold labels or segments, nested as `X`")
    if layout.kind == "many":
        return list(y)
    column = isinstance(y, np.ndarray) and y.ndim == 2 and y.shape[1] == 1
    if column:
        y = column_or_1d(y, warn=True)
    if layout.kind == "single":
        if len(y) and is_nested(y[0]) and not isinstance(y[0], Segment) and len(y[0]) != 3:
            raise ValueError(
                f"`y` must hold the labels or segments of one sequence of {layout.lengths[0]} "
                f"positions, as `X` does; got {len(y)} entries of {len(y[0])} each. Several "
                "sequences are a list of arrays of shape (T, D); of 1-D signals, "
                "`[x.reshape(-1, 1) for x in X]`."
            )
        return [y]
    if len(y) and is_nested(y[0]):
        return list(y)
    if len(y) != layout.lengths.sum():
        raise ValueError(
            f"`y` must have one label per row of `X`: {layout.lengths.sum()}; got {len(y)}."
        )
    stops = np.cumsum(layout.lengths)
    return [y[a:b] for a, b in zip(stops - layout.lengths, stops, strict=True)]


def _array_of(values: Any, name: str) -> Any:
    """Arrays, tensors, series and frames as an ndarray; all else as it is."""
    values = to_host(values, name)
    return np.asarray(values) if hasattr(values, "__array__") else values


def _read_part(part: Any, index: int, length: int) -> list[tuple[int, int, Any]] | np.ndarray:
    """Segments of one sequence, as a list, or its labels, as an array."""
    if isinstance(part, Segments) and len(part):
        return read_segments(part, "y", index)
    part = _array_of(part, f"y[{index}]")
    if not isinstance(part, np.ndarray):
        part = listed(part, f"Sequence {index} of `y` must be a list or array")
    elif part.ndim == 2 and part.shape[1] == 1:
        part = part[:, 0]
    elif part.ndim != 1 and part.shape[1:] != (3,):
        raise ValueError(
            f"Sequence {index} of `y` must have shape (T,), or (N, 3) for N segments; got shape "
            f"{part.shape}."
        )
    nested = which_nested(part)
    if nested.any() and not nested.all():
        i, j = int(np.argmax(nested)), int(np.argmin(nested))
        raise ValueError(
            "`y` must hold either segments or labels per position; got "
            f"the segment {part[i]!r} and the label {part[j]!r} in sequence {index}."
        )
    if nested.any() and not isinstance(part, np.ndarray) and _is_column(part):
        return _read_part(np.asarray(part), index, length)
    if nested.any():
        return read_segments(part, "y", index)
    if len(part) != length:
        got = f"{len(part)} labels" if len(part) else "no labels or segments"
        raise ValueError(
            f"Sequence {index} has {length} positions in `X` and {got} in `y`; they must be equal."
        )
    return as_labels(part, "y", lambda t: f"position {t} of sequence {index}")


def _is_column(part: list[Any]) -> bool:
    """Whether a list holds a list of one entry for each position."""
    return all(not isinstance(entry, Segment) and len(entry) == 1 for entry in part)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Labels of all sequences one after the other; they must be of one kind."""
    kinds = [label_kind(part) for part in parts]
    for i, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"`y` must hold labels of one kind; got {kinds[0]} in sequence 0 and {kind} in "
                f"sequence {i}."
            )
    return np.concatenate(parts)


def _read_tags(tags: np.ndarray, index: int) -> list[tuple[int, int, str]]:
    """Segments of one sequence's BIO tags."""
    try:
        return bio_to_segments(tags.tolist())
    except ValueError as error:
        raise ValueError(f'With tagging="bio", sequence {index} of `y`: {error}') from error


def _runs(labels: np.ndarray, lengths: np.ndarray) -> GoldSegments:
    """Maximal runs of equal labels within each sequence."""
    offsets = np.cumsum(lengths) - lengths
    opens = np.r_[True, labels[1:] != labels[:-1]]
    opens[offsets] = True
    start = np.flatnonzero(opens)
    stop = np.append(start[1:], len(labels))
    sequence = np.searchsorted(offsets, start, side="right") - 1
    shift = offsets[sequence]
    return GoldSegments(sequence, start - shift, stop - shift, labels[start])


def _tiles(parts: list[list[tuple[int, int, Any]]], lengths: np.ndarray) -> GoldSegments:
    """Segments as the user gave them, which must tile each sequence."""
    rows, labels = [], []
    for i, part in enumerate(parts):
        expected, length = 0, int(lengths[i])
        for start, stop, label in part:
            if start != expected or stop > length:
                wanted = (
                    f"expected a segment that starts at {expected}"
                    if start != expected
                    else "expected one that ends there"
                )
                raise ValueError(
                    f"The segments of sequence {i} of `y` must tile positions 0..{length - 1} in "
                    f"order; {wanted}, got positions {start}..{stop - 1} with label {label!r}."
                )
            expected = stop
            rows.append((i, start, stop))
            labels.append(label)
        if expected != length:
            raise ValueError(
                f"The segments of sequence {i} of `y` must tile its {length} positions; they end "
                f"after {expected}."
            )
    sequence, start, stop = np.array(rows, dtype=np.int64).T
    labels = as_labels(
        labels, "y", lambda n: f"positions {start[n]}..{stop[n] - 1} of sequence {sequence[n]}"
    )
    return GoldSegments(sequence, start, stop, labels)


def encode_labels(gold: GoldSegments, classes: np.ndarray) -> SegmentTable:
    """Segments with class indices.

    Parameters
    ----------
    gold : GoldSegments
    classes : ndarray of shape (C,)
        Sorted and distinct.

    Raises
    ------
    ValueError
        For a label that is not among the classes, naming it and its sequence.
    """
    if label_kind(gold.labels) == label_kind(classes):
        index = np.searchsorted(classes, gold.labels).clip(max=len(classes) - 1)
        unseen = classes[index] != gold.labels
    else:  # 1 is neither "1" nor True
        index = np.zeros(len(gold.labels), dtype=np.int64)
        unseen = np.ones(len(gold.labels), dtype=bool)
    if np.any(unseen):
        n = int(np.flatnonzero(unseen)[0])
        raise ValueError(
            f"`y` must hold only the classes {classes.tolist()}; got "
            f"{gold.labels[n : n + 1].tolist()[0]!r} in sequence {gold.sequence[n]}."
        )
    columns = (gold.sequence, gold.start, gold.stop, index)
    return SegmentTable(*(torch.from_numpy(np.ascontiguousarray(c, np.int64)) for c in columns))

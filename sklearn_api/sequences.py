"""Ragged X and y in all the forms users hold, and back again.

Everything behind this module sees a `Sequences` (a list of (T_i, D) arrays and the layout they came
in) and a `GoldSegments` (all gold segments of a batch as flat half-open arrays). `Layout.restore`
mirrors the input: rows for 2-D X, a 1-D object array for many sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_feature_names,
    assert_all_finite,
    check_array,
    check_consistent_length,
    column_or_1d,
    validate_data,
)

from flash_semicrf.segments import Segment, SegmentTable, bio_to_segments, segments_to_bio

__all__ = [
    "GoldSegments",
    "LabelCodec",
    "Layout",
    "Sequences",
    "check_X",
    "check_y",
    "object_array",
]


def object_array(items: Iterable[Any]) -> np.ndarray:
    """1-D object array of `items`, whatever their shapes.

    ``np.array(items, dtype=object)`` turns arrays of equal length into a 2-D array.

    Examples
    --------
    >>> object_array([np.zeros(2), np.zeros(2)]).shape
    (2,)
    """
    items = list(items)
    result = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        result[i] = item
    return result


@dataclass(frozen=True)
class Layout:
    """How the sequences of a batch were nested in the caller's X.

    Parameters
    ----------
    kind : {"single", "groups", "many"}
        2-D X; 2-D X with groups; a list, object array or 3-D array of sequences.
    lengths : int64 ndarray of shape (n_sequences,)
    """

    kind: str
    lengths: np.ndarray

    def restore(self, outputs: list[np.ndarray]) -> np.ndarray:
        """Nest one array of per-position outputs per sequence as the caller's X was nested."""
        if self.kind == "single":
            return outputs[0]
        if self.kind == "groups":
            return np.concatenate(outputs)
        return object_array(outputs)


@dataclass(frozen=True)
class Sequences:
    """Checked input: `values`, a list of (T_i, D) float arrays, and the `layout` it came in.

    Of sparse input the values are CSR matrices.
    """

    values: list[Any]
    layout: Layout

    @property
    def sparse(self) -> bool:
        """Whether the values are sparse."""
        return sp.issparse(self.values[0])

    @property
    def lengths(self) -> np.ndarray:
        """Number of positions of each sequence, int64."""
        return self.layout.lengths


def check_X(
    estimator: Any,
    X: Any,
    groups: Any = None,
    *,
    dtype: Any = np.float32,
    reset: bool = False,
    accept_sparse: bool = False,
) -> Sequences:
    """Validate X and split it into sequences.

    Parameters
    ----------
    estimator : estimator
        Its ``n_features_in_`` and ``feature_names_in_`` are set (`reset`) or compared.
    X : see the class docstring of `SemiCRFSegmenter`
    groups : array-like of shape (n_rows,), optional
        For 2-D X only: one sequence per id; the rows of an id are contiguous.
    dtype : numpy dtype
        What the values are converted to.
    reset : bool
        True in `fit`.
    accept_sparse : bool
        Take sparse X, as CSR.

    Returns
    -------
    Sequences

    Raises
    ------
    ValueError
        For NaN or infinity, an empty sequence, a wrong number of features or dimensions, naming the
        sequence.
    TypeError
        For sparse X that is not accepted.
    """
    sparse_format = "csr" if accept_sparse else False
    if not _holds_sequences(X):
        X = X.detach().cpu().numpy() if isinstance(X, torch.Tensor) else X
        X = validate_data(estimator, X, reset=reset, dtype=dtype, accept_sparse=sparse_format)
        if groups is None:
            return Sequences([X], Layout("single", np.array([X.shape[0]])))
        starts = _group_starts(groups, X.shape[0])
        stops = np.append(starts[1:], X.shape[0])
        values = [X[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return Sequences(values, Layout("groups", np.diff(stops, prepend=0)))
    if groups is not None:
        raise ValueError(
            "`groups` names the sequence of each row of a 2-D `X`; here `X` already holds "
            f"{len(X)} sequences."
        )
    if len(X) == 0:
        raise ValueError("`X` must hold at least 1 sequence; got 0 sequences.")
    values = [_check_sequence(x, i, dtype, sparse_format) for i, x in enumerate(X)]
    _check_num_features(estimator, X, values, reset)
    if accept_sparse:
        values = _all_sparse_or_none(values)
    lengths = np.array([x.shape[0] for x in values], dtype=np.int64)
    return Sequences(values, Layout("many", lengths))


def _holds_sequences(X: Any) -> bool:
    """Whether X holds many sequences, rather than the rows of one."""
    if isinstance(X, (list, tuple)):
        return len(X) == 0 or _ndim(X[0]) == 2
    ndim = getattr(X, "ndim", None)
    if ndim == 3:
        return True
    is_object = isinstance(X, np.ndarray) and X.dtype == object
    return is_object and ndim == 1 and (len(X) == 0 or _ndim(X[0]) == 2)


def _ndim(x: Any) -> int:
    """Dimensions of one element of X; nested lists count by their depth."""
    if hasattr(x, "ndim"):
        return x.ndim
    depth = 0
    while isinstance(x, (list, tuple)):
        depth += 1
        x = x[0] if len(x) else None
    return depth


def _all_sparse_or_none(values: list[Any]) -> list[Any]:
    """Dense sequences among sparse ones as CSR, too."""
    if not any(map(sp.issparse, values)):
        return values
    return [x if sp.issparse(x) else sp.csr_array(x) for x in values]


def _check_sequence(x: Any, index: int, dtype: Any, sparse_format: str | bool) -> Any:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    try:
        return check_array(x, dtype=dtype, input_name="X", accept_sparse=sparse_format)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Sequence {index} of `X`: {error}") from error


def _check_num_features(estimator: Any, X: Any, values: list[np.ndarray], reset: bool) -> None:
    _check_feature_names(estimator, X[0], reset=reset)
    if reset:
        estimator.n_features_in_ = values[0].shape[1]
    origin = "as in sequence 0" if reset else "as in fit"
    expected = estimator.n_features_in_
    for i, x in enumerate(values):
        if x.shape[1] != expected:
            raise ValueError(
                f"Every sequence of `X` must have {expected} features, {origin}; "
                f"got {x.shape[1]} in sequence {i}."
            )


def _group_starts(groups: Any, num_rows: int) -> np.ndarray:
    """First row of each group."""
    groups = column_or_1d(groups)
    if len(groups) != num_rows:
        raise ValueError(
            f"`groups` must have one id per row of `X`: {num_rows}; got {len(groups)}."
        )
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    ids = groups[starts]
    _, first = np.unique(ids, return_index=True)
    if len(first) < len(ids):
        again = np.setdiff1d(np.arange(len(ids)), first)[0]
        raise ValueError(
            f"The rows of a group must be contiguous; id {ids.tolist()[again]!r} of `groups` "
            f"appears again at row {starts[again]}."
        )
    return starts


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
        half-open ``(start, stop, label)`` tuples or as `Segment` objects, whose end is inclusive.
    layout : Layout
    tagging : {None, "bio"}
        "bio": labels per position are BIO tags, read by `flash_semicrf.segments.bio_to_segments`.

    Returns
    -------
    GoldSegments

    Raises
    ------
    ValueError
        For lengths that do not match X, segments that do not tile their sequence, or targets that
        are not class labels.
    """
    if y is None:
        raise ValueError("Fitting and scoring requires y to be passed, but the target y is None.")
    y = y if hasattr(y, "__len__") else np.asarray(y)
    in_segments = _is_segments(y) or (len(y) > 0 and _is_segments(y[0]))
    if layout.kind != "many" and not in_segments:
        y = column_or_1d(_host(y), warn=True)
        check_consistent_length(np.empty(int(layout.lengths.sum())), y)
        return _read_labels(y, layout.lengths, tagging)
    parts = [y] if layout.kind == "single" else list(y)
    if len(parts) != len(layout.lengths):
        raise ValueError(
            f"`y` must have one entry per sequence of `X`: {len(layout.lengths)}; got {len(parts)}."
        )
    if _is_segments(parts[0]):
        return _tiles(parts, layout.lengths)
    parts = [_check_labels(part, i, layout.lengths[i]) for i, part in enumerate(parts)]
    return _read_labels(np.concatenate(parts), layout.lengths, tagging)


def _host(y: Any) -> Any:
    return y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y


def _is_segments(y: Any) -> bool:
    """Whether y is one sequence's list of segments."""
    is_object = isinstance(y, np.ndarray) and y.dtype == object
    if not (isinstance(y, (list, tuple)) or is_object) or len(y) == 0:
        return False
    first = y[0]
    return isinstance(first, Segment) or (
        isinstance(first, tuple) and len(first) == 3 and np.ndim(first[0]) == 0
    )


def _check_labels(labels: Any, index: int, length: int) -> np.ndarray:
    try:
        labels = column_or_1d(_host(labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Sequence {index} of `y`: {error}") from error
    if len(labels) != length:
        raise ValueError(
            f"Sequence {index} has {length} positions in `X` and {len(labels)} labels in `y`; "
            "they must be equal."
        )
    return labels


def _read_labels(labels: np.ndarray, lengths: np.ndarray, tagging: str | None) -> GoldSegments:
    """Segments of labels per position, or of BIO tags."""
    if tagging is None:
        return _runs(labels, lengths)
    if labels.dtype.kind not in "OSU":
        raise ValueError(f'`y` must hold BIO tags with tagging="bio"; got dtype {labels.dtype}.')
    parts = np.split(labels, np.cumsum(lengths)[:-1])
    try:
        return _tiles([bio_to_segments(part.tolist()) for part in parts], lengths)
    except ValueError as error:
        raise ValueError(f'With tagging="bio": {error}') from error


def _runs(labels: np.ndarray, lengths: np.ndarray) -> GoldSegments:
    """Maximal runs of equal labels within each sequence."""
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    offsets = np.cumsum(lengths) - lengths
    opens = np.r_[True, labels[1:] != labels[:-1]]
    opens[offsets] = True
    start = np.flatnonzero(opens)
    stop = np.append(start[1:], len(labels))
    sequence = np.searchsorted(offsets, start, side="right") - 1
    shift = offsets[sequence]
    return GoldSegments(sequence, start - shift, stop - shift, labels[start])


def _tiles(parts: list[Any], lengths: np.ndarray) -> GoldSegments:
    """Segments as the user gave them, which must tile each sequence."""
    rows, labels = [], []
    for i, part in enumerate(parts):
        expected = 0
        for segment in part:
            if isinstance(segment, Segment):
                start, stop, label = segment.start, segment.end + 1, segment.label
            else:
                start, stop, label = segment
            if start != expected or not start < stop <= lengths[i]:
                raise ValueError(
                    f"The segments of sequence {i} of `y` must tile positions 0..{lengths[i] - 1} "
                    f"in order; expected a segment that starts at {expected}, got positions "
                    f"{start}..{stop - 1} with label {label!r}."
                )
            expected = stop
            rows.append((i, start, stop))
            labels.append(label)
        if expected != lengths[i]:
            raise ValueError(
                f"The segments of sequence {i} of `y` must tile its {lengths[i]} positions; "
                f"they end after {expected}."
            )
    sequence, start, stop = np.array(rows, dtype=np.int64).T
    labels = column_or_1d(labels)
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    return GoldSegments(sequence, start, stop, labels)


class LabelCodec:
    """Labels as users name them <-> class indices 0..C-1.

    Parameters
    ----------
    classes : array-like of shape (C,)
        Sorted and distinct.
    """

    def __init__(self, classes: np.ndarray) -> None:
        self.classes = classes

    def encode(self, gold: GoldSegments) -> SegmentTable:
        """Segments with class indices.

        Raises
        ------
        ValueError
            For a label that is not among the classes, naming it and its sequence.
        """
        try:
            index = np.searchsorted(self.classes, gold.labels).clip(max=len(self.classes) - 1)
            unseen = self.classes[index] != gold.labels
        except TypeError:  # labels that do not compare with the classes, as 1 with "a"
            index = np.zeros(len(gold.labels), dtype=np.int64)
            unseen = np.ones(len(gold.labels), dtype=bool)
        if np.any(unseen):
            n = int(np.flatnonzero(unseen)[0])
            raise ValueError(
                f"`y` must hold only the classes {self.classes.tolist()}; got "
                f"{gold.labels[n : n + 1].tolist()[0]!r} in sequence {gold.sequence[n]}."
            )
        columns = (gold.sequence, gold.start, gold.stop, index)
        return SegmentTable(*(torch.from_numpy(np.ascontiguousarray(c, np.int64)) for c in columns))

    def decode(self, index: np.ndarray) -> np.ndarray:
        """Labels of class indices."""
        return self.classes[index]

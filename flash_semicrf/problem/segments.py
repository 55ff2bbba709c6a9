"""Segments and the representations of a segmentation.

A segmentation tiles positions ``0..T-1`` with labelled segments. There are four representations:

- `Segment` objects, for display: ``end`` is **inclusive**;
- a `SegmentTable`, for computation: all segments of a batch in flat half-open tensors;
- labels per position, which cannot represent two adjacent segments of one label;
- BIO tags, which can.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.problem.arguments import check_tensor

__all__ = [
    "LongSegments",
    "Segment",
    "SegmentTable",
    "ViterbiResult",
    "bio_to_segments",
    "labels_to_table",
    "limit_durations",
    "segments_to_bio",
    "segments_to_table",
    "table_to_labels",
    "table_to_segments",
]

LongSegments: TypeAlias = Literal["split", "error"]
"""Treatment of segments that are longer than K."""


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


class ViterbiResult(NamedTuple):
    """Best segmentations of a batch.

    Attributes
    ----------
    scores : Tensor of shape (B,)
        Score of the best segmentation of each sequence.
    segments : list of list of Segment
        Its segments, in order; they tile the sequence.
    """

    scores: Tensor
    segments: list[list[Segment]]


class SegmentTable(NamedTuple):
    """All segments of a batch as flat int64 tensors of shape (N,).

    Attributes
    ----------
    sequence : Tensor
        Index of the sequence each segment belongs to, non-decreasing.
    start, stop : Tensor
        The segment covers positions ``[start, stop)``.
    label : Tensor
        Class indices.
    """

    sequence: Tensor
    start: Tensor
    stop: Tensor
    label: Tensor

    def to(self, device: torch.device | str) -> SegmentTable:
        """Copy of the table on another device."""
        return SegmentTable(*(column.to(device) for column in self))


def labels_to_table(
    labels: Tensor,
    lengths: Tensor,
    max_duration: int | None = None,
    long_segments: LongSegments = "split",
    unlimited: Tensor | None = None,
) -> SegmentTable:
    """Segments of labels per position: maximal runs of equal labels.

    Parameters
    ----------
    labels : integer Tensor of shape (B, T)
        Entries at and after ``lengths`` are ignored.
    lengths : integer Tensor of shape (B,)
    max_duration : int, optional
        Longest duration allowed, in positions.
    long_segments : {"split", "error"}
        Treatment of a run longer than `max_duration`: split it into near-equal pieces of at most
        `max_duration` (with one warning that counts the runs, unless `max_duration` is 1), or
        raise ValueError.
    unlimited : bool Tensor of shape (C,), optional
        Labels whose runs may have any duration: those with a `duration_tail`.

    Returns
    -------
    SegmentTable

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid or, with ``long_segments="error"``, a run is too long; the message
        names the first.

    Examples
    --------
    >>> table = labels_to_table(torch.tensor([[0, 0, 1]]), torch.tensor([3]))
    >>> table.start.tolist(), table.stop.tolist(), table.label.tolist()
    ([0, 2], [2, 3], [0, 1])
    """
    if long_segments not in ("split", "error"):
        raise ValueError(f'`long_segments` must be "split" or "error"; got {long_segments!r}.')
    check_tensor("labels", labels)
    check_tensor("lengths", lengths)
    batch_size, num_positions = labels.shape
    position = torch.arange(num_positions, device=labels.device)
    valid = position < lengths[:, None]
    opens = valid.clone()
    opens[:, 1:] &= (labels[:, 1:] != labels[:, :-1]) | ~valid[:, :-1]
    sequence, start = opens.nonzero(as_tuple=True)
    stop = torch.cat([start[1:], start.new_zeros(1)])
    last = torch.ones_like(start, dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    stop = torch.where(last, lengths.to(start)[sequence], stop)
    table = SegmentTable(sequence, start, stop, labels[sequence, start].long())
    if max_duration is None:
        return table
    return limit_durations(table, max_duration, long_segments, unlimited)


def limit_durations(
    table: SegmentTable,
    max_duration: int,
    long_segments: LongSegments = "split",
    unlimited: Tensor | None = None,
) -> SegmentTable:
    """Split the segments of a table that are longer than `max_duration`, or raise an error.

    Parameters
    ----------
    table : SegmentTable
    max_duration : int
        In positions.
    long_segments : {"split", "error"}
    unlimited : bool Tensor of shape (C,), optional
        As for `labels_to_table`.

    Returns
    -------
    SegmentTable

    Raises
    ------
    ValueError
        With ``long_segments="error"``, if a segment is too long; the message names the first.
    """
    duration = table.stop - table.start
    too_long = duration > max_duration
    if unlimited is not None:
        check_tensor("unlimited", unlimited)
        too_long &= ~unlimited.to(table.label.device)[table.label]
    if not bool(too_long.any()):
        return table
    if long_segments == "error":
        i = int(too_long.nonzero()[0])
        raise ValueError(
            f"A gold segment is longer than `max_duration`={max_duration}: sequence "
            f"{int(table.sequence[i])}, positions {int(table.start[i])}..{int(table.stop[i]) - 1}, "
            f"label {int(table.label[i])}, duration {int(duration[i])}. Raise `max_duration` or "
            'pass long_segments="split".'
        )
    if max_duration > 1:  # with K = 1, a chain, every position is a piece and nothing is lost
        warnings.warn(
            f"{int(too_long.sum())} gold segments are longer than max_duration={max_duration} and "
            "were split into near-equal pieces.",
            UserWarning,
            stacklevel=3,
        )
    pieces = torch.where(too_long, (duration + max_duration - 1) // max_duration, 1)
    source = _repeated_index(pieces)
    first = torch.cumsum(pieces, 0) - pieces
    piece = torch.arange(len(source), device=source.device) - first[source]
    start = table.start[source] + piece * duration[source] // pieces[source]
    stop = table.start[source] + (piece + 1) * duration[source] // pieces[source]
    return SegmentTable(table.sequence[source], start, stop, table.label[source])


def segments_to_table(
    segments: Sequence[Sequence[Segment]], device: torch.device | str = "cpu"
) -> SegmentTable:
    """Table of lists of `Segment` (inclusive ends), one list per sequence.

    Raises
    ------
    TypeError
        If an entry is not a `Segment`, or a start, end or label is not a whole number; the message
        names the segment.
    """
    rows = []
    for b, sequence in enumerate(segments):
        for segment in sequence:
            if not isinstance(segment, Segment):
                raise TypeError(
                    f"`segments` must hold Segment objects; got {type(segment).__name__} in "
                    f"sequence {b}."
                )
            given = (segment.start, segment.end, segment.label)
            start, end, label = map(whole_number, given)
            if start is None or end is None or label is None:
                raise TypeError(
                    "`segments` must have integers as start, end and label; got "
                    f"{segment!r} in sequence {b}."
                )
            rows.append((b, start, end + 1, label))
    columns = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 4)
    return SegmentTable(*columns.unbind(1))


def whole_number(value: Any) -> int | None:
    """Int that equals a bound or an index, or None if there is none.

    Floats without a fraction are accepted; bools and strings are not.

    Examples
    --------
    >>> whole_number(4.0), whole_number(4.9), whole_number(True)
    (4, None, None)
    """
    if type(value) is int:
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # of numpy, or a tensor
        value = value.item()
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and float(value).is_integer():
        return int(math.trunc(value))
    return None


def table_to_segments(
    table: SegmentTable, batch_size: int, scores: Tensor | None = None
) -> list[list[Segment]]:
    """Lists of `Segment`, one per sequence.

    Parameters
    ----------
    table : SegmentTable
    batch_size : int
        Number of sequences B.
    scores : Tensor of shape (N,), optional
        Values of ``Segment.score``.

    Returns
    -------
    list of B lists of Segment
    """
    rows = (table.start.tolist(), (table.stop - 1).tolist(), table.label.tolist())
    values = () if scores is None else (scores.tolist(),)
    segments = list(map(Segment, *rows, *values))
    bounds = [0, *torch.bincount(table.sequence, minlength=batch_size).cumsum(0).tolist()]
    return [segments[first:stop] for first, stop in itertools.pairwise(bounds)]


def table_to_labels(table: SegmentTable, batch_size: int, num_positions: int) -> Tensor:
    """Labels per position of the segments of a table.

    Parameters
    ----------
    table : SegmentTable
    batch_size, num_positions : int
        B and T.

    Returns
    -------
    int64 Tensor of shape (B, T)
        -1 where no segment lies.
    """
    labels = table.label.new_full((batch_size, num_positions), -1)
    sequence, position, source = covered_positions(table)
    labels[sequence, position] = table.label[source]
    return labels


def covered_positions(table: SegmentTable) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence, position and row of the table of every covered position, each of shape (P,)."""
    duration = table.stop - table.start
    source = _repeated_index(duration)
    first = torch.cumsum(duration, 0) - duration
    offset = torch.arange(len(source), device=source.device) - first[source]
    return table.sequence[source], table.start[source] + offset, source


def _repeated_index(repeats: Tensor) -> Tensor:
    """Index i `repeats[i]` >= 1 times, for every i."""
    # torch.repeat_interleave wakes all threads even for ten entries: milliseconds on a busy
    # machine.
    opens = repeats.new_zeros(int(repeats.sum()))
    opens[torch.cumsum(repeats, 0)[:-1]] = 1
    return torch.cumsum(opens, 0)


def bio_to_segments(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Half-open ``(start, stop, label)`` of BIO tags; each run of "O" is one segment labelled "O".

    An "I-x" that continues no x opens a segment, as in the CoNLL scorer.

    Raises
    ------
    ValueError
        If a tag is neither "O" nor "B-..." nor "I-..."; the message names its index.

    Examples
    --------
    >>> bio_to_segments(["B-NP", "I-NP", "B-NP", "O"])
    [(0, 2, 'NP'), (2, 3, 'NP'), (3, 4, 'O')]
    """
    segments: list[tuple[int, int, str]] = []
    for t, tag in enumerate(tags):
        is_text = isinstance(tag, str)
        prefix, _, label = tag.partition("-") if is_text and tag != "O" else ("I", "", "O")
        if not is_text or prefix not in ("B", "I") or not label:
            raise ValueError(
                f'`tags` must be "O", "B-label" or "I-label"; got {tag!r} at index {t}.'
            )
        if prefix == "I" and segments and segments[-1][2] == label:
            segments[-1] = (segments[-1][0], t + 1, label)
        else:
            segments.append((t, t + 1, label))
    return segments


def segments_to_bio(segments: Sequence[tuple[int, int, str]], length: int) -> list[str]:
    """BIO tags of half-open ``(start, stop, label)`` segments; uncovered positions are "O".

    Raises
    ------
    ValueError
        If the bounds of a segment are not whole numbers inside ``0..length``, or segments overlap;
        the message names the index.

    Examples
    --------
    >>> segments_to_bio([(0, 2, "NP"), (2, 3, "O")], 3)
    ['B-NP', 'I-NP', 'O']
    """
    tags = ["O"] * length
    for n, (first, last, label) in enumerate(segments):
        start, stop = whole_number(first), whole_number(last)
        if start is None or stop is None or not 0 <= start < stop <= length:
            raise ValueError(
                f"`segments` must have integer bounds, 0 <= start < stop <= length={length}; got "
                f"{(first, last, label)!r} at index {n}."
            )
        if any(tag != "O" for tag in tags[start:stop]):
            raise ValueError(
                f"`segments` must not overlap; got {(first, last, label)!r} at index {n}."
            )
        if label != "O":
            tags[start] = f"B-{label}"
            tags[start + 1 : stop] = [f"I-{label}"] * (stop - start - 1)
    return tags

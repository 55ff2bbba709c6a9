"""Masks of positions from `Constraints`, which are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import (
    Segment,
    Segments,
    SegmentTable,
    covered_positions,
    segments_to_table,
    whole_number,
)
from flash_semicrf.problem.validation import check_columns, check_labels, check_tensor, refuse

if TYPE_CHECKING:
    from flash_semicrf.problem.constraints import Constraints, Positions, SegmentLists

__all__ = ["masks"]


def masks(
    known: Constraints, potentials: Potentials
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Masks of constraints, checked against their problem.

    Parameters
    ----------
    known : Constraints
    potentials : Potentials

    Returns
    -------
    allowed : bool Tensor of shape (B, T, C) or None
        Labels allowed at each position; None if all are.
    forced : bool Tensor of shape (B, T) or None
        Positions, except 0, at which a segment must start.
    joined : bool Tensor of shape (B, T) or None
        Positions at which no segment may start.

    Raises
    ------
    TypeError, ValueError
        If a constraint is invalid; the message names the argument and the index.
    """
    p = potentials
    inside = torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]
    segments = _table("segments", known.segments, p)
    allowed = _allowed(known, segments, p)
    return allowed, _forced(known, segments, p, inside), _joined(known, segments, p, inside)


def _allowed(known: Constraints, segments: SegmentTable | None, p: Potentials) -> Tensor | None:
    """Mask of allowed labels (B, T, C), or None if all are allowed."""
    spans = _table("forbidden_spans", known.forbidden_spans, p)
    if all(x is None for x in (known.allowed, known.labels, segments, spans)):
        return None
    shape = tuple(p.scores.shape)
    label = torch.arange(p.num_labels, device=p.device)
    allowed = torch.ones(shape, dtype=torch.bool, device=p.device)
    if known.allowed is not None:
        allowed &= _check_mask("allowed", known.allowed, shape, p)
    if known.labels is not None:
        check_labels(known.labels, p.lengths, shape[1], shape[2], known.ignore_index)
        _check_device("labels", known.labels, p)
        given = known.labels[..., None]
        allowed &= (given == label) | (given == known.ignore_index)
    if segments is not None:
        sequence, position, row = covered_positions(segments)
        covered, other = (segments.label[row, None] != label).nonzero(as_tuple=True)
        allowed[sequence[covered], position[covered], other] = False
    if spans is not None:
        sequence, position, row = covered_positions(spans)
        allowed[sequence, position, spans.label[row]] = False
    return allowed


def _forced(
    known: Constraints, segments: SegmentTable | None, p: Potentials, inside: Tensor
) -> Tensor | None:
    """Mask (B, T) of the positions, except 0, at which a segment must start."""
    forced = None
    if known.boundaries is not None:
        forced = _positions("boundaries", known.boundaries, p, 0, p.lengths)
    if segments is not None:
        ends = torch.zeros(p.batch_size, p.num_positions + 1, dtype=torch.bool, device=p.device)
        ends[segments.sequence, segments.start] = True
        ends[segments.sequence, segments.stop] = True
        forced = ends[:, :-1] if forced is None else forced | ends[:, :-1]
    if forced is None:
        return None
    forced = forced & inside  # the end is a boundary anyway
    forced[:, 0] = False
    return forced


def _joined(
    known: Constraints, segments: SegmentTable | None, p: Potentials, inside: Tensor
) -> Tensor | None:
    """Mask (B, T) of the positions at which no segment may start."""
    joined = None
    if known.forbidden_boundaries is not None:
        value = known.forbidden_boundaries
        if isinstance(value, Tensor):
            value = _check_mask("forbidden_boundaries", value, tuple(inside.shape), p) & inside
        joined = _positions("forbidden_boundaries", value, p, 1, p.lengths - 1)
    if segments is not None:
        sequence, position, row = covered_positions(segments)
        later = position != segments.start[row]
        joined = torch.zeros_like(inside) if joined is None else joined
        joined[sequence[later], position[later]] = True
    return joined


def _positions(name: str, value: Positions, p: Potentials, first: int, last: Tensor) -> Tensor:
    """Mask (B, T) of given positions; ValueError unless they are in ``first..last[b]``."""
    if isinstance(value, Tensor):
        _check_mask(name, value, tuple(p.scores.shape[:2]), p)
        sequence, position = value.nonzero(as_tuple=True)
    else:
        _check_lists(name, value, p)
        rows = [(b, *_integers(name, b, [t])) for b, given in enumerate(value) for t in given]
        columns = torch.tensor(rows, dtype=torch.int64, device=p.device).reshape(-1, 2)
        sequence, position = columns.unbind(1)
    outside = (position < first) | (position > last[sequence])
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        b = int(sequence[i])
        raise ValueError(
            f"`{name}` must be in [{first}, {int(last[b])}] in sequence {b}, whose length is "
            f"{int(p.lengths[b])}; got position {int(position[i])}."
        )
    mask = torch.zeros(p.batch_size, p.num_positions + 1, dtype=torch.bool, device=p.device)
    mask[sequence, position] = True
    return mask[:, :-1]


def _table(name: str, value: SegmentLists | None, p: Potentials) -> SegmentTable | None:
    """Table of segments, checked to lie inside their sequences."""
    if value is None:
        return None
    if isinstance(value, SegmentTable):
        table = value
        check_columns(table, p.device, name)
    else:
        _check_lists(name, value, p)
        segments = [
            given if isinstance(given, Segments) else [_segment(name, b, x) for x in given]
            for b, given in enumerate(value)
        ]
        table = segments_to_table(segments, p.device)
    sequence, start, stop, label = table
    outside = (sequence < 0) | (sequence >= p.batch_size)
    length = p.lengths[sequence.masked_fill(outside, 0)]
    problems = {
        f"must have sequences in [0, B-1={p.batch_size - 1}]": outside,
        "must lie inside their sequence": (start < 0) | (stop > length),
        "must cover at least one position": stop <= start,
        f"must have labels in [0, C-1={p.num_labels - 1}]": (label < 0) | (label >= p.num_labels),
    }
    refuse(problems, table, f"`{name}`")
    return table


def _segment(name: str, sequence: int, given: tuple[int, int, int] | Segment) -> Segment:
    if isinstance(given, Segment):
        return given
    if not isinstance(given, Sequence) or len(given) != 3:
        raise ValueError(
            f"`{name}` must hold (start, stop, label) tuples or Segment objects; got {given!r} in "
            f"sequence {sequence}."
        )
    start, stop, label = _integers(name, sequence, given)
    return Segment(start, stop - 1, label)


def _integers(name: str, sequence: int, values: Sequence[object]) -> list[int]:
    found = [n for n in map(whole_number, values) if n is not None]
    if len(found) < len(values):
        raise TypeError(f"`{name}` must hold integers; got {values!r} in sequence {sequence}.")
    return found


def _check_lists(name: str, value: object, p: Potentials) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"`{name}` must hold one list per sequence; got {type(value).__name__}.")
    if len(value) != p.batch_size:
        raise ValueError(
            f"`{name}` must hold one list per sequence, B={p.batch_size}; got {len(value)}."
        )


def _check_mask(name: str, value: Tensor, shape: tuple[int, ...], p: Potentials) -> Tensor:
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"`{name}` must have dtype bool; got {value.dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}; got {tuple(value.shape)}.")
    _check_device(name, value, p)
    return value


def _check_device(name: str, value: Tensor, p: Potentials) -> None:
    if value.device != p.device:
        raise ValueError(
            f"`{name}` must be on the device of `scores`, {p.device}; got {value.device}."
        )

"""Score of labels per position, without waiting for the device.

A table of segments has as many rows as there are segments, which only the device knows. Here every
position has a row, and those at which no segment starts count nothing. All sizes are known, no
value is read, and what is wrong is flagged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    accumulator_dtype,
    initial_term,
    table_rows,
)
from flash_semicrf.problem.segments import LongSegments

__all__ = ["Gold", "score_labels"]


class Gold(NamedTuple):
    """Output of `score_labels`.

    Attributes
    ----------
    score : float64 Tensor of shape (B,)
        Differentiable in every parameter; arbitrary where one of the others is set.
    forbidden : bool Tensor of shape (B,)
        Sequences whose segmentation the model forbids.
    wrong : bool Tensor of shape (B,)
        Sequences with a length outside [1, T], a label outside [0, C) or, with
        ``long_segments="error"``, a run that is too long.
    """

    score: Tensor
    forbidden: Tensor
    wrong: Tensor


class _Rows(NamedTuple):
    """Segments of labels per position, each (B, T); arbitrary where no segment starts."""

    opens: Tensor  # whether a segment starts here
    stop: Tensor  # position after its last
    label: Tensor  # of the position
    previous: Tensor  # label of the position before


def score_labels(
    potentials: Potentials, labels: Tensor, long_segments: LongSegments = "split"
) -> Gold:
    """Score of the segmentation into maximal runs of equal labels, of each sequence.

    Parameters
    ----------
    potentials : Potentials
        Of checked shapes, with static transitions (C, C); lengths may be anything.
    labels : integer Tensor of shape (B, T)
        Entries at and after ``lengths`` are ignored.
    long_segments : {"split", "error"}
        As for `flash_semicrf.problem.segments.labels_to_table`, without the warning.

    Returns
    -------
    Gold

    Examples
    --------
    A segment of one position with label 0, and one of two positions with label 1.

    >>> zeros = torch.zeros(1, 3, 2)
    >>> problem = Potentials(zeros, -torch.eye(2), torch.eye(2), torch.tensor([3]))
    >>> problem = problem.replace(initial_scores=zeros[0, 0])
    >>> score_labels(problem, torch.tensor([[0, 1, 1]])).score
    tensor([2.], dtype=torch.float64)
    """
    p = potentials
    T, C = p.num_positions, p.num_labels
    lengths = p.lengths.clamp(1, T)
    position = torch.arange(T, device=p.device)
    inside = position < lengths[:, None]
    known = (labels >= 0) & (labels < C)
    label = torch.where(inside & known, labels, 0).long()
    wrong = (lengths != p.lengths) | (inside & ~known).any(1)
    rows, too_long = _rows(p, label, lengths, inside)
    if long_segments == "error":
        wrong = wrong | too_long.any(1)

    total = _picked(p.scores.flatten(1), position * C + label, inside)
    row = table_rows(p, rows.stop - position)
    total = total + _shared(p.duration_bias, row * C + label, rows.opens)
    if p.duration_tail is not None:
        beyond = rows.stop - position - p.max_duration
        longer = rows.opens & (beyond > 0)
        total = total + _shared(p.duration_tail, label, longer) * beyond.clamp(min=0)
    if p.start_scores is not None:
        total = total + _picked(p.start_scores.flatten(1), position * C + label, rows.opens)
    if p.end_scores is not None:
        last = (rows.stop - 1).clamp(0, T - 1)
        total = total + _picked(p.end_scores.flatten(1), last * C + label, rows.opens)
    first = initial_term(p.transition) if p.initial_scores is None else p.initial_scores
    total = total + _shared(first, label, rows.opens & (position == 0))
    pair = rows.previous * C + label
    total = total + _shared(p.transition, pair, rows.opens & (position > 0))
    if p.final_scores is not None:
        total = total + _shared(p.final_scores, label, rows.opens & (rows.stop == lengths[:, None]))

    # A forbidden term moves when others are added to it; nothing else comes near it.
    return Gold(total.sum(1), (total.detach() <= 0.5 * NEG_INF).any(1), wrong)


def _rows(p: Potentials, label: Tensor, lengths: Tensor, inside: Tensor) -> tuple[_Rows, Tensor]:
    """Segments, and the positions of runs that are longer than the model allows, (B, T)."""
    position = torch.arange(p.num_positions, device=p.device)
    previous = label.roll(1, 1)
    opens = inside & ((position == 0) | (label != previous))
    start = torch.where(opens, position, 0).cummax(1).values
    duration = _next(opens, lengths) - start  # of the run
    too_long = inside & (duration > p.max_duration)
    if p.unlimited is not None:
        too_long = too_long & ~p.unlimited[label]
    # Near-equal pieces: the j-th starts at position j * duration // pieces of its run.
    pieces = torch.where(too_long, (duration + p.max_duration - 1) // p.max_duration, 1)
    duration = duration.clamp(min=1)
    offset = position - start
    piece = (offset * pieces + duration - 1) // duration
    opens = inside & (piece < pieces) & (piece * duration // pieces == offset)
    return _Rows(opens, _next(opens, lengths), label, previous), too_long


def _next(opens: Tensor, lengths: Tensor) -> Tensor:
    """Position after each one at which a segment starts, or else the length; (B, T)."""
    position = torch.arange(opens.shape[1], device=opens.device)
    end = lengths[:, None]
    starts = torch.cat([torch.where(opens, position, end)[:, 1:], end], 1)
    return starts.flip(1).cummin(1).values.flip(1)


def _shared(values: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """Entries of a flattened parameter that all sequences share, as `_picked`."""
    each = values.to(accumulator_dtype(values.device)).flatten()
    return _picked(each.expand(len(index), -1), index, used)


def _picked(values: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """Entries (B, T) in float64 of values (B, N) where a mask is set, else 0."""
    size = values.shape[1]
    # What is not used is taken from everywhere: its gradients of 0 are not all added up in one.
    spread = torch.arange(index.shape[1], device=index.device) % size
    found = values.gather(1, torch.where(used, index, spread))
    return torch.where(used, found.to(accumulator_dtype(values.device)), 0.0)

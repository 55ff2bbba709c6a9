"""Score of labels per position, without waiting for the device.

A table of segments has as many rows as there are segments, which only the device knows. Here every
position has a row, and those at which no segment starts count nothing. All sizes are known, no
value is read, and what is wrong is flagged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.dense import score_dense
from flash_semicrf.problem.potentials import Potentials
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
    lengths = p.lengths.clamp(1, p.num_positions)
    inside = torch.arange(p.num_positions, device=p.device) < lengths[:, None]
    known = (labels >= 0) & (labels < p.num_labels)
    label = torch.where(inside & known, labels, 0).long()
    wrong = (lengths != p.lengths) | (inside & ~known).any(1)
    durations, too_long = _durations(p, label, lengths, inside)
    if long_segments == "error":
        wrong = wrong | too_long.any(1)
    score = score_dense(p, torch.where(inside, label, -1), durations)
    return Gold(score, score.detach() == -torch.inf, wrong)


def _durations(
    p: Potentials, label: Tensor, lengths: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Durations of the segments, 0 where none starts, and which positions are in runs that are
    longer than the model allows; both (B, T)."""
    position = torch.arange(p.num_positions, device=p.device)
    opens = inside & ((position == 0) | (label != label.roll(1, 1)))
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
    return torch.where(opens, _next(opens, lengths) - position, 0), too_long


def _next(opens: Tensor, lengths: Tensor) -> Tensor:
    """Position after each one at which a segment starts, or else the length; (B, T)."""
    position = torch.arange(opens.shape[1], device=opens.device)
    end = lengths[:, None]
    starts = torch.cat([torch.where(opens, position, end)[:, 1:], end], 1)
    return starts.flip(1).cummin(1).values.flip(1)

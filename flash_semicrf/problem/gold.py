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
    position = torch.arange(p.num_positions, device=p.device)
    inside = position < lengths[:, None]
    known = labels.clamp(0, p.num_labels - 1)
    wrong = (lengths != p.lengths) | (inside & (known != labels)).any(1)
    label = known.long().masked_fill(~inside, -1)
    durations, pieces = _durations(p, label, position)
    if long_segments == "error":
        wrong = wrong | (inside & (pieces > 1)).any(1)
    score = score_dense(p, label, durations * inside)
    return Gold(score, score.detach() == -torch.inf, wrong)


def _durations(p: Potentials, label: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Durations of the segments, 0 where none starts, and the number of segments that the run of
    each position is split into; both (B, T).

    Padding is a run of its own. Few operations: on a GPU each takes as long as all arithmetic here.
    """
    opens = label != label.roll(1, 1)
    opens[:, :1].fill_(True)
    run = opens.cumsum(1) - 1
    # Numbers of positions: exact in whatever order they are counted.
    size = torch.zeros_like(run).scatter_add(1, run, torch.ones_like(run)).gather(1, run)
    pieces = (size + (p.max_duration - 1)) // p.max_duration
    if p.unlimited is not None:
        pieces = torch.where(p.unlimited[label], 1, pieces)
    offset = position - (position * opens).cummax(1).values
    # Near-equal pieces: the j-th starts at j * size // pieces.
    piece = (offset * pieces + (size - 1)) // size
    own = piece * size
    duration = (own + size) // pieces - offset
    return duration * (own // pieces == offset), pieces

"""The likelihood of a piece of a sequence whose ends are not the sequence's.

A crop is asked for as positions ``[u, v)``. The gold segment that holds u starts at s <= u, the one
that holds v-1 stops at t >= v; the crop is ``[s, t)``. Its loss is minus the log of

    P(the gold segments of [s, t) | x, what lies outside [s, t), and that the segment which holds u
      starts at s, the one which holds v-1 stops at t, and their labels)

where u is not the sequence's first position and v not its end; what the ends are is not scored, and
the segment that was cut is not taken for a shorter one. By the Markov property this needs scores of
the crop only: given the labels at its ends, transitions from and to the outside, and the scores of
first and last labels, are constants. With u and v drawn independently of the labels each term is a
conditional likelihood of the whole model, so their sum is a composite likelihood: its gradient has
mean 0 at the true parameters. Cost: that of an ordinary loss.

References
----------
C. Varin, N. Reid and D. Firth, An overview of composite likelihood methods, Statistica Sinica 21,
2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import SegmentTable

__all__ = ["crop_loss", "known_ends"]


def known_ends(
    table: SegmentTable, lengths: Tensor, held_start: Tensor, held_end: Tensor, num_labels: int
) -> Constraints:
    """Constraints that the likelihood of a crop is conditioned on.

    Parameters
    ----------
    table : SegmentTable
        Gold segments of the crops, which tile them.
    lengths : int64 Tensor of shape (B,)
    held_start, held_end : int64 Tensor of shape (B,)
        How many first, and last, positions are known to lie in one segment, whose label is known
        too; 0 where the crop starts, or ends, with its sequence.
    num_labels : int

    Returns
    -------
    Constraints
    """
    position = torch.arange(int(lengths.max()), device=lengths.device)
    joined = (position >= 1) & (position < held_start[:, None])
    last = (lengths - 1)[:, None]
    joined |= (position > last - held_end[:, None] + 1) & (position <= last)
    allowed = torch.ones(*joined.shape, num_labels, dtype=torch.bool, device=lengths.device)
    row = torch.arange(len(lengths), device=lengths.device)
    for held, where, end in (
        (held_start, table.start == 0, torch.zeros_like(lengths)),
        (held_end, table.stop == lengths[table.sequence], lengths - 1),
    ):
        only = torch.nn.functional.one_hot(table.label[where], num_labels).bool()
        allowed[row, end] &= only | (held == 0)[:, None]
    return Constraints(allowed=allowed, forbidden_boundaries=joined)


def crop_loss(problem: Potentials, table: SegmentTable, crop: Tensor) -> Tensor:
    """Minus the log of the conditional likelihood of each crop, in nats.

    Parameters
    ----------
    problem : Potentials
        Of the crops' own positions.
    table : SegmentTable
        Gold segments, which tile each crop and which the problem allows.
    crop : int64 Tensor of shape (B, 4)
        Last two columns: `held_start` and `held_end` of `known_ends`.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable.
    """
    known = known_ends(table, problem.lengths, crop[:, 2], crop[:, 3], problem.num_labels)
    return log_partition(problem, constraints=known) - score_segments(problem, table)

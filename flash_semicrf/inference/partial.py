"""Partial supervision: the log-sum of the scores of all segmentations that agree with known facts.

    loss = log Z - log Z(segmentations that agree) = -log P(a segmentation that agrees)

This is the ordinary loss if only one segmentation agrees, and 0 if nothing is known. Cost: a second
log Z with its gradient.

References
----------
Y. Tsuboi, H. Kashima, S. Mori, H. Oda and Y. Matsumoto, Training Conditional Random Fields Using
Incomplete Annotations, COLING 2008.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import LongSegments, labels_to_table
from flash_semicrf.problem.validation import check_gold, check_labels

__all__ = ["partial_score"]


def partial_score(
    potentials: Potentials,
    labels: Tensor | Constraints,
    ignore_index: int | None = None,
    long_segments: LongSegments = "split",
    backend: str = "auto",
) -> Tensor:
    """Log of the sum of exp(score) over the segmentations that agree with `labels`.

    Parameters
    ----------
    potentials : Potentials
    labels : integer Tensor of shape (B, T) or Constraints
        Labels per position, interpreted as by `Constraints.from_labels`. A sequence without
        `ignore_index` is scored as a gold segmentation into its maximal runs.
    ignore_index : int, optional
        Value that denotes an unknown label.
    long_segments : {"split", "error"}
        As for `labels_to_table` and `Constraints.from_labels`.
    backend : str
        As for `flash_semicrf.log_partition`.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or no segmentation that the model allows agrees; the message
        names the sequences.

    Examples
    --------
    Two positions: three of the six segmentations into two labels have label 1 at the second.

    >>> zeros = torch.zeros(2, 2)
    >>> problem = Potentials(zeros[None], zeros, zeros, torch.tensor([2]), initial_scores=zeros[0])
    >>> score = partial_score(problem, torch.tensor([[-100, 1]]), ignore_index=-100)
    >>> round(score.exp().item(), 9)
    3.0
    """
    p = potentials
    if isinstance(labels, Constraints):
        score = log_partition(p, backend, constraints=labels)
        _check_agreeing(score)
        return score
    check_labels(labels, p.lengths, p.num_positions, p.num_labels, ignore_index)
    if labels.device != p.device:
        raise ValueError(
            f"`labels` must be on the device of `hidden_states`, {p.device}; got {labels.device}."
        )
    inside = torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]
    partial = ((labels == ignore_index) & inside).any(1)
    lengths = p.lengths.masked_fill(partial, 0)  # of the sequences that have a gold segmentation
    table = labels_to_table(labels, lengths, p.max_duration, long_segments, p.unlimited)
    gold = score_segments(p, table)
    check_gold(gold, p, table)
    if ignore_index is None or not bool(partial.any()):
        return gold
    # One position of each other sequence suffices: its result is not used.
    rest = p.replace(lengths=p.lengths.masked_fill(~partial, 1))
    known = Constraints.from_labels(
        labels, rest.lengths, p.max_duration, long_segments, ignore_index, p.unlimited
    )
    score = torch.where(partial, log_partition(rest, backend, constraints=known), gold)
    _check_agreeing(score)
    return score


def _check_agreeing(score: Tensor) -> None:
    empty = (score.detach() == -torch.inf).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            "`labels` must agree with a segmentation that the model allows; none does in sequences "
            f"{empty} (check transition constraints, durations and scores of -inf)."
        )

"""Segmentations as tensors whose shapes do not depend on the number of segments.

A pair of int64 tensors of shape (B, T): ``labels``, the label of every position, -1 after the end
of its sequence; and ``durations``, at the first position of every segment its number of positions,
0 elsewhere. Compiled and exported models use them, since a `SegmentTable` has as many rows as there
are segments.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    accumulator_dtype,
    first_term,
    table_rows,
)
from flash_semicrf.problem.segments import SegmentTable, table_to_labels

__all__ = ["dense_to_table", "score_dense", "table_to_dense"]


def table_to_dense(
    table: SegmentTable, batch_size: int, num_positions: int
) -> tuple[Tensor, Tensor]:
    """Labels and durations per position of the segments of a table.

    Parameters
    ----------
    table : SegmentTable
    batch_size, num_positions : int
        B and T.

    Returns
    -------
    labels, durations : int64 Tensor of shape (B, T)

    Examples
    --------
    >>> column = torch.tensor
    >>> table = SegmentTable(column([0, 0]), column([0, 2]), column([2, 3]), column([1, 1]))
    >>> table_to_dense(table, 1, 4)
    (tensor([[ 1,  1,  1, -1]]), tensor([[2, 0, 1, 0]]))
    """
    durations = table.label.new_zeros((batch_size, num_positions))
    durations[table.sequence, table.start] = table.stop - table.start
    return table_to_labels(table, batch_size, num_positions), durations


def dense_to_table(labels: Tensor, durations: Tensor) -> SegmentTable:
    """Inverse of `table_to_dense`."""
    sequence, start = durations.nonzero(as_tuple=True)
    stop = start + durations[sequence, start]
    return SegmentTable(sequence, start, stop, labels[sequence, start])


def score_dense(potentials: Potentials, labels: Tensor, durations: Tensor) -> Tensor:
    """`flash_semicrf.problem.potentials.score_segments` for labels and durations per position.

    Every operation has a static shape and reads no value on the host.

    Parameters
    ----------
    potentials : Potentials
    labels, durations : int64 Tensor of shape (B, T)

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter; -inf for a segmentation that is forbidden.
    """
    p = potentials
    opens, covered, label = durations > 0, labels >= 0, labels.clamp(min=0)
    ends = torch.nn.functional.pad(~covered[:, 1:], (0, 1), value=True)  # of the sequence
    closes = covered & (ends | torch.nn.functional.pad(opens[:, 1:], (0, 1)))
    total = _shared(p, opens, durations, label) + _picked(p.scores, label, covered)
    if p.start_scores is not None:
        total = total + _picked(p.start_scores, label, opens)
    if p.end_scores is not None:
        total = total + _picked(p.end_scores, label, closes)
    if p.segment_scores is not None:
        row = table_rows(p, durations).clamp(min=0)
        spans = p.segment_scores.gather(2, row[..., None, None].expand(*row.shape, 1, p.num_labels))
        total = total + _picked(spans[:, :, 0], label, opens)
    if p.transition_scores is not None:
        source = label.roll(1, 1)[..., None, None].expand(*label.shape, 1, p.num_labels)
        later = opens & (torch.arange(opens.shape[1], device=opens.device) > 0)
        total = total + _picked(p.transition_scores.gather(2, source)[:, :, 0], label, later)
    if p.final_scores is not None:
        last = torch.where(covered & ends, label, 0).sum(1)
        total = total + p.final_scores.to(total.dtype)[last]
    return total.masked_fill(total <= 0.5 * NEG_INF, -torch.inf)


def _picked(values: Tensor, label: Tensor, used: Tensor) -> Tensor:
    """Sum of the scores (B, T, C) of the labels of some positions, (B,)."""
    found = values.gather(2, label[..., None])[..., 0].to(accumulator_dtype(values.device))
    return torch.where(used, found, 0.0).sum(1)


def _shared(p: Potentials, opens: Tensor, durations: Tensor, label: Tensor) -> Tensor:
    """Sum of the scores of durations and transitions, (B,).

    Each parameter times how often it occurs: the number of a sequence's segments with a certain
    duration and label, or pair of labels, is exact in whatever order it is counted, and is the
    gradient.
    """
    C, is_first = p.num_labels, torch.arange(opens.shape[1], device=opens.device) == 0
    row = table_rows(p, durations).clamp(min=0)
    pair = label.roll(1, 1) * C + label
    first = first_term(p)
    # Parameters, which of their entries a position counts, and how often.
    terms = [
        (p.duration_bias, row * C + label, opens),
        (p.transition, pair if p.transition.dim() == 2 else row * C * C + pair, opens & ~is_first),
        (first, label if first.dim() == 1 else row * C + label, opens & is_first),
    ]
    if p.duration_tail is not None:
        terms.append((p.duration_tail, label, (durations - p.max_duration).clamp(min=0)))
    wide = accumulator_dtype(p.device)
    values = torch.cat([value.flatten().to(wide) for value, _, _ in terms])
    begin = itertools.accumulate((value.numel() for value, _, _ in terms), initial=0)
    index = torch.cat([own + first for (_, own, _), first in zip(terms, begin, strict=False)], 1)
    times = torch.cat([number.to(wide) for _, _, number in terms], 1)
    counts = values.new_zeros((len(index), len(values))).scatter_add(1, index, times)
    # 0 times -inf, which is no part of the sum, would be NaN.
    return (torch.where(counts > 0, values, 0.0) * counts).sum(1)

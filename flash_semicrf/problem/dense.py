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
    opens, label = durations > 0, labels.clamp(min=0)
    total = _shared(p, opens, durations, label) + _picked(p.scores, label, labels < 0)
    if p.start_scores is not None:
        total = total + _picked(p.start_scores, label, durations <= 0)
    if p.end_scores is not None or p.final_scores is not None:
        covered = labels >= 0
        ends = torch.nn.functional.pad(~covered[:, 1:], (0, 1), value=True)  # of the sequence
    if p.end_scores is not None:
        closes = covered & (ends | torch.nn.functional.pad(opens[:, 1:], (0, 1)))
        total = total + _picked(p.end_scores, label, ~closes)
    if p.final_scores is not None:
        last = torch.where(covered & ends, label, 0).sum(1)
        total = total + p.final_scores.to(total.dtype)[last]
    return total.masked_fill(total <= 0.5 * NEG_INF, -torch.inf)


def _picked(values: Tensor, label: Tensor, unused: Tensor) -> Tensor:
    """Sum of the scores (B, T, C) of the labels of all but the unused positions, (B,)."""
    found = values.gather(2, label[..., None])[..., 0].to(accumulator_dtype(values.device))
    return found.masked_fill(unused, 0.0).sum(1)


def _shared(p: Potentials, opens: Tensor, durations: Tensor, label: Tensor) -> Tensor:
    """Sum of the scores of durations and transitions, (B,).

    Each parameter times how often it occurs: the number of a sequence's segments with a certain
    duration and label, or pair of labels, is exact in whatever order it is counted, and is the
    gradient.
    """
    C, row = p.num_labels, durations.clamp(1, p.max_duration) - 1
    by_row = row * C + label
    pair = label[:, :-1] * C + label[:, 1:]
    if p.transition.dim() == 3:
        pair = row[:, 1:] * (C * C) + pair
    first = first_term(p)
    # Parameters, which of their entries a position counts, and how often.
    terms = [
        (p.duration_bias, by_row, opens),
        (p.transition, pair, opens[:, 1:]),
        (first, (label if first.dim() == 1 else by_row)[:, :1], opens[:, :1]),
    ]
    if p.duration_tail is not None:
        terms.append((p.duration_tail, label, (durations - p.max_duration).clamp(min=0)))
    wide = accumulator_dtype(p.device)
    values = torch.cat([value.flatten() for value, _, _ in terms]).to(wide)
    begin = itertools.accumulate((value.numel() for value, _, _ in terms), initial=0)
    index = [
        own + start if start else own for (_, own, _), start in zip(terms, begin, strict=False)
    ]
    times = torch.cat([number for _, _, number in terms], 1).to(wide)
    counts = values.new_zeros((len(times), len(values))).scatter_add(1, torch.cat(index, 1), times)
    # 0 times -inf, which is no part of the sum, would be NaN.
    return (values.masked_fill(counts == 0, 0.0) * counts).sum(1)

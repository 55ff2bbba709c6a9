"""Segmentations as tensors whose shapes do not depend on the number of segments.

A pair of int64 tensors of shape (B, T): ``labels``, the label of every position, -1 after the end
of its sequence; and ``durations``, at the first position of every segment its number of positions,
0 elsewhere. Compiled and exported models use them, since a `SegmentTable` has as many rows as there
are segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials, accumulator_dtype, border_rows
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
    batch_size, num_positions = labels.shape
    opens, covered, label = durations > 0, labels >= 0, labels.clamp(min=0)
    position = torch.arange(num_positions, device=p.device).expand(batch_size, num_positions)
    sequence = torch.arange(batch_size, device=p.device)[:, None].expand_as(position)
    # One row per position: the label before a segment is that of the row before its first one.
    stop = position + durations.clamp(min=1)
    columns = (column.reshape(-1) for column in (sequence, position, stop, label))
    rows = border_rows(p, SegmentTable(*columns)).view_as(labels)
    content = p.scores.gather(2, label[..., None])[..., 0].to(accumulator_dtype(p.device))
    total = torch.where(opens, rows, 0.0).sum(1) + torch.where(covered, content, 0.0).sum(1)
    return total.masked_fill(total <= 0.5 * NEG_INF, -torch.inf)

"""Labels whose segments all have duration 1: `single_position_labels`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import SegmentTable, covered_positions

__all__ = ["forbid_longer", "single_classes", "split_singles"]


def single_classes(given: Any, classes: np.ndarray) -> np.ndarray:
    """Indices of the classes that ``single_position_labels`` names.

    Parameters
    ----------
    given : None, label or iterable of labels
    classes : ndarray of shape (C,)

    Raises
    ------
    ValueError
        For a label that is not among the classes.

    Examples
    --------
    >>> single_classes("O", np.array(["LOC", "O", "PER"])).tolist()
    [1]
    """
    if given is None:
        return np.zeros(0, dtype=np.int64)
    one = isinstance(given, str) or not isinstance(given, Iterable)
    labels, names = [given] if one else list(given), classes.tolist()
    for label in labels:
        if label not in names:
            raise ValueError(
                f"`single_position_labels` must be among the classes {names}; got {label!r}."
            )
    return np.flatnonzero(np.isin(classes, labels))


def split_singles(table: SegmentTable, classes: np.ndarray) -> SegmentTable:
    """Cut the segments of some classes into segments of one position.

    Parameters
    ----------
    table : SegmentTable
    classes : integer array
        Indices of the classes.

    Examples
    --------
    >>> table = SegmentTable(*torch.tensor([[0, 0], [0, 2], [2, 4], [1, 0]]))
    >>> split_singles(table, np.array([0])).start.tolist()
    [0, 2, 3]
    """
    if not len(classes):
        return table
    single = torch.isin(table.label, torch.as_tensor(classes))
    _, position, row = covered_positions(table)
    opens = single[row] | (position == table.start[row])
    start, row = position[opens], row[opens]
    stop = torch.where(single[row], start + 1, table.stop[row])
    return SegmentTable(table.sequence[row], start, stop, table.label[row])


def forbid_longer(head: SemiMarkovCRFHead, classes: np.ndarray) -> None:
    """Forbid durations above 1 of some classes in a head.

    Raises
    ------
    ValueError
        If a minimum duration above 1 leaves such a class none.
    """
    if not len(classes):
        return
    allowed = head.allowed_durations
    if allowed is None:
        allowed = torch.ones(head.max_duration, head.num_classes, dtype=torch.bool)
    index = torch.as_tensor(classes)
    if not bool(allowed[0, index].all()):
        raise ValueError("`min_duration` must be 1 for the labels of `single_position_labels`.")
    allowed[1:, index] = False
    head.allowed_durations = allowed

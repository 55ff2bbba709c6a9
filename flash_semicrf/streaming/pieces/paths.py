"""Best segmentations of pieces, joined where they meet."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.pieces.rows import Pieces

__all__ = ["joined"]


def joined(table: SegmentTable, pieces: Pieces) -> tuple[SegmentTable, Tensor]:
    """Segments of whole sequences, from those of the rows of their pieces.

    A piece's path is followed from its right end down to the start of the segment that spans the
    piece's first position. The path of the piece before it goes on from there if it has a boundary
    at the same place, after the same label; walks to the left depend on nothing else.

    Parameters
    ----------
    table : SegmentTable
        `sequence` and positions are those of the rows.
    pieces : Pieces

    Returns
    -------
    table : SegmentTable
        Right for the sequences all of whose pieces met.
    met : bool Tensor of shape (N,)
        Whether a piece met the one before it; True for the first one of a sequence.
    """
    row, start, stop, label = table
    start, stop = start + pieces.first[row], stop + pieces.first[row]
    number = len(pieces.begin)
    none = torch.full((number,), -1, dtype=torch.int64, device=row.device)

    def largest(values: Tensor, where: Tensor) -> Tensor:
        """Largest of some values in each row, or -1."""
        return none.scatter_reduce(0, row, torch.where(where, values, -1), "amax")

    meeting = largest(start, start <= pieces.begin[row])
    meeting_next = torch.roll(meeting, -1)
    own = largest(label, stop == meeting[row])
    others = largest(label, stop == meeting_next[row])
    met = (own >= 0) & (own == torch.roll(others, 1))
    is_last = ~torch.roll(pieces.follows, -1)
    kept = (start >= meeting[row]) | ~pieces.follows[row]
    kept &= (stop <= meeting_next[row]) | is_last[row]
    columns = (pieces.sequence[row], start, stop, label)
    return SegmentTable(*(column[kept] for column in columns)), met | ~pieces.follows

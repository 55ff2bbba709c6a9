"""Pieces of sequences as the rows of a problem, and their results put together again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_POSITION, Potentials
from flash_semicrf.streaming.pieces.plan import Cut

__all__ = [
    "Pieces",
    "by_boundary",
    "by_position",
    "by_sequence",
    "collected",
    "failed_of",
    "last_rows",
    "part_of",
    "pieces_of",
    "problem_of",
    "rows_of_positions",
    "running",
]


class Pieces(NamedTuple):
    """Pieces of a batch, in order; int64 Tensors of shape (N,) unless stated.

    Attributes
    ----------
    sequence : Tensor
    begin, stop : Tensor
        Positions of the piece, half-open, in its sequence.
    first, last : Tensor
        Positions of its row, which take in the warm-up.
    pieces_of_each : int64 Tensor of shape (B,)
        Their number.
    length : int
        Positions of a piece; the last one of a sequence may have fewer.
    width : int
        Positions of the longest row.
    """

    sequence: Tensor
    begin: Tensor
    stop: Tensor
    first: Tensor
    last: Tensor
    pieces_of_each: Tensor
    length: int
    width: int

    @property
    def core(self) -> Tensor:
        """Bounds of the pieces in their rows, (N, 2)."""
        return torch.stack([self.begin - self.first, self.stop - self.first], 1)

    @property
    def follows(self) -> Tensor:
        """Whether a piece follows another of its sequence, bool (N,)."""
        return self.begin > 0


def pieces_of(lengths: Tensor, cut: Cut, both: bool) -> Pieces | None:
    """Cut sequences; those that are not longer than a piece with its warm-up stay whole.

    None where all of them are.

    Parameters
    ----------
    lengths : int64 Tensor of shape (B,)
    cut : Cut
    both : bool
        Whether rows go on after their piece, or end there.
    """
    given = lengths.tolist()  # waits for the device, as whoever compares the pieces has to
    rows = []
    count = []
    for b, n in enumerate(given):
        number = -(-n // cut.length) if n > cut.length + 2 * cut.warm else 1
        count.append(number)
        for j in range(number):
            begin, stop = j * cut.length, n if j == number - 1 else (j + 1) * cut.length
            ends = stop + cut.warm if both else stop
            rows.append((b, begin, stop, max(0, begin - cut.warm), min(n, ends)))
    if len(rows) == len(given):
        return None
    width = max(last - first for *_, first, last in rows)
    columns = torch.tensor(rows, dtype=torch.int64).T.to(lengths.device)
    sequence, begin, stop, first, last = columns
    counts = torch.tensor(count, dtype=torch.int64).to(lengths.device)
    return Pieces(sequence, begin, stop, first, last, counts, cut.length, width)


def problem_of(p: Potentials, pieces: Pieces) -> Potentials:
    """The problem whose sequences are the rows.

    Where a row begins or ends inside its sequence, a segment does.
    """
    given = {name: value for name, value in p.parameters().items() if name in BY_POSITION}
    lengths = pieces.last - pieces.first
    rows: dict[str, Tensor | None]
    if p.device.type == "cpu":
        rows = {name: _rows_of(value.detach(), pieces) for name, value in given.items()}
        return p.replace(lengths=lengths, **rows)
    position = pieces.first[:, None] + torch.arange(pieces.width, device=p.device)
    position = position.clamp(max=p.num_positions - 1)
    sequence = pieces.sequence[:, None]
    rows = {name: value[sequence, position] for name, value in given.items()}
    return p.replace(lengths=lengths, **rows)


def _rows_of(values: Tensor, pieces: Pieces) -> Tensor:
    """Rows (N, width, C) of values (B, T, C) in main memory, slice by slice; zeros as padding."""
    rows = values.new_empty(len(pieces.first), pieces.width, values.shape[2])
    places = zip(*(x.tolist() for x in (pieces.sequence, pieces.first, pieces.last)), strict=True)
    for row, (sequence, first, last) in zip(rows, places, strict=True):
        row[: last - first] = values[sequence, first:last]
        row[last - first :] = 0.0
    return rows


def part_of(p: Potentials, sequences: Tensor) -> Potentials:
    """The problem of some of the sequences."""
    given = p.parameters()
    chosen: dict[str, Tensor | None] = {n: given[n][sequences] for n in BY_POSITION if n in given}
    return p.replace(lengths=p.lengths[sequences], **chosen)


def by_position(rows: Tensor, pieces: Pieces, lengths: Tensor, num_positions: int) -> Tensor:
    """Entries (N, width, C) of the pieces put together: (B, T, C), zeros as padding."""
    if rows.device.type == "cpu":
        whole = rows.new_zeros(len(lengths), num_positions, rows.shape[2])
        columns = (pieces.sequence, pieces.begin, pieces.stop, pieces.first)
        places = zip(*(x.tolist() for x in columns), strict=True)
        for row, (sequence, begin, stop, first) in zip(rows, places, strict=True):
            whole[sequence, begin:stop] = row[begin - first : stop - first]
        return whole
    t = torch.arange(num_positions, device=rows.device)
    inside = t < lengths[:, None]
    return torch.where(inside[..., None], rows_of_positions(rows, pieces, num_positions), 0.0)


def collected(
    found: dict[str, Tensor], wanted: set[str], pieces: Pieces, p: Potentials
) -> dict[str, Tensor]:
    """Gradients of whole sequences, from those of the pieces, which are taken out of `found`."""
    whole = {}
    for name in wanted:
        value = found.pop(name)
        if name in BY_POSITION:
            whole[name] = by_position(value, pieces, p.lengths, p.num_positions)
        elif name == "initial_scores":
            whole[name] = value[pieces.pieces_of_each.cumsum(0) - pieces.pieces_of_each]
        elif name == "final_scores":
            whole[name] = last_rows(value, pieces)
        else:
            whole[name] = by_sequence(value, pieces)
    return whole


def rows_of_positions(rows: Tensor, pieces: Pieces, num_positions: int) -> Tensor:
    """Entries (N, width, C) of the pieces put together: (B, T, C), arbitrary as padding."""
    t = torch.arange(num_positions, device=rows.device)
    return _together(rows, pieces, t, t)


def by_boundary(rows: Tensor, pieces: Pieces, num_positions: int) -> Tensor:
    """Entries (N, width + 1, C) of boundaries put together: (B, T + 1, C), arbitrary as padding.

    Boundaries are those of the positions before them; boundary 0 is the first piece's.
    """
    t = torch.arange(num_positions + 1, device=rows.device)
    return _together(rows, pieces, t, (t - 1).clamp(min=0))


def _together(rows: Tensor, pieces: Pieces, t: Tensor, position: Tensor) -> Tensor:
    """Entries t of the pieces that hold some positions, of the last piece where none does."""
    first_row = pieces.pieces_of_each.cumsum(0) - pieces.pieces_of_each
    piece = torch.minimum(position // pieces.length, pieces.pieces_of_each[:, None] - 1)
    row = first_row[:, None] + piece
    column = (t - pieces.first[row]).clamp(max=rows.shape[1] - 1)
    place = (row * rows.shape[1] + column).flatten()
    return rows.flatten(0, 1).index_select(0, place).view(*row.shape, *rows.shape[2:])


def running(scales: Tensor, pieces: Pieces, from_end: bool = False) -> Tensor:
    """Sums (N,) of the entries of each sequence's pieces up to each, or from each on."""
    counts = pieces.pieces_of_each
    number = torch.arange(len(scales), device=scales.device)
    number -= (counts.cumsum(0) - counts)[pieces.sequence]
    if from_end:
        number = counts[pieces.sequence] - 1 - number
    table = scales.new_zeros(len(counts), int(counts.max()))
    table[pieces.sequence, number] = scales
    return table.cumsum(1)[pieces.sequence, number]


def failed_of(certain: Tensor, pieces: Pieces) -> Tensor:
    """Sequences of which a piece does not fit; waits for the device."""
    wrong = by_sequence((~certain).double(), pieces)
    return wrong.nonzero()[:, 0]


def by_sequence(rows: Tensor, pieces: Pieces) -> Tensor:
    """Sums (B, ...) over the pieces of each sequence, in their order."""
    if len(pieces.pieces_of_each) == 1:
        return rows.sum(0, keepdim=True)
    flat = rows.reshape(len(rows), -1)
    total = torch.segment_reduce(flat, "sum", lengths=pieces.pieces_of_each, unsafe=True)
    return total.view(-1, *rows.shape[1:])


def last_rows(rows: Tensor, pieces: Pieces) -> Tensor:
    """Entries (B, ...) of each sequence's last piece."""
    return rows[pieces.pieces_of_each.cumsum(0) - 1]

"""A backend that cuts long sequences, and does as a whole those whose pieces do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_POSITION, Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.pieces import messages
from flash_semicrf.streaming.pieces.certificate import certificate_of
from flash_semicrf.streaming.pieces.cutting import Cutting, Decoded, Gradients
from flash_semicrf.streaming.pieces.paths import joined
from flash_semicrf.streaming.pieces.plan import Cut, Slots, cuts_of
from flash_semicrf.streaming.pieces.rows import (
    Pieces,
    by_position,
    by_sequence,
    failed_of,
    last_rows,
    part_of,
    pieces_of,
    problem_of,
)

__all__ = ["InPieces"]


class InPieces:
    """Backend that cuts sequences where that pays.

    Parameters
    ----------
    inner : Cutting
        Does the pieces, the sequences whose pieces do not fit, and the tangents.
    slots : Slots, optional
        By default those of `inner`.
    """

    def __init__(self, inner: Cutting, slots: Slots | None = None) -> None:
        self.inner = inner
        self.name = inner.name
        self._slots = slots

    def why_not(self, potentials: Potentials) -> str | None:
        """None: whoever wraps a backend has asked it."""
        return None

    def cuts(self, potentials: Potentials, directions: int, sums: bool = True) -> tuple[Cut, ...]:
        """Attempts for a problem, with 1 or 2 passes over each piece."""
        p = potentials
        slots = self.inner.slots(p, sums)
        if slots is None:
            return ()
        sizes = (p.batch_size, p.num_positions, p.max_duration)
        return cuts_of(*sizes, directions, self._slots or slots)

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z; see `flash_semicrf.streaming.dispatch.Backend`."""
        p = potentials
        return _log_partition(self.inner, p, self.cuts(p, 1))

    def gradients(self, potentials: Potentials, wanted: set[str]) -> Gradients:
        """Log Z and gradients; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _gradients(self.inner, potentials, wanted, self.cuts(potentials, 2))

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward messages; see `flash_semicrf.streaming.dispatch.Backend`."""
        return messages.messages(self.inner, potentials, self.cuts(potentials, 2, sums=False))

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
        return self.inner.tangents(potentials, direction, wanted)

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
        return messages.max_messages(self.inner, potentials, self.cuts(potentials, 1, sums=False))

    def viterbi(self, potentials: Potentials) -> Decoded:
        """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return _viterbi(self.inner, potentials, self.cuts(potentials, 1, sums=False))

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        p = potentials
        return messages.sample(self.inner, p, num_samples, seed, self.cuts(p, 1, sums=False))


def _log_partition(inner: Cutting, p: Potentials, cuts: tuple[Cut, ...]) -> Tensor:
    pieces = pieces_of(p.lengths, cuts[0], both=False) if cuts else None
    if pieces is None:
        return inner.log_partition(p)
    log_z, windows = inner.log_partition_of_pieces(problem_of(p, pieces), pieces.core)
    certificate = certificate_of(windows, pieces.follows)
    total = last_rows(log_z, pieces) + by_sequence(certificate.scale, pieces)
    failed = failed_of(certificate.certain, pieces)
    if len(failed):
        total[failed] = _log_partition(inner, _rest(p, failed), cuts[1:])
    return total


def _rest(p: Potentials, failed: Tensor) -> Potentials:
    return p if len(failed) == p.batch_size else part_of(p, failed)


def _gradients(inner: Cutting, p: Potentials, wanted: set[str], cuts: tuple[Cut, ...]) -> Gradients:
    pieces = pieces_of(p.lengths, cuts[0], both=True) if cuts else None
    if pieces is None:
        return inner.gradients(p, wanted)
    tried = _gradients_in_pieces(inner, p, wanted, pieces, cuts[0].common)
    if tried is None:
        return _gradients(inner, p, wanted, cuts[1:])
    log_z, found, failed = tried
    if len(failed):
        log_z[failed], others = _gradients(inner, part_of(p, failed), wanted, cuts[1:])
        for name, value in others.items():
            found[name][failed] = value
    return log_z, found


def _gradients_in_pieces(
    inner: Cutting, p: Potentials, wanted: set[str], pieces: Pieces, span: int
) -> tuple[Tensor, dict[str, Tensor], Tensor] | None:
    """One attempt, and the sequences for which it failed; None where it did for all."""
    rows = problem_of(p, pieces)
    log_z, found, windows = inner.gradients_of_pieces(rows, wanted, pieces.core, span)
    certificate = certificate_of(windows, pieces.follows)
    failed = failed_of(certificate.certain, pieces)
    if len(failed) == p.batch_size:
        return None
    for name in wanted:
        value = found.pop(name)
        if name in BY_POSITION:
            found[name] = by_position(value, pieces, p.lengths, p.num_positions)
        elif name == "initial_scores":
            found[name] = value[pieces.pieces_of_each.cumsum(0) - pieces.pieces_of_each]
        elif name == "final_scores":
            found[name] = last_rows(value, pieces)
        else:
            found[name] = by_sequence(value, pieces)
    total = last_rows(log_z, pieces) + by_sequence(certificate.scale, pieces)
    return total, found, failed


def _viterbi(inner: Cutting, p: Potentials, cuts: tuple[Cut, ...]) -> Decoded:
    pieces = pieces_of(p.lengths, cuts[0], both=True) if cuts else None
    if pieces is None:
        return inner.viterbi(p)
    scores, table, windows = inner.viterbi_of_pieces(problem_of(p, pieces), pieces.core)
    certificate = certificate_of(windows, pieces.follows)
    table, met = joined(table, pieces)
    best = last_rows(scores, pieces) + by_sequence(certificate.scale, pieces)
    failed = failed_of(certificate.certain & met, pieces)
    if len(failed) == p.batch_size:
        return _viterbi(inner, p, cuts[1:])
    if len(failed):
        best[failed], others = _viterbi(inner, part_of(p, failed), cuts[1:])
        table = _merged(table, others._replace(sequence=failed[others.sequence]), failed)
    return best, table


def _merged(table: SegmentTable, others: SegmentTable, failed: Tensor) -> SegmentTable:
    """Replace the rows of some sequences."""
    kept = ~torch.isin(table.sequence, failed)
    columns = [torch.cat([x[kept], y]) for x, y in zip(table, others, strict=True)]
    order = torch.argsort(columns[0], stable=True)
    return SegmentTable(*(column[order] for column in columns))

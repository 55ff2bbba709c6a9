"""Derivatives of gradients along a direction, in pieces.

A piece has the derivatives of the messages of the whole up to one number in each direction, where
those in its windows differ by one from its neighbours'. What the gradient's derivative takes from
them, d alpha + d beta - d log Z, has none of these numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.pieces.certificate import certificate_of, certificate_of_changes
from flash_semicrf.streaming.pieces.cutting import Cutting
from flash_semicrf.streaming.pieces.plan import Cut
from flash_semicrf.streaming.pieces.rows import (
    Pieces,
    by_sequence,
    collected,
    failed_of,
    last_rows,
    part_of,
    pieces_of,
    problem_of,
)
from flash_semicrf.streaming.windows import Changes, Windows, after, before, taken

__all__ = ["tangents"]


def tangents(
    inner: Cutting, p: Potentials, direction: Potentials, wanted: set[str], cuts: tuple[Cut, ...]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log Z, its derivative, and those of gradients; see
    `flash_semicrf.streaming.dispatch.Backend`."""
    pieces = pieces_of(p.lengths, cuts[0], both=True) if cuts else None
    if pieces is None:
        return inner.tangents(p, direction, wanted)
    tried = _tangents_in_pieces(inner, p, direction, wanted, pieces)
    if tried is None:
        return tangents(inner, p, direction, wanted, cuts[1:])
    log_z, mean, found, failed = tried
    if len(failed):
        rest = part_of(p, failed), part_of(direction, failed)
        log_z[failed], mean[failed], others = tangents(inner, *rest, wanted, cuts[1:])
        for name, value in others.items():
            found[name][failed] = value
    return log_z, mean, found


def _tangents_in_pieces(
    inner: Cutting, p: Potentials, direction: Potentials, wanted: set[str], pieces: Pieces
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor] | None:
    """One attempt, and the sequences for which it failed; None where it did for all."""
    rows, towards = problem_of(p, pieces), problem_of(direction, pieces)
    tried = inner.tangents_of_pieces(rows, towards, wanted | {"end_scores"}, pieces.core)
    certificate = certificate_of(tried.windows, pieces.follows)
    size = _size(tried.found["end_scores"], rows, pieces)
    compared = _windows(tried.changes, rows, pieces)
    changes = certificate_of_changes(*compared, pieces.follows, size)
    failed = failed_of(certificate.certain & changes.certain, pieces)
    if len(failed) == p.batch_size:
        return None
    log_z = last_rows(tried.log_z, pieces) + by_sequence(certificate.scale, pieces)
    mean = last_rows(tried.mean, pieces) + by_sequence(changes.scale, pieces)
    return log_z, mean, collected(tried.found, wanted, pieces, p), failed


def _windows(changes: Changes, rows: Potentials, pieces: Pieces) -> tuple[Windows, Windows]:
    """Derivatives of the messages in the windows, and marginals of the boundaries there."""
    core, lengths = pieces.core, rows.lengths[:, None, None]
    place = before(core, rows.max_duration)
    valid = (place > 0) & (place <= lengths)
    alpha, ends = (taken(x, place - 1, valid) for x in (changes.alpha, changes.end))
    place = after(core, rows.max_duration)
    valid = (place > 0) & (place < lengths)
    beta, others = (taken(x, place - 1, valid) for x in (changes.beta, changes.end))
    left_out = changes.left_out
    return Windows(alpha, beta, left_out), Windows(ends, others, left_out)


def _size(ends: Tensor, rows: Potentials, pieces: Pieces) -> Tensor:
    """Largest derivative of an end marginal of each row's sequence, (N,)."""
    inside = torch.arange(ends.shape[1], device=ends.device) < rows.lengths[:, None]
    largest = torch.where(inside[..., None], ends.abs(), 0.0).amax((1, 2))
    of_each = largest.new_zeros(len(pieces.pieces_of_each))
    of_each = of_each.scatter_reduce(0, pieces.sequence, largest, "amax")
    return of_each[pieces.sequence]

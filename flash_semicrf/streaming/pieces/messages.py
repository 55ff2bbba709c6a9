"""Messages of long sequences, and samples from them, from the messages of pieces.

A piece has the messages of the whole up to one constant, whatever a message's posterior: windows
that agree in all entries, the same of them -inf, lead to messages that agree in all entries, since
every later message is a sum of products with earlier ones. The constants add up along the pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.pieces.certificate import Certificate, certificate_of
from flash_semicrf.streaming.pieces.cutting import Cutting
from flash_semicrf.streaming.pieces.plan import Cut
from flash_semicrf.streaming.pieces.rows import (
    Pieces,
    by_boundary,
    failed_of,
    last_rows,
    part_of,
    pieces_of,
    problem_of,
    rows_of_positions,
    running,
)
from flash_semicrf.streaming.windows import Forward, Windows, after, before, taken

__all__ = ["max_messages", "messages", "sample"]


def messages(inner: Cutting, p: Potentials, cuts: tuple[Cut, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z, alpha, beta; see `flash_semicrf.streaming.dispatch.Backend`."""
    pieces = pieces_of(p.lengths, cuts[0], both=True) if cuts else None
    if pieces is None:
        return inner.messages(p)
    rows = problem_of(p, pieces)
    log_z, alpha, beta = inner.messages(rows)
    certificate = _certificate(alpha[:, 1:], beta[:, 1:], rows, pieces)
    failed = failed_of(certificate.certain, pieces)
    if len(failed) == p.batch_size:
        return messages(inner, p, cuts[1:])
    level = running(certificate.scale, pieces)
    rest = running(torch.roll(certificate.back, -1), pieces, from_end=True)
    total = last_rows(log_z + level, pieces)
    alpha = _put_together(alpha, level, pieces, p)
    beta = _put_together(beta, rest, pieces, p)
    if len(failed):
        others = messages(inner, part_of(p, failed), cuts[1:])
        total[failed], alpha[failed], beta[failed] = others
    return total, alpha, beta


def max_messages(inner: Cutting, p: Potentials, cuts: tuple[Cut, ...]) -> Tensor:
    """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
    pieces = pieces_of(p.lengths, cuts[0], both=False) if cuts else None
    if pieces is None:
        return inner.max_messages(p)
    rows = problem_of(p, pieces)
    alpha = inner.max_messages(rows)
    certificate = _certificate(alpha[:, 1:], None, rows, pieces)
    failed = failed_of(certificate.certain, pieces)
    if len(failed) == p.batch_size:
        return max_messages(inner, p, cuts[1:])
    found = _put_together(alpha, running(certificate.scale, pieces), pieces, p)
    if len(failed):
        found[failed] = max_messages(inner, part_of(p, failed), cuts[1:])
    return found


def sample(
    inner: Cutting, p: Potentials, num_samples: int, seed: int, cuts: tuple[Cut, ...]
) -> SegmentTable:
    """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`.

    Walks are those of whole sequences, with the random numbers of these.
    """
    forward = _forward(inner, p, cuts)
    if forward is None:
        return inner.sample(p, num_samples, seed)
    return inner.sample_from(p, forward, num_samples, seed)


def _forward(inner: Cutting, p: Potentials, cuts: tuple[Cut, ...]) -> Forward | None:
    """Messages of the forward pass; None where it has to be done as a whole for all sequences."""
    pieces = pieces_of(p.lengths, cuts[0], both=False) if cuts else None
    if pieces is None:
        return None
    rows = problem_of(p, pieces)
    log_z, alpha, gamma = inner.forward(rows)
    certificate = _certificate(alpha, None, rows, pieces)
    failed = failed_of(certificate.certain, pieces)
    if len(failed) == p.batch_size:
        return _forward(inner, p, cuts[1:])
    level = running(certificate.scale, pieces)
    total = last_rows(log_z + level, pieces)
    alpha += level[:, None, None]
    alpha = rows_of_positions(alpha, pieces, p.num_positions)
    if gamma is not None:
        gamma += level[:, None, None]
        gamma = rows_of_positions(gamma, pieces, p.num_positions)
    if len(failed):
        rest = part_of(p, failed)
        others = _forward(inner, rest, cuts[1:]) or inner.forward(rest)
        total[failed], alpha[failed] = others.log_z, others.alpha
        if gamma is not None and others.gamma is not None:
            gamma[failed] = others.gamma
    return Forward(total, alpha, gamma)


def _put_together(rows: Tensor, level: Tensor, pieces: Pieces, p: Potentials) -> Tensor:
    """Messages (B, T + 1, C) from those of the pieces, which get their constants."""
    rows += level[:, None, None]
    return by_boundary(rows, pieces, p.num_positions)


def _certificate(
    alpha: Tensor, beta: Tensor | None, rows: Potentials, pieces: Pieces
) -> Certificate:
    """Certificate from the messages (N, width, C) of boundaries 1, 2, ... of the rows."""
    core, lengths = pieces.core, rows.lengths[:, None, None]
    place = before(core, rows.max_duration)
    alpha = taken(alpha, place - 1, (place > 0) & (place <= lengths))
    if beta is not None:
        place = after(core, rows.max_duration)
        beta = taken(beta, place - 1, (place > 0) & (place < lengths))
    left_out = torch.zeros(core.shape, dtype=alpha.dtype, device=alpha.device)
    return certificate_of(Windows(alpha, beta, left_out), pieces.follows)

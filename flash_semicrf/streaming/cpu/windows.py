"""Windows of messages, from the rows that passes write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.windows import Windows, after, before, boundaries, taken, with_longer

__all__ = ["forward_windows", "windows_of"]


def forward_windows(
    alpha: np.ndarray,
    offsets: np.ndarray,
    p: Potentials,
    core: Tensor,
    longer: np.ndarray | None = None,
) -> Windows:
    """Windows of a forward pass.

    Parameters
    ----------
    alpha : array of shape (B, T, C)
        alpha_{p+1} in row p, less its offset.
    offsets : array of shape (B, T + 1)
    p : Potentials
    core : int64 Tensor of shape (B, 2)
    longer : array of shape (B, T, C), optional
        With a tail: G_{p+1} in row p, less the offset of p.
    """
    place = before(core, boundaries(p))
    valid = (place > 0) & (place <= p.lengths[:, None, None])
    found = taken(torch.from_numpy(alpha), place - 1, valid)
    found = found + taken(torch.from_numpy(offsets), place, valid)[..., None]
    if longer is not None:
        place = core[..., None] - 1
        rows = taken(torch.from_numpy(longer), place, place >= 0)
        rows = rows + taken(torch.from_numpy(offsets), place, place >= 0)[..., None]
        found = with_longer(found, rows)
    return Windows(found, None, torch.zeros(core.shape, dtype=torch.float64))


def windows_of(rows: NamedTuple, p: Potentials, core: Tensor) -> Windows:
    """Windows of both passes, from rows with `alpha`, `forward`, `beta` and `backward`; with a tail
    also with `longer` and `longer_back`, G of both."""
    lengths = p.lengths[:, None, None]
    place = after(core, boundaries(p))
    valid = (place > 0) & (place < lengths)
    offsets = torch.from_numpy(rows.backward)
    beta = taken(torch.from_numpy(rows.beta), place - 1, valid)
    beta = beta + taken(offsets, lengths - place, valid)[..., None]
    longer = None
    if p.duration_tail is not None:
        longer = rows.longer
        place = core[..., None]
        valid = place < lengths
        back = taken(torch.from_numpy(rows.longer_back), place, valid)
        back = back + taken(offsets, lengths - place - 1, valid)[..., None]
        beta = with_longer(beta, back)
    return forward_windows(rows.alpha, rows.forward, p, core, longer)._replace(beta=beta)

"""Windows of messages, from the rows that passes write."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.windows import Windows, after, before, taken

__all__ = ["forward_windows", "windows_of"]


def forward_windows(alpha: np.ndarray, offsets: np.ndarray, p: Potentials, core: Tensor) -> Windows:
    """Windows of a forward pass.

    Parameters
    ----------
    alpha : array of shape (B, T, C)
        alpha_{p+1} in row p, less its offset.
    offsets : array of shape (B, T + 1)
    p : Potentials
    core : int64 Tensor of shape (B, 2)
    """
    place = before(core, p.max_duration)
    valid = (place > 0) & (place <= p.lengths[:, None, None])
    found = taken(torch.from_numpy(alpha), place - 1, valid)
    found = found + taken(torch.from_numpy(offsets), place, valid)[..., None]
    return Windows(found, None, torch.zeros(core.shape, dtype=torch.float64))


def windows_of(rows: NamedTuple, p: Potentials, core: Tensor) -> Windows:
    """Windows of both passes, from rows with `alpha`, `forward`, `beta` and `backward`."""
    lengths = p.lengths[:, None, None]
    place = after(core, p.max_duration)
    valid = (place > 0) & (place < lengths)
    beta = taken(torch.from_numpy(rows.beta), place - 1, valid)
    beta = beta + taken(torch.from_numpy(rows.backward), lengths - place, valid)[..., None]
    return forward_windows(rows.alpha, rows.forward, p, core)._replace(beta=beta)

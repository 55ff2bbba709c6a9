"""Duration scores that rise or fall steadily, as scores of the positions.

A duration score of a·k for a segment of k positions is a score of a for each of them. Window sums
work on exp(D_k - peak), whose range float64 does not hold where D changes by thousands from 1 to K;
with the steady part moved into the scores of the positions, what is left is flat. Every
segmentation keeps its score, so messages, gradients and samples are those of the problem as given.
"""

from __future__ import annotations

import numpy as np
import torch

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.assembly import in_float64

__all__ = ["slopes_of", "tilted"]

STEEP = 300.0
"""Duration scores within a range of this are well as they are."""


def slopes_of(duration_bias: np.ndarray) -> np.ndarray | None:
    """Change of D per position that is steady for each label, 0 where there is none to speak of.

    Parameters
    ----------
    duration_bias : array of shape (K, C)

    Returns
    -------
    slopes : float64 array of shape (C,) or None
        The median of the differences between neighbouring durations that are allowed, where D less
        it has less than half of D's range. None where every label's is 0.
    """
    if duration_bias.max() <= duration_bias.min() + STEEP:
        return None
    bias = duration_bias.astype(np.float64)
    allowed = bias > NEG_INF
    lowest = np.where(allowed, bias, np.inf).min(0)
    steep = np.flatnonzero(bias.max(0) - lowest > STEEP)
    slopes = np.zeros(bias.shape[1])
    for c in steep:
        k = np.flatnonzero(allowed[:, c])
        values = bias[k, c]
        slope = np.median(np.diff(values) / np.diff(k))
        if np.ptp(values - slope * k) < 0.5 * np.ptp(values):
            slopes[c] = slope
    return slopes if slopes.any() else None


def tilted(potentials: Potentials) -> Potentials:
    """The same problem with the slopes of D in the scores of the positions.

    The potentials themselves where there are none; else a copy in float64.
    """
    slopes = slopes_of(potentials.duration_bias.detach().numpy())
    if slopes is None:
        return potentials
    wide = in_float64(potentials)
    named = wide.parameters()
    slope = torch.from_numpy(slopes)
    durations = torch.arange(1, potentials.max_duration + 1, dtype=torch.float64)
    named["scores"] = named["scores"] + slope
    named["duration_bias"] = named["duration_bias"] - durations[:, None] * slope
    if "duration_tail" in named:
        named["duration_tail"] = named["duration_tail"] - slope
    return wide.replace(**named)

"""The entropy semiring: a value is (log weight, entropy) of a set of paths.

Joining disjoint sets of paths with probabilities p_i gives log Z = LSE(log Z_i) and
H = sum_i p_i (H_i - log p_i); chaining independent pieces adds both. All terms are >= 0: nothing
cancels.

References
----------
Z. Li and J. Eisner, First- and Second-Order Expectation Semirings, EMNLP 2009.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.semirings.base import Semiring
from flash_semicrf.semirings.log import logsumexp

__all__ = ["EntropySemiring", "log_shares"]


def log_shares(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over an axis, and the log of the share of each entry in it.

    A share of zero has the logarithm -inf and no gradient.
    """
    total = logsumexp(x, dim)
    dead = x == -math.inf
    safe = total.masked_fill(total == -math.inf, 0.0).unsqueeze(dim)
    return total, (x.masked_fill(dead, 0.0) - safe).masked_fill(dead, -math.inf)


class EntropySemiring(Semiring):
    """Entropy in nats, ``- sum_y P(y) log P(y)``; 0 if no path is feasible.

    Values are (log Z, H).

    Examples
    --------
    >>> semiring = EntropySemiring()
    >>> x = semiring.convert(torch.tensor([1.0, 1.0, -math.inf]))
    >>> round(float(semiring.unconvert(semiring.sum(x)).exp()), 4)
    2.0
    """

    size = 2
    zero = (-math.inf, 0.0)
    one = (0.0, 0.0)

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Entropy of the choice, plus the mean entropy of the chosen values."""
        total, log_share = log_shares(x[0], dim)
        surprise = log_share.masked_fill(log_share == -math.inf, 0.0)
        entropy = (log_share.exp() * (x[1] - surprise)).sum(dim)
        return torch.stack([total, entropy])

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Addition of both components."""
        return a + b

    def unconvert(self, values: Tensor) -> Tensor:
        """The entropy."""
        return values[1]

"""The cross-entropy semiring: a value is (log weight by p, log weight by q, cross-entropy).

Joining disjoint sets of paths with shares p_i and q_i gives H(p, q) = sum_i p_i (H_i - log q_i);
chaining independent pieces adds all components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_semicrf.semirings.base import Semiring
from flash_semicrf.semirings.entropy import log_shares

__all__ = ["CrossEntropySemiring"]


class CrossEntropySemiring(Semiring):
    """Cross-entropy in nats, ``- sum_y P(y) log Q(y)``.

    Potentials are a pair: (p, q), or a tensor with them stacked in front. Values are (log Z of p,
    log Z of q, cross-entropy). It is +inf, with gradient 0, if q forbids a path that p allows, and
    0 if p forbids every path.

    Examples
    --------
    >>> semiring = CrossEntropySemiring()
    >>> x = semiring.convert(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]]))
    >>> round(float(semiring.unconvert(semiring.sum(x))), 4)  # -(log 1/4 + log 3/4) / 2
    0.837
    """

    size = 3
    zero = (-math.inf, -math.inf, 0.0)
    one = (0.0, 0.0, 0.0)
    num_potentials = 2

    def convert(self, potentials: Tensor | Sequence[Tensor]) -> Tensor:
        """Values of a pair of potentials, which may be stacked in front: (2, ...)."""
        if not isinstance(potentials, Tensor):
            potentials = torch.stack(list(potentials))
        return torch.cat([potentials, torch.zeros_like(potentials[:1])])

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Cross-entropy of the choice, plus the mean of the chosen values."""
        total_p, log_p = log_shares(x[0], dim)
        total_q, log_q = log_shares(x[1], dim)
        share = log_p.exp()
        infinite = (share > 0) & ((log_q == -math.inf) | (x[2] == math.inf))
        ignored = infinite | (share == 0)
        terms = x[2].masked_fill(ignored, 0.0) + self._surprise(
            log_p.masked_fill(ignored, 0.0), log_q.masked_fill(ignored, 0.0)
        )
        value = (share * terms).sum(dim)
        return torch.stack([total_p, total_q, torch.where(infinite.any(dim), math.inf, value)])

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Addition of all components."""
        return a + b

    def unconvert(self, values: Tensor) -> Tensor:
        """The cross-entropy."""
        return values[2]

    def _surprise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Contribution of one share."""
        return -log_q

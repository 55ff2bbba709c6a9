"""The max semiring: sum is the maximum, product is addition; the total is the best score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.semirings.base import Semiring

__all__ = ["MaxSemiring"]


class MaxSemiring(Semiring):
    """Maximum and addition: the total is the best score, its gradient indicates one best path.

    Examples
    --------
    >>> x = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
    >>> semiring = MaxSemiring()
    >>> semiring.unconvert(semiring.sum(semiring.convert(x))).backward()
    >>> x.grad.tolist()
    [1.0, 0.0, 0.0]
    """

    zero = -math.inf
    one = 0.0

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Maximum; the gradient goes to the first of equal entries, to none if all are -inf."""
        # `amax` would share the gradient among ties: no path.
        best = x.gather(dim, x.argmax(dim, keepdim=True)).squeeze(dim)
        return torch.where(best == -math.inf, -math.inf, best)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Addition."""
        return a + b

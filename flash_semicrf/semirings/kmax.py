"""The k-best semiring: a value is the k largest scores, in falling order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.arguments import check_positive_int
from flash_semicrf.semirings.base import Semiring

__all__ = ["KMaxSemiring"]


class KMaxSemiring(Semiring):
    """The k best scores; the gradient of the i-th is the indicator of the i-th best path.

    Parameters
    ----------
    k : int
        Number of scores kept, >= 1. If fewer paths exist, the others are -inf, with gradient 0.

    Raises
    ------
    ValueError
        If `k` is not a positive integer.

    References
    ----------
    L. Huang and D. Chiang, Better k-best Parsing, IWPT 2005.

    Examples
    --------
    >>> semiring = KMaxSemiring(2)
    >>> semiring.unconvert(semiring.sum(semiring.convert(torch.tensor([1.0, 3.0, 2.0])))).tolist()
    [3.0, 2.0]
    """

    def __init__(self, k: int) -> None:
        self.size = k = check_positive_int("k", k)
        self.zero = (-math.inf,) * k
        self.one = (0.0,) + (-math.inf,) * (k - 1)

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """The k largest of all entries along the axis."""
        return self._best(x.movedim(dim, 1).flatten(0, 1))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """The k largest sums of one entry of a and one of b."""
        # Entries i of a and j of b come after (i+1)(j+1) - 1 pairs with no larger indices.
        pairs = [
            (i, j)
            for i in range(self.size)
            for j in range(self.size)
            if (i + 1) * (j + 1) <= self.size
        ]
        return self._best(torch.stack([a[i] + b[j] for i, j in pairs]))

    def unconvert(self, values: Tensor) -> Tensor:
        """All k scores, of shape (k, ...)."""
        return values

    def matmul_terms(self, count: int, rows: int, inner: int, columns: int) -> int:
        """Numbers held at once: the sums of pairs, about k log k for each term."""
        pairs = sum(self.size // (i + 1) for i in range(self.size))
        return pairs * count * rows * inner * columns

    def _best(self, x: Tensor) -> Tensor:
        """The k largest along axis 0."""
        best = x.topk(self.size, 0).values
        return torch.where(best == -math.inf, -math.inf, best)

"""The ordinary semiring of sums and products of weights."""

from __future__ import annotations

from torch import Tensor

from flash_semicrf.semirings.base import Semiring

__all__ = ["StdSemiring"]


class StdSemiring(Semiring):
    """Sum and product: potentials are weights, not logarithms; 0 forbids.

    The total is the sum over all paths of the product of their weights. The range of floats limits
    it to counting and to short sequences.

    Examples
    --------
    >>> import torch
    >>> semiring = StdSemiring()
    >>> weights = semiring.convert(torch.tensor([0.5, 2.0]))
    >>> float(semiring.unconvert(semiring.sum(semiring.mul(weights, weights))))
    4.25
    """

    zero = 0.0
    one = 1.0
    log_domain = False

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Sum."""
        return x.sum(dim)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Product."""
        return a * b

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product."""
        return a @ b

    def matmul_terms(self, count: int, rows: int, inner: int, columns: int) -> int:
        """Numbers held by the result."""
        return count * rows * columns

    def edge_gradient(self, before: Tensor, edges: Tensor, after: Tensor, total: Tensor) -> Tensor:
        """Sum over the paths through each edge of the product of their other weights."""
        return (before * after)[0]

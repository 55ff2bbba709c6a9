"""Semirings that trade time for memory: parts of an algorithm are recomputed in the backward pass.

A linear scan over N nodes runs its loop by ``Semiring.run`` in blocks of about sqrt(N) steps. Of
each block, a checkpointing semiring keeps only the initial window of messages, so that a scan keeps
O(sqrt(N)) windows and, in the backward pass, the steps of one block: O(sqrt(N)) again.

References
----------
T. Chen, B. Xu, C. Zhang and C. Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_semicrf.problem.arguments import check_positive_int
from flash_semicrf.semirings.base import Result, Semiring, as_semiring

__all__ = ["CheckpointSemiring", "CheckpointShardSemiring"]


class CheckpointSemiring(Semiring):
    """Semiring whose blocks of steps and matrix products are recomputed in the backward pass.

    Parameters
    ----------
    semiring : Semiring or subclass
        The inner semiring.
    min_size : int, default=0
        Matrix products that hold fewer numbers at once are kept, not recomputed.

    Examples
    --------
    >>> from flash_semicrf import SemiMarkov
    >>> from flash_semicrf.semirings import LogSemiring
    >>> edges = torch.zeros(1, 4, 3, 1, 1, requires_grad=True)
    >>> total = SemiMarkov(CheckpointSemiring(LogSemiring)).sum(edges)
    >>> round(float(total.detach().exp()), 4)  # 4 positions in segments of 1 or 2
    5.0
    """

    def __init__(self, semiring: Semiring | type[Semiring], min_size: int = 0) -> None:
        inner = as_semiring(semiring)
        self.inner = inner
        self.min_size = 0 if min_size == 0 else check_positive_int("min_size", min_size, 2**63 - 1)
        self.size, self.zero, self.one = inner.size, inner.zero, inner.one
        self.num_potentials, self.log_domain = inner.num_potentials, inner.log_domain

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Sum of the inner semiring."""
        return self.inner.sum(x, dim)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Product of the inner semiring."""
        return self.inner.mul(a, b)

    def convert(self, potentials: Tensor) -> Tensor:
        """Values of the inner semiring."""
        return self.inner.convert(potentials)

    def unconvert(self, values: Tensor) -> Tensor:
        """Result of the inner semiring."""
        return self.inner.unconvert(values)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product of the inner semiring, recomputed in the backward pass."""
        return self.inner.matmul(a, b) if self._small(a, b) else self.run(self.inner.matmul, a, b)

    def _small(self, a: Tensor, b: Tensor) -> bool:
        """Whether a product is below `min_size`."""
        count = math.prod(torch.broadcast_shapes(a.shape[1:-2], b.shape[1:-2]))
        rows, inner = a.shape[-2:]
        return self.inner.matmul_terms(count, rows, inner, b.shape[-1]) < self.min_size

    def matmul_terms(self, count: int, rows: int, inner: int, columns: int) -> int:
        """Numbers held at once by a `matmul` of the inner semiring."""
        return self.inner.matmul_terms(count, rows, inner, columns)

    def run(self, function: Callable[..., Result], *tensors: Tensor) -> Result:
        """Call a function whose intermediate results are recomputed in the backward pass."""
        if not torch.is_grad_enabled():
            return function(*tensors)
        result: Result = checkpoint(
            function, *tensors, use_reentrant=False, preserve_rng_state=False
        )
        return result


class CheckpointShardSemiring(CheckpointSemiring):
    """Checkpointed semiring whose matrix products run in shards of bounded size.

    Parameters
    ----------
    semiring : Semiring or subclass
        The inner semiring.
    max_size : int, default=2**24
        Numbers that a product of shards may hold at once; at least one row of one product is
        computed at a time.
    min_size : int, default=0
        As for `CheckpointSemiring`.
    """

    def __init__(
        self, semiring: Semiring | type[Semiring], max_size: int = 2**24, min_size: int = 0
    ) -> None:
        super().__init__(semiring, min_size)
        self.max_size = check_positive_int("max_size", max_size, 2**63 - 1)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product, shard by shard."""
        if self._small(a, b):
            return self.inner.matmul(a, b)
        batch = torch.broadcast_shapes(a.shape[1:-2], b.shape[1:-2])
        (rows, inner), columns = a.shape[-2:], b.shape[-1]
        count = math.prod(batch)  # 1 without batch axes
        a = a.expand(self.size, *batch, rows, inner).reshape(self.size, count, rows, inner)
        b = b.expand(self.size, *batch, inner, columns).reshape(self.size, count, inner, columns)
        matrices, height = self._shard(rows, inner, columns)
        parts = [
            torch.cat([self.run(self.inner.matmul, x, right) for x in left.split(height, -2)], -2)
            for left, right in zip(a.split(matrices, 1), b.split(matrices, 1), strict=True)
        ]
        return torch.cat(parts, 1).view(self.size, *batch, rows, columns)

    def matmul_terms(self, count: int, rows: int, inner: int, columns: int) -> int:
        """Numbers held at once by the product of one shard."""
        matrices, height = self._shard(rows, inner, columns)
        return self.inner.matmul_terms(min(count, matrices), height, inner, columns)

    def _shard(self, rows: int, inner: int, columns: int) -> tuple[int, int]:
        """Matrices of a shard, and their rows."""
        one_row = max(1, self.inner.matmul_terms(1, 1, inner, columns))
        height = max(1, min(rows, self.max_size // one_row))
        matrices = max(1, self.max_size // (one_row * rows)) if height == rows else 1
        return matrices, height

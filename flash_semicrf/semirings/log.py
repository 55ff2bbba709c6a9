"""The log semiring: sum is log-sum-exp, product is addition; the total is log Z."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_semicrf.semirings.base import Semiring

__all__ = ["LogSemiring", "logsumexp"]


class _LogSumExp(torch.autograd.Function):
    """`torch.logsumexp` whose gradient is 0, not NaN, if all entries are -inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        total = torch.logsumexp(x, dim)
        ctx.dim = dim
        ctx.save_for_backward(x, total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        x, total = ctx.saved_tensors
        safe = total.masked_fill(total == -math.inf, 0.0).unsqueeze(ctx.dim)
        return (x - safe).exp() * upstream.unsqueeze(ctx.dim), None


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over one axis, counted from the end; -inf with gradient 0 if all are -inf."""
    if torch.is_grad_enabled() and x.requires_grad:
        total: Tensor = _LogSumExp.apply(x, dim)  # type: ignore[no-untyped-call]  # torch's
        return total
    return torch.logsumexp(x, dim)


class LogSemiring(Semiring):
    """Log-sum-exp and addition: the total is log Z, its gradient the edge marginals.

    Examples
    --------
    >>> semiring = LogSemiring()
    >>> values = semiring.convert(torch.tensor([0.0, 0.0, -math.inf]))
    >>> round(float(semiring.unconvert(semiring.sum(values)).exp()), 4)
    2.0
    """

    zero = -math.inf
    one = 0.0

    def sum(self, x: Tensor, dim: int = -1) -> Tensor:
        """Log-sum-exp."""
        return logsumexp(x, dim)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Addition."""
        return a + b

    def edge_gradient(self, before: Tensor, edges: Tensor, after: Tensor, total: Tensor) -> Tensor:
        """Probability of each edge."""
        safe = total.masked_fill(total == -math.inf, 0.0)
        return (edges + before).add_(after).sub_(safe).exp_()[0]

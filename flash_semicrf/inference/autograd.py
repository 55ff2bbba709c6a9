"""What the autograd functions of inference have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Once", "apply", "needs_graph_of", "once", "scaled_by_torch", "scaled_gradient"]


def scaled_gradient(gradient: Tensor, weight: Tensor, by_position: bool) -> Tensor:
    """Gradient of each sequence times its weight; summed over sequences unless by position.

    A weight of 0 excludes its sequence, even if the gradient is NaN.
    """
    if gradient.device.type != "cpu":
        return scaled_by_torch(gradient, weight, by_position)
    # numpy: its calls on small arrays cost less than torch's, and wait for no busy core.
    each, factors = gradient.numpy(), weight.detach().numpy()
    if by_position:
        product = each * factors.astype(each.dtype).reshape(-1, *(1,) * (each.ndim - 1))
        product[factors == 0] = 0.0
    else:
        used = factors != 0
        product = np.einsum("b,b...->...", factors[used], each[used])
    return torch.from_numpy(product)


def scaled_by_torch(gradient: Tensor, weight: Tensor, by_position: bool) -> Tensor:
    """`scaled_gradient` by operations of PyTorch alone, which can be traced."""
    weights = weight.view(-1, *(1,) * (gradient.dim() - 1))
    scaled = torch.where(weights == 0, 0.0, gradient * weights)
    return scaled if by_position else scaled.sum(0)


class Once(torch.autograd.Function):
    """Identity of a gradient that raises an error when it is differentiated again.

    The gradient depends on the value from which it was computed. PyTorch's `once_differentiable`
    treats it as a constant, of derivative zero, unless the upstream gradient requires one, which
    that of a plain sum never does.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(ctx.reason)


def needs_graph_of(*values: Tensor | None) -> bool:
    """Whether a function of tensors, some of which may be missing, has to be differentiable."""
    if forward_ad._current_level >= 0:  # forward-mode derivatives have a mode of their own
        return True
    if not torch.is_grad_enabled():
        return False
    return any(value is not None and value.requires_grad for value in values)


def apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """Apply an autograd function, to detached tensors if gradients are disabled.

    ``ctx.needs_input_grad`` depends on ``requires_grad`` alone, not on the grad mode, and
    ``forward`` always runs with gradients disabled. Forward-mode derivatives, which have a mode of
    their own, are not detached, so that PyTorch raises its error for them.
    """
    if not torch.is_grad_enabled():
        arguments = tuple(map(_constant, arguments))
    return function.apply(*arguments)


def _constant(value: object) -> object:
    if not isinstance(value, Tensor) or forward_ad.unpack_dual(value).tangent is not None:
        return value
    return value.detach()


def once(gradient: Tensor, value: Tensor, reason: str) -> Tensor:
    """A gradient whose differentiation raises RuntimeError with the reason; see `Once`."""
    tied: Tensor = apply(Once, gradient, value, reason)
    return tied

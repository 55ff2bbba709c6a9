"""Log Z as a node of the autograd graph.

The gradient of log Z costs little once the messages exist, and takes less memory than they do.
Therefore it is computed in the forward pass, if any parameter requires it, and scaled in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_semicrf.problem.flags import poisoned, poisoned_gradient
from flash_semicrf.problem.potentials import BY_SEQUENCE, NAMES, Potentials
from flash_semicrf.streaming.dispatch import Backend, choose
from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = [
    "LogPartition",
    "ONCE_ONLY",
    "Once",
    "SemiCRFStreaming",
    "apply",
    "named",
    "needs_graph_of",
    "once",
    "scaled_by_torch",
    "scaled_gradient",
]

_TRITON = TritonBackend()

ONCE_ONLY = (
    'log_partition() is differentiable once by this backend; pass backend="reference" for second '
    "derivatives."
)


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


def named(values: Sequence[Tensor | None], lengths: Tensor) -> Potentials:
    """Problem from parameters in the order of `NAMES`; those at the end may be missing."""
    given = zip(NAMES, values, strict=False)
    return Potentials(
        lengths=lengths, **{name: value for name, value in given if value is not None}
    )


class LogPartition(torch.autograd.Function):
    """Log Z of a batch by a streaming backend, with its gradient: see `SemiCRFStreaming`."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str | Backend,
        lengths: Tensor,
        bad: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Log Z, NaN for `bad` sequences, and the gradients that the backward pass needs."""
        potentials = named(parameters, lengths)
        chosen = choose(backend, potentials) if isinstance(backend, str) else backend
        ctx.given = NAMES[: len(parameters)]
        needs = dict(zip(ctx.given, ctx.needs_input_grad[3:], strict=True))
        wanted = {name for name, needed in needs.items() if needed}
        if not wanted:
            return poisoned(chosen.log_partition(potentials), bad)
        log_z, gradients = chosen.gradients(potentials, wanted)
        log_z = poisoned(log_z, bad)
        ctx.by_triton = chosen.name == _TRITON.name
        ctx.wanted = [name for name in NAMES if name in wanted]
        ctx.dtypes = {name: getattr(potentials, name).dtype for name in wanted}
        ctx.save_for_backward(log_z, bad, *(gradients[name] for name in ctx.wanted))
        return log_z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale each sequence's gradient; sum those of shared parameters over the batch."""
        log_z, bad, *gradients = ctx.saved_tensors
        found = dict(zip(ctx.wanted, gradients, strict=True))
        if ctx.by_triton:
            found = _TRITON.scaled(found, upstream, bad, ctx.dtypes)
        else:
            weight = poisoned_gradient(upstream, bad)
            for name, gradient in found.items():
                scaled = scaled_gradient(gradient, weight.to(gradient.dtype), name in BY_SEQUENCE)
                found[name] = scaled.to(ctx.dtypes[name])
        if torch.is_grad_enabled():  # create_graph=True
            found = {name: once(value, log_z, ONCE_ONLY) for name, value in found.items()}
        return (None, None, None, *map(found.get, ctx.given))


class SemiCRFStreaming(LogPartition):
    """Log Z of a batch by a streaming backend, with its gradient.

    Call it as ``SemiCRFStreaming.apply(backend, lengths, scores, transition, duration_bias,
    start_scores, end_scores, initial_scores, final_scores, duration_tail)``, where `backend` is a
    name or a `Backend` and the others are the parameters of `flash_semicrf.Potentials`; optional
    ones may be None or, at the end, omitted. `flash_semicrf.log_partition` is the usual interface.
    Returns log Z of shape (B,) in float64. If no parameter requires a gradient, and under
    `torch.no_grad`, only O(KC) memory per sequence is used. Differentiable once: a second
    derivative raises RuntimeError.
    """

    @classmethod
    def apply(cls, backend: str | Backend, lengths: Tensor, *parameters: Tensor | None) -> Tensor:
        """Compute log Z, and the gradients that the backward pass needs."""
        log_z: Tensor = apply(LogPartition, backend, lengths, None, *parameters)
        return log_z

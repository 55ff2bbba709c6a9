"""Values that no score may have, found without waiting for the device.

A check that raises an error has to read its result, and on a GPU a read waits for everything that
was launched before. Here the result stays on the device: a flag for each sequence, which turns log
Z and its gradient into NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_SEQUENCE, NEG_INF, Potentials, ignored
from flash_semicrf.problem.validation import check_choice, check_lengths, forbids

__all__ = [
    "Flagged",
    "Validate",
    "flag_values",
    "poisoned",
    "poisoned_gradient",
    "reads_values",
    "with_lengths_on_device",
]

Validate: TypeAlias = Literal["auto", "values", "shapes"]
"""What is checked before a computation: "values" reads all of them and raises an error that names
the argument and the index; "shapes" reads none, and bad values make results NaN; "auto" is "shapes"
on CUDA devices and "values" elsewhere."""


class Flagged(NamedTuple):
    """A problem that can be computed on, and what is wrong with it.

    Attributes
    ----------
    potentials : Potentials
        Kernels read nothing out of bounds, whatever the flags are.
    bad : bool Tensor of shape (B,), or None
        Sequences with a bad value or length. None if values were read and are all allowed.
    """

    potentials: Potentials
    bad: Tensor | None


def reads_values(validate: str, device: torch.device) -> bool:
    """Whether `validate` reads values on this device; ValueError if it is no `Validate`."""
    check_choice("validate", validate, ("auto", "values", "shapes"))
    return validate == "values" or (validate == "auto" and device.type != "cuda")


def with_lengths_on_device(lengths: Tensor, num_positions: int, device: torch.device) -> Tensor:
    """`lengths` as int64 on a device; values that are on the CPU are read there.

    Raises
    ------
    ValueError
        If the lengths are on the CPU and one is not in [1, T].
    """
    if lengths.device.type == "cpu":
        lengths = check_lengths(lengths, len(lengths), num_positions)
    return lengths.long().to(device, non_blocking=True)


def flag_values(potentials: Potentials) -> Flagged:
    """Flags of the sequences of a problem, by plain PyTorch.

    Parameters
    ----------
    potentials : Potentials
        Of checked shapes, with int64 lengths on the device of the scores.

    Returns
    -------
    Flagged
        With zeros in place of the values of flagged sequences and of bad shared parameters, lengths
        in [1, T], and -inf for every value that forbids. Gradients pass through the zeros: a bad
        sequence, whose upstream gradient is NaN, passes it on.
    """
    p = potentials
    bad = (p.lengths < 1) | (p.lengths > p.num_positions)
    odd = {}
    for name, value in p.parameters().items():
        odd[name] = ~(value.detach() < -forbids(value.dtype))  # NaN compares as False
        if name in BY_SEQUENCE:
            bad = bad | odd[name].masked_fill(ignored(p, name), False).flatten(1).any(1)
        else:
            bad = bad | odd[name].any()
    changed = {}
    for name, value in p.parameters().items():
        by_sequence = name in BY_SEQUENCE
        blank = bad.view(-1, *(1,) * (value.dim() - 1)) if by_sequence else odd[name]
        clean = _blank(value, blank)
        changed[name] = clean.masked_fill(clean.detach() <= NEG_INF, -torch.inf)
    return Flagged(p.replace(lengths=p.lengths.clamp(1, p.num_positions), **changed), bad)


def poisoned(value: Tensor, bad: Tensor | None, poison: float = torch.nan) -> Tensor:
    """A quantity of each sequence with `poison` for those that are flagged.

    Parameters
    ----------
    value : Tensor of shape (B, ...)
    bad : bool Tensor of shape (B,) or None
        None flags nothing.
    poison : float, default=NaN

    Returns
    -------
    Tensor
        Its gradient by the values of a flagged sequence is NaN, and 0 where the upstream gradient
        is 0: a weight of 0 excludes a sequence.
    """
    if bad is None:
        return value
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value.masked_fill(bad.view(-1, *(1,) * (value.dim() - 1)), poison)
    return _poison(value, bad.view(-1, *(1,) * (value.dim() - 1)), poison)


def poisoned_gradient(upstream: Tensor, bad: Tensor | None) -> Tensor:
    """Upstream gradient of `poisoned`, as the values before it see it; the shapes broadcast."""
    if bad is None:
        return upstream
    return upstream.masked_fill(torch.logical_and(bad, upstream), torch.nan)


class _Poison(torch.autograd.Function):
    """`poisoned`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bad: Tensor, poison: float) -> Tensor:
        ctx.save_for_backward(bad)
        return value.masked_fill(bad, poison)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (bad,) = ctx.saved_tensors
        return poisoned_gradient(upstream, bad), None, None


_poison: Callable[[Tensor, Tensor, float], Tensor] = _Poison.apply


class _Blank(torch.autograd.Function):
    """0 where a mask is set, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mask: Tensor) -> Tensor:
        return value.masked_fill(mask, 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


_blank: Callable[[Tensor, Tensor], Tensor] = _Blank.apply

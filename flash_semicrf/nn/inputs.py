"""Checks and casts of the inputs of `flash_semicrf.nn.SemiMarkovCRFHead`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.prune import BasePruningMethod

from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.problem.validation import (
    check_choice,
    check_data,
    check_finite_or_forbidden,
    check_lengths,
    check_number,
    check_positive_int,
    check_tensor,
)
from flash_semicrf.streaming.dispatch import BACKENDS

__all__ = [
    "backend_name",
    "blank_padding",
    "cast",
    "check_numbers",
    "check_traceback_length",
    "full_precision",
    "project",
    "update_pruned",
]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def backend_name(backend: str) -> str:
    """Name of a backend, checked; "streaming" is an alias of "auto"."""
    check_choice("backend", backend, ("auto", "streaming", *BACKENDS, *EDGE_BACKENDS))
    return "auto" if backend == "streaming" else backend


def full_precision(hidden_states: Tensor) -> torch.autocast:
    """Context without autocast; TypeError or ValueError unless given a tensor with data."""
    check_tensor("hidden_states", hidden_states)
    check_data("hidden_states", hidden_states)
    return torch.autocast(hidden_states.device.type, enabled=False)


def blank_padding(hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) of checked values, with zeros as padding, and their lengths.

    Returns
    -------
    hidden : Tensor of shape (B, T, D)
    lengths : int64 Tensor of shape (B,)
        On the device of the hidden states.

    Raises
    ------
    TypeError, ValueError
        If a length is not in 1..T, or a hidden state is NaN or too large.
    """
    batch_size, num_positions, _ = hidden.shape
    lengths = check_lengths(lengths, batch_size, num_positions).to(hidden.device)
    padding = torch.arange(num_positions, device=hidden.device) >= lengths[:, None]
    if bool(padding.any()):
        # A NaN there would reach the projection's gradient as 0 * NaN.
        hidden = hidden.masked_fill(padding[..., None], 0.0)
    check_finite_or_forbidden("hidden_states", hidden)
    return hidden, lengths


def project(projection: nn.Module, name: str, hidden: Tensor, channels: int) -> Tensor:
    """Call a projection, with floating parameters and buffers in the dtype of its input.

    Parameters
    ----------
    projection : nn.Module
        From (B, T, D) to (B, T, channels).
    name : str
        Name of the projection in error messages.
    hidden : Tensor of shape (B, T, D)
    channels : int

    Returns
    -------
    Tensor of shape (B, T, channels)
        In float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If the module returns something else.
    """
    values = itertools.chain(projection.named_parameters(), projection.named_buffers())
    cast_values = {
        key: value.to(hidden.dtype)
        for key, value in values
        if value.dtype in _FLOATING and value.dtype != hidden.dtype
    }
    # The module is called in either case: its hooks, adapters and parametrizations take part.
    scores = functional_call(projection, cast_values, hidden) if cast_values else projection(hidden)
    wanted = f"a floating Tensor of shape {(*hidden.shape[:2], channels)}"
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"`{name}` must return {wanted}; got {got}.")
    if tuple(scores.shape) != (*hidden.shape[:2], channels):
        raise ValueError(f"`{name}` must return {wanted}; got {tuple(scores.shape)}.")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def update_pruned(module: nn.Module) -> None:
    """Recompute a module's own parameters that are pruned by `torch.nn.utils.prune`.

    PyTorch recomputes them in a hook that runs before ``forward`` but before no other method.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            hook(module, ())


def cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Values in another dtype, or None."""
    return None if values is None else values.to(dtype)


def check_numbers(init_scale: float, edge_memory_threshold: float, num_warps: int) -> None:
    """Raise ValueError for a number that the head does not accept."""
    check_number("init_scale", init_scale, zero=True)
    check_number("edge_memory_threshold", edge_memory_threshold, infinite=True)
    check_positive_int("num_warps", num_warps)


def check_traceback_length(limit: int | None, lengths: Tensor) -> None:
    """Raise ValueError for a sequence longer than the limit, if there is one."""
    if limit is None:
        return
    limit = check_positive_int("max_traceback_length", limit, 2**63 - 1)
    if int(lengths.max()) <= limit:
        return
    index = int(lengths.argmax())
    raise ValueError(
        f"`lengths` must be <= max_traceback_length={limit}; got {int(lengths[index])} at index "
        f"{index}."
    )

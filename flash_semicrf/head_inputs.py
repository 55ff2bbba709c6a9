"""What `flash_semicrf.nn.SemiMarkovCRFHead` checks and casts before it computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.validation import check_choice

__all__ = [
    "backend_name",
    "cast",
    "check_numbers",
    "check_traceback_length",
    "full_precision",
    "linear",
]


def backend_name(backend: str, use_triton: bool) -> str:
    """Return the name that `flash_semicrf.streaming` knows a choice by, or say what is absent."""
    check_choice("backend", backend, ("auto", "streaming", *BACKENDS, *EDGE_BACKENDS))
    if backend == "triton" and not use_triton:
        raise ValueError("`backend`='triton' contradicts `use_triton`=False.")
    return "auto" if backend == "streaming" else backend


def full_precision(hidden_states: Tensor) -> torch.autocast:
    """Switch autocast off, and refuse what is not a tensor before anything asks its device."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"`hidden_states` must be a Tensor; got {type(hidden_states).__name__}.")
    return torch.autocast(hidden_states.device.type, enabled=False)


def linear(projection: nn.Linear, hidden: Tensor) -> Tensor:
    dtype = hidden.dtype
    return F.linear(hidden, projection.weight.to(dtype), projection.bias.to(dtype))


def cast(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype)


def check_numbers(init_scale: float, edge_memory_threshold: float, num_warps: int) -> None:
    if not 0 <= init_scale < float("inf"):
        raise ValueError(f"`init_scale` must be finite and >= 0; got {init_scale}.")
    if not edge_memory_threshold > 0:
        raise ValueError(f"`edge_memory_threshold` must be > 0; got {edge_memory_threshold}.")
    if num_warps not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"`num_warps` must be 1, 2, 4, 8, 16 or 32; got {num_warps}.")


def check_traceback_length(limit: int | None, lengths: Tensor) -> None:
    if limit is None or int(lengths.max()) <= limit:
        return
    index = int(lengths.argmax())
    raise ValueError(
        f"`lengths` must be <= max_traceback_length={limit}; got {int(lengths[index])} at index "
        f"{index}."
    )

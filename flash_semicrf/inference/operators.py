"""Operators of PyTorch that run the kernels inside compiled and exported models.

``torch.ops.flash_semicrf``:

    log_partition                   log Z (B,)
    log_partition_with_gradients    log Z and the gradients that its backward pass scales
    viterbi                         best scores (B,), labels (B, T) and durations (B, T)

`torch.compile` and `torch.export` call an operator's "fake" to learn the shapes of its results, and
leave a call of the operator in the program that they build. Whatever depends on values happens
inside, when the program runs: the choice of a backend, and the check of the values, with the
messages that the library gives elsewhere.

Outside of traces, `flash_semicrf.log_partition` and the others do not come here: an operator's way
through the dispatcher of PyTorch takes longer than a small problem's other Python code, see
`flash_semicrf.inference.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_semicrf.inference.autograd import ONCE_ONLY, named, once, scaled_by_torch
from flash_semicrf.inference.viterbi import viterbi_of_checked
from flash_semicrf.problem.dense import table_to_dense
from flash_semicrf.problem.potentials import BY_SEQUENCE, NAMES, Potentials, accumulator_dtype
from flash_semicrf.problem.validation import (
    check_choice,
    check_form,
    check_no_transform,
    check_potentials,
)
from flash_semicrf.streaming.dispatch import BACKENDS, choose

__all__ = [
    "PARAMETERS",
    "TAGS",
    "best_labels",
    "log_partition",
    "log_partition_with_gradients",
    "traced_log_partition",
    "traced_viterbi",
]

Value = TypeVar("Value")

_REQUIRED = ("scores", "transition", "duration_bias")

PARAMETERS = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in NAMES)
"""Parameters of a problem in the schema of an operator, in the order of `NAMES`."""

TAGS = (torch.Tag.cudagraph_unsafe,)
"""Of every operator: it reads values on the host, which a CUDA graph cannot contain."""


def traced_log_partition(potentials: Potentials, backend: str) -> Tensor:
    """`flash_semicrf.log_partition` in a model that is being compiled or exported.

    Parameters
    ----------
    potentials : Potentials
    backend : str

    Returns
    -------
    float64 Tensor of shape (B,)

    Raises
    ------
    TypeError, ValueError
        While tracing, if the form of an argument is invalid; when the program runs, if a value is.
    """
    values = _values(potentials, backend)
    p = potentials
    wanted = [value is not None and value.requires_grad for value in values]
    if torch.is_grad_enabled() and any(wanted):
        log_z, _ = log_partition_with_gradients(backend, p.lengths, wanted, *values)
    else:
        log_z = log_partition(backend, p.lengths, *values)
    checked: Tensor = log_z
    return checked


def traced_viterbi(potentials: Potentials, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_semicrf.viterbi_labels` in a model that is being compiled or exported.

    Parameters and errors are those of `traced_log_partition`.

    Returns
    -------
    scores : float64 Tensor of shape (B,)
    labels, durations : int64 Tensor of shape (B, T)
    """
    # Not by no_grad: an exported program that raises an error inside leaves gradients disabled.
    values = [None if v is None else v.detach() for v in _values(potentials, backend)]
    scores, labels, durations = best_labels(backend, potentials.lengths, *values)
    return scores, labels, durations


def _values(potentials: Potentials, backend: str) -> list[Tensor | None]:
    """Parameters of a problem of checked form, in the order of `NAMES`."""
    check_no_transform()
    check_choice("backend", backend, ("auto", *BACKENDS))
    check_form(potentials)
    return [getattr(potentials, name) for name in NAMES]


@torch.library.custom_op(
    "flash_semicrf::log_partition",
    mutates_args=(),
    tags=TAGS,
    schema=f"(str backend, Tensor lengths, {PARAMETERS}) -> Tensor",
)
def log_partition(backend: str, lengths: Tensor, *parameters: Tensor | None) -> Tensor:
    """Log Z (B,) of a problem that is checked here; not differentiable."""
    p = check_potentials(named(parameters, lengths))
    return choose(backend, p).log_partition(p)


@log_partition.register_fake
def _(backend: str, lengths: Tensor, *parameters: Tensor | None) -> Tensor:
    return _empty_log_z(named(parameters, lengths))


@torch.library.custom_op(
    "flash_semicrf::log_partition_with_gradients",
    mutates_args=(),
    tags=TAGS,
    schema=f"(str backend, Tensor lengths, bool[] wanted, {PARAMETERS}) -> (Tensor, Tensor[])",
)
def log_partition_with_gradients(
    backend: str, lengths: Tensor, wanted: Sequence[bool], *parameters: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Log Z (B,) of a problem that is checked here, and its gradient for each wanted parameter.

    The gradients are those of `flash_semicrf.streaming.dispatch.Backend.gradients`. Log Z is
    differentiable once.
    """
    given = named(parameters, lengths)
    p = check_potentials(given)
    names = _names(wanted)
    chosen = choose(backend, p)
    if chosen.name == "reference":
        log_z, found = _with_autograd(lambda: chosen.gradients(p, set(names)))
    else:
        log_z, found = chosen.gradients(p, set(names))
    gradients = [found[name].to(_gradient_dtype(given, name)) for name in names]
    return log_z, [_own(gradient) for gradient in gradients]


@log_partition_with_gradients.register_fake
def _(
    backend: str, lengths: Tensor, wanted: Sequence[bool], *parameters: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    given = named(parameters, lengths)
    values = given.parameters()
    gradients = []
    for name in _names(wanted):
        each = () if name in BY_SEQUENCE else (given.batch_size,)
        shape = (*each, *values[name].shape)
        gradients.append(given.scores.new_empty(shape, dtype=_gradient_dtype(given, name)))
    return _empty_log_z(given), gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    _, _, wanted, *parameters = inputs
    ctx.mark_non_differentiable(*output[1])
    ctx.wanted = list(wanted)
    ctx.dtypes = [None if value is None else value.dtype for value in parameters]
    ctx.save_for_backward(output[0], *output[1])


def _backward(ctx: Any, upstream: Tensor, _: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    log_z, *gradients = ctx.saved_tensors
    found: list[Tensor | None] = [None] * len(NAMES)
    wanted = [i for i, needed in enumerate(ctx.wanted) if needed]
    for i, gradient in zip(wanted, gradients, strict=True):
        by_position = NAMES[i] in BY_SEQUENCE
        scaled = scaled_by_torch(gradient, upstream.to(gradient.dtype), by_position)
        scaled = scaled.to(ctx.dtypes[i])
        found[i] = once(scaled, log_z, ONCE_ONLY) if torch.is_grad_enabled() else scaled
    return (None, None, None, *found)


log_partition_with_gradients.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "flash_semicrf::viterbi",
    mutates_args=(),
    tags=TAGS,
    schema=f"(str backend, Tensor lengths, {PARAMETERS}) -> (Tensor, Tensor, Tensor)",
)
def best_labels(
    backend: str, lengths: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scores (B,), labels and durations (B, T) of a problem that is checked here."""
    p = check_potentials(named(parameters, lengths))
    scores, table = viterbi_of_checked(p, backend)
    return scores, *table_to_dense(table, p.batch_size, p.num_positions)


@best_labels.register_fake
def _(backend: str, lengths: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    p = named(parameters, lengths)
    labels, durations = (
        p.scores.new_empty((p.batch_size, p.num_positions), dtype=torch.int64) for _ in range(2)
    )
    return _empty_log_z(p), labels, durations


def _names(wanted: Sequence[bool]) -> list[str]:
    return [name for name, needed in zip(NAMES, wanted, strict=True) if needed]


def _empty_log_z(p: Potentials) -> Tensor:
    return p.scores.new_empty((p.batch_size,), dtype=accumulator_dtype(p.device))


def _gradient_dtype(p: Potentials, name: str) -> torch.dtype:
    """Dtype of a gradient before it is scaled, and summed over sequences if it is shared."""
    if name not in BY_SEQUENCE:
        return accumulator_dtype(p.device)
    return torch.promote_types(p.parameters()[name].dtype, torch.float32)


def _own(value: Tensor) -> Tensor:
    """A contiguous tensor with a storage of its own: results of operators must not share one."""
    if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _with_autograd(call: Callable[[], Value]) -> Value:
    """Result of a call that needs autograd, which PyTorch switches off inside an operator.

    It does so for the thread, so the call is made in another one.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()

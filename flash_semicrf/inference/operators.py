"""Log Z and its gradient as operators of PyTorch, for eager code and for compiled models.

``torch.ops.flash_semicrf``:

    log_partition                   log Z (B,), a node of the autograd graph
    log_partition_with_gradients    log Z and its gradient for each sequence
    scaled_gradients                gradients of a weighted sum of log Z

The gradient of log Z costs little once the messages exist, and takes less memory than they do.
Therefore it is computed in the forward pass, if any parameter requires it, and scaled in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_semicrf.inference.autograd import apply, needs_graph_of, once, scaled_gradient
from flash_semicrf.inference.library import (
    PARAMETERS,
    named,
    operator,
    own,
    values_of,
)
from flash_semicrf.problem.flags import poisoned, poisoned_gradient
from flash_semicrf.problem.potentials import BY_POSITION, NAMES, Potentials, accumulator_dtype
from flash_semicrf.problem.validation import check_potentials
from flash_semicrf.streaming.dispatch import Backend, choose, chosen_as
from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = [
    "ONCE_ONLY",
    "LogPartition",
    "differentiable_log_partition",
    "gradients_by_name",
    "log_partition",
    "log_partition_with_gradients",
    "scaled_gradients",
]

Value = TypeVar("Value")

_TRITON = TritonBackend()

_GIVEN = "str backend, bool checked, float[] known, Tensor lengths, Tensor? bad"
"""With `checked` the problem is so, with what is `known` of its scores, `bad` flags its sequences,
and `backend` is the name of what `choose` has returned for it. Otherwise, in compiled programs, the
operator checks and chooses."""

ONCE_ONLY = (
    'log_partition() is differentiable once by this backend; pass backend="reference" for second '
    "derivatives."
)


def _problem_of(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    parameters: Sequence[Tensor | None],
) -> tuple[Potentials, Backend]:
    """Problem and backend from the arguments of an operator."""
    p = named(parameters, lengths)
    if checked:
        return p.with_known_range(known), chosen_as(backend, p)
    p = check_potentials(p)
    return p, choose(backend, p)


def gradients_by_name(
    given: Potentials, backend: str, checked: bool, bad: Tensor | None, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Results of `log_partition_with_gradients` for parameters given by name."""
    wanted = [name in names for name in NAMES]
    rest = (given.known_range(), given.lengths, bad, wanted, *values_of(given))
    log_z, found = log_partition_with_gradients(backend, checked, *rest)
    return log_z, dict(zip(_names(wanted), found, strict=True))


def _log_partition(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    *parameters: Tensor | None,
) -> Tensor:
    p, chosen = _problem_of(backend, checked, known, lengths, parameters)
    log_z = poisoned(chosen.log_partition(p), bad)
    return log_z if checked else own(log_z)


def _fake_log_partition(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    *parameters: Tensor | None,
) -> Tensor:
    return _empty_log_z(parameters)


def differentiable_log_partition(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    *parameters: Tensor | None,
) -> Tensor:
    """`log_partition`, as autograd sees it.

    Eager code calls this function itself: the operator, through which traces come here, would take
    one more turn through the dispatcher.
    """
    log_z: Tensor
    if needs_graph_of(*parameters):
        log_z = apply(LogPartition, backend, checked, known, lengths, bad, *parameters)
    else:
        log_z, _ = log_partition_with_gradients(
            backend, checked, known, lengths, bad, _NOTHING, *parameters
        )
    return log_z


_NOTHING = (False,) * len(NAMES)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _log_partition_with_gradients(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    wanted: Sequence[bool],
    *parameters: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    if True not in wanted:
        return _log_partition(backend, checked, known, lengths, bad, *parameters), []
    p, chosen = _problem_of(backend, checked, known, lengths, parameters)
    names = _names(wanted)
    if chosen.name == "reference":
        log_z, found = _with_autograd(lambda: chosen.gradients(p, set(names)))
    else:
        log_z, found = chosen.gradients(p, set(names))
    log_z = poisoned(log_z, bad)
    gradients = [found[name].to(_gradient_dtype(p.scores, name)) for name in names]
    if checked:
        return log_z, gradients
    return own(log_z), [own(gradient) for gradient in gradients]


def _fake_log_partition_with_gradients(
    backend: str,
    checked: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    wanted: Sequence[bool],
    *parameters: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    p = named(parameters, lengths)
    given = p.parameters()
    gradients = []
    for name in _names(wanted):
        by_position = name in BY_POSITION
        # Those of starts and ends may be asked for without being given.
        shape = p.scores.shape if by_position else (p.batch_size, *given[name].shape)
        gradients.append(p.scores.new_empty(shape, dtype=_gradient_dtype(p.scores, name)))
    return _empty_log_z(parameters), gradients


def _scaled_gradients(
    backend: str,
    upstream: Tensor,
    bad: Tensor | None,
    wanted: Sequence[bool],
    gradients: list[Tensor],
    dtypes: Sequence[int],
) -> list[Tensor]:
    names = _names(wanted)
    into = [_DTYPES[i] for i in dtypes]
    if _TRITON.scales(backend, upstream.device):
        given = dict(zip(names, gradients, strict=True))
        found = _TRITON.scaled(given, upstream, bad, dict(zip(names, into, strict=True)))
        return [found[name] for name in names]
    weight = poisoned_gradient(upstream, bad)
    return [
        scaled_gradient(gradient, weight.to(gradient.dtype), name in BY_POSITION).to(dtype)
        for name, gradient, dtype in zip(names, gradients, into, strict=True)
    ]


def _fake_scaled_gradients(
    backend: str,
    upstream: Tensor,
    bad: Tensor | None,
    wanted: Sequence[bool],
    gradients: list[Tensor],
    dtypes: Sequence[int],
) -> list[Tensor]:
    found = []
    for name, gradient, dtype in zip(_names(wanted), gradients, dtypes, strict=True):
        shape = gradient.shape if name in BY_POSITION else gradient.shape[1:]
        found.append(gradient.new_empty(shape, dtype=_DTYPES[dtype]))
    return found


log_partition_with_gradients = operator(
    f"log_partition_with_gradients({_GIVEN}, bool[] wanted, {PARAMETERS}) -> (Tensor, Tensor[])",
    _log_partition_with_gradients,
    _fake_log_partition_with_gradients,
)
"""Log Z (B,), and of the wanted parameters the gradients of a backend for each sequence."""

scaled_gradients = operator(
    "scaled_gradients(str backend, Tensor upstream, Tensor? bad, bool[] wanted, "
    "Tensor[] gradients, int[] dtypes) -> Tensor[]",
    _scaled_gradients,
    _fake_scaled_gradients,
)
"""Gradients of the sum of log Z weighted by `upstream`, in dtypes given by their places in
`_DTYPES`: tools that check schemas take no list of dtypes."""

log_partition = operator(
    f"log_partition({_GIVEN}, {PARAMETERS}) -> Tensor",
    _log_partition,
    _fake_log_partition,
    differentiable_log_partition,
)
"""Log Z (B,), NaN for bad sequences; differentiable once in every parameter."""


class LogPartition(torch.autograd.Function):
    """What `log_partition` is to autograd; call it with the operator's arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        checked: bool,
        known: Sequence[float],
        lengths: Tensor,
        bad: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        """Log Z, and the gradients that the backward pass needs."""
        wanted = ctx.needs_input_grad[5:]
        log_z: Tensor
        log_z, gradients = log_partition_with_gradients(
            backend, checked, known, lengths, bad, wanted, *parameters
        )
        ctx.backend, ctx.wanted = backend, wanted
        ctx.dtypes = [
            _DTYPES.index(value.dtype)
            for value, needed in zip(parameters, wanted, strict=True)
            if needed and value is not None
        ]
        ctx.save_for_backward(log_z, bad, *gradients)
        return log_z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale each sequence's gradient; sum those of shared parameters over the batch."""
        log_z, bad, *gradients = ctx.saved_tensors
        given = (bad, ctx.wanted, gradients, ctx.dtypes)
        is_graph = torch.is_grad_enabled()  # create_graph=True
        weight = upstream.detach() if is_graph else upstream
        found = scaled_gradients(ctx.backend, weight, *given)
        if is_graph:
            found = [once(gradient, log_z, ONCE_ONLY) for gradient in found]
        rest = iter(found)
        each = [next(rest) if needed else None for needed in ctx.wanted]
        return (None, None, None, None, None, *each)


def _names(wanted: Sequence[bool]) -> list[str]:
    return [name for name, needed in zip(NAMES, wanted, strict=True) if needed]


def _empty_log_z(parameters: Sequence[Tensor | None]) -> Tensor:
    scores = parameters[0]
    if scores is None:
        raise ValueError("`scores` must be a Tensor; got None.")
    return scores.new_empty(scores.shape[:1], dtype=accumulator_dtype(scores.device))


def _gradient_dtype(scores: Tensor, name: str) -> torch.dtype:
    """Dtype of a gradient before it is scaled, and summed over sequences if it is shared."""
    if name not in BY_POSITION:
        return accumulator_dtype(scores.device)
    return torch.promote_types(scores.dtype, torch.float32)


def _with_autograd(call: Callable[[], Value]) -> Value:
    """Result of a call that needs autograd, which PyTorch may switch off around an operator.

    It does so for the thread, so the call is made in another one.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()

"""How operators of PyTorch are defined: the members of ``torch.ops.flash_semicrf``.

They are the way into the kernels, for eager code as for programs that `torch.compile` and
`torch.export` build. Those call an operator's "fake" to learn the shapes of its results, and leave
a call of the operator in the program. Whatever depends on values happens inside, when it runs.

The definitions are those of a `torch.library.Library`, which eager code can afford: the way through
a `torch.library.custom_op` takes longer than all other Python code of a small gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from flash_semicrf.problem.potentials import NAMES, Potentials
from flash_semicrf.problem.validation import check_choice, check_form, check_no_transform
from flash_semicrf.streaming.dispatch import BACKENDS

__all__ = [
    "PARAMETERS",
    "check_traced",
    "constants_of",
    "named",
    "operator",
    "own",
    "values_of",
]

_LIBRARY = torch.library.Library("flash_semicrf", "FRAGMENT")

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
"""Of every operator: it may read values on the host, which a CUDA graph cannot contain."""

_REQUIRED = ("scores", "transition", "duration_bias")

PARAMETERS = ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in NAMES)
"""Parameters of a problem in the schema of an operator, in the order of `NAMES`."""


def operator(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
) -> OpOverload:
    """Define an operator of ``torch.ops.flash_semicrf``.

    Parameters
    ----------
    schema : str
        Name, parameters and results.
    compute : callable
        Computes the results, without gradients.
    fake : callable
        Makes empty tensors of the results' shapes, dtypes and devices.
    differentiable : callable, optional
        Takes the place of `compute` where gradients may be asked for, and applies an autograd
        function. Without one, callers pass tensors that require no gradient.

    Returns
    -------
    OpOverload
        To be called with all arguments by position.
    """
    name = schema.partition("(")[0]
    qualified = f"flash_semicrf::{name}"
    _LIBRARY.define(schema, tags=_TAGS)
    torch.library.impl(qualified, "CompositeExplicitAutograd", compute, lib=_LIBRARY)
    if differentiable is not None:
        torch.library.impl(qualified, "Autograd", differentiable, lib=_LIBRARY)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    found: OpOverload = getattr(torch.ops.flash_semicrf, name).default
    return found


def named(values: Sequence[Tensor | None], lengths: Tensor) -> Potentials:
    """Problem from parameters in the order of `NAMES`; those at the end may be missing."""
    scores, transition, duration_bias, *optional = values
    if scores is None or transition is None or duration_bias is None:
        raise TypeError("`scores`, `transition` and `duration_bias` must be Tensors; got None.")
    return Potentials(scores, transition, duration_bias, lengths, *optional)


def values_of(potentials: Potentials) -> list[Tensor | None]:
    """Parameters of a problem in the order of `NAMES`."""
    p = potentials
    return [
        p.scores,
        p.transition,
        p.duration_bias,
        p.start_scores,
        p.end_scores,
        p.initial_scores,
        p.final_scores,
        p.duration_tail,
    ]


def constants_of(potentials: Potentials) -> list[Tensor | None]:
    """The same without gradients, also in a trace.

    Not by no_grad: an exported program that raises an error inside leaves gradients disabled.
    """
    return [None if value is None else value.detach() for value in values_of(potentials)]


def check_traced(potentials: Potentials, backend: str) -> None:
    """Check what can be checked while a model is being compiled or exported.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If a form or the name of the backend is wrong, or in a transform of `torch.func`.
    """
    check_no_transform()
    check_choice("backend", backend, ("auto", *BACKENDS))
    check_form(potentials)


def own(value: Tensor) -> Tensor:
    """A contiguous tensor with a storage of its own: results of operators must not share one."""
    if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.clone(memory_format=torch.contiguous_format)

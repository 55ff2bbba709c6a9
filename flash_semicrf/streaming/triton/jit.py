"""How the kernels are compiled and launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

__all__ = ["kernel", "launch"]

_compiled: dict[tuple, tuple] = {}


def kernel(function: Callable):
    """Compile a kernel once per choice of its constants, whatever its other arguments.

    Triton would compile again for numbers that are 1 or multiples of 16 and for pointers that are
    not aligned, and these kernels gain nothing from either. Pointers are named ``..._ptr``.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    pointers = [name for name in names if name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=pointers)


def launch(
    function, grid: tuple[int, ...], *arguments: Tensor | int, num_warps: int, **constants: int
) -> None:
    """Launch a kernel on the current device and stream.

    A launch by Triton's own call takes some 50 microseconds of Python for as many arguments as
    these kernels have. What it finds out is the same for all calls with the same dtypes and
    constants, so it is kept.
    """
    if not isinstance(function, JITFunction):  # in Triton's interpreter
        function[grid](*arguments, **constants)
        return
    dtypes = [x.dtype if isinstance(x, Tensor) else x >> 31 for x in arguments]
    key = (function, torch.cuda.current_device(), num_warps, *constants.values(), *dtypes)
    found = _compiled.get(key)
    if found is None:
        compiled = function[grid](*arguments, **constants, num_warps=num_warps)
        ordered = tuple(constants[name] for name in function.arg_names[len(arguments) :])
        _compiled[key] = (compiled, ordered)
        return
    compiled, ordered = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *ordered)

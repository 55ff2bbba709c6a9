"""How the kernels are compiled and launched.

A kernel takes tensors, whole numbers, None, and records (named tuples) of them. What is None is so
for the compiler: ``x is not None`` chooses code. Parameters in capitals are constants of the
compiler, also in the functions that kernels call, apart from the sizes C and K there; a launch
gives them by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from flash_semicrf.streaming.triton.compiler import compile_kernels
from flash_semicrf.streaming.triton.launcher import Launcher, launcher_of

__all__ = ["is_rehearsal", "launch", "launched_if_compiled", "launched_together", "signature_of"]

_T = TypeVar("_T")

_compiled: dict[tuple, Launcher] = {}

_later: dict[int, dict[tuple, tuple[ASTSource, int]]] = {}
"""By device: kernels to compile when others are."""

_this_thread = threading.local()
"""Its `missing`: kernels that have to be compiled before `launched_together` can be run."""


def launch(
    function,
    grid: tuple[int, ...],
    *arguments: Tensor | int | tuple | None,
    num_warps: int,
    form: Hashable = None,
    **constants: int,
) -> None:
    """Launch a kernel on the current device and stream.

    A kernel is compiled once per choice of its constants, dtypes and of what is None. Triton's own
    call would compile again for numbers that are 1 or multiples of 16 and for pointers that are
    not aligned, and these kernels gain nothing from either; and it takes some 50 microseconds of
    Python to find out what it knows from the call before.

    To look at every argument takes longer than to launch. A caller that knows what the dtypes, and
    what is None, depend on gives that as `form`: with the same kernel, form and constants they are
    the same, and whole numbers are below 2^31.
    """
    if not isinstance(function, JITFunction):  # in Triton's interpreter
        function.rewrite().__annotations__.update(dict.fromkeys(constants, "constexpr"))
        function[grid](*arguments, **constants)
        return
    device = torch.cuda.current_device()
    kinds = _kinds(arguments) if form is None else form
    # By the function: a kernel of Triton hashes what it was made from.
    key = (function.fn, device, num_warps, form is None, kinds, *constants.items())
    launcher = _compiled.get(key)
    missing = getattr(_this_thread, "missing", None)
    if launcher is None:
        source = ASTSource(function, *signature_of(function, arguments, constants))
        if missing is None or torch.cuda.is_current_stream_capturing():
            _compile({key: (source, num_warps)})
            launcher = _compiled[key]
        else:
            missing[key] = source, num_warps
    if launcher is not None and not missing:
        launcher(device, (*grid, 1, 1)[:3], (*arguments, *constants.values()))


def _compile(missing: dict[tuple, tuple[ASTSource, int]]) -> None:
    compiled = compile_kernels([*missing.values()])
    _compiled.update(zip(missing, map(launcher_of, compiled), strict=True))


def _launched(call: Callable[[], _T]) -> tuple[_T, dict[tuple, tuple[ASTSource, int]]]:
    """What `call` returns, and the kernels that are missing."""
    missing = _this_thread.missing = {}
    try:
        return call(), missing
    finally:
        _this_thread.missing = None


def launched_together(call: Callable[[], _T]) -> _T:
    """Run `call`, which launches kernels; those that have to be compiled are, at the same time.

    From the first such kernel on nothing is launched, and `call` is run again when all of them are
    compiled. So it may not depend on what kernels compute while `is_rehearsal`.
    """
    found, missing = _launched(call)
    if missing:
        del found  # its memory, before `call` allocates again
        later = _later.pop(torch.cuda.current_device(), {})
        _compile({**missing, **later})
        found = call()
    return found


def launched_if_compiled(call: Callable[[], _T]) -> _T | None:
    """Run `call` as `launched_together` does, or return None: kernels that have to be compiled are
    so with the next ones of `launched_together`."""
    found, missing = _launched(call)
    if not missing:
        return found
    _later.setdefault(torch.cuda.current_device(), {}).update(missing)
    return None


def is_rehearsal() -> bool:
    """Whether kernels are not launched, because `launched_together` runs again."""
    return bool(getattr(_this_thread, "missing", None))


def _kinds(arguments: tuple) -> tuple:
    """Part of the key: dtypes, widths of whole numbers, None."""
    return tuple(
        [
            x.dtype
            if isinstance(x, Tensor)
            else _kinds(x)
            if isinstance(x, tuple)
            else x and x >> 31
            for x in arguments
        ]
    )


def signature_of(
    function: JITFunction, arguments: tuple, constants: dict[str, int]
) -> tuple[dict[str, object], dict[object, object]]:
    """Types of a kernel's parameters, and the values of those that are constants, as Triton's
    compiler takes them."""
    types = [*map(_type_of, arguments), *["constexpr"] * len(constants)]
    given = dict.fromkeys(_nones(arguments))
    return dict(zip(function.arg_names, types, strict=True)), {**given, **constants}


def _type_of(x: Tensor | int | tuple | None) -> str | tuple:
    if not isinstance(x, tuple):
        return mangle_type(x)
    types = map(_type_of, x)
    return type(x)(*types) if hasattr(x, "_fields") else tuple(types)


def _nones(arguments: tuple, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Path to every argument that is None."""
    for i, x in enumerate(arguments):
        if x is None:
            yield (*path, i)
        elif isinstance(x, tuple):
            yield from _nones(x, (*path, i))

"""Functions of a duration tail that kernels call, absent from problems without one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import overload

from flash_semicrf.streaming.cpu.jit import OPTIONS

__all__ = ["nothing", "with_tail"]


def nothing(tail, *rest):
    """Empty replacement for a function of a tail: compiled to nothing."""


def with_tail(without: Callable, **options: Any) -> Callable:
    """Decorator for a function of a tail, an array (C,) or None, and of other arguments.

    Parameters
    ----------
    without : callable
        Compiled instead of the function where the tail is None; see `nothing`.
    **options
        Of `numba.njit`, in addition to `flash_semicrf.streaming.cpu.jit.OPTIONS`.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def declared(tail, *rest):
            raise NotImplementedError("only compiled code calls it")

        def choose(tail, *rest):
            return without if isinstance(tail, types.NoneType) else function

        overload(declared, jit_options={**OPTIONS, **options}, strict=False)(choose)
        return declared

    return decorate

"""How the CPU kernels are compiled.

Kernels release the GIL and are cached on disk. Where no cache folder can be written (a read-only
install without a home) they are compiled anew in each process instead of failing.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

__all__ = ["kernel"]


def kernel(function: Callable) -> Callable:
    """Compile a kernel: ``nogil``, cached where possible, multiply-adds contracted."""
    options = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "no locator available", there is nowhere to write the cache
        return njit(**options)(function)

"""How the CPU kernels are compiled.

Kernels release the GIL and are cached on disk. Two things numba does not do by itself:

- its cache looks only at the file of the kernel called, not at those of the kernels inlined into
  it:
  here the stamp of every cached kernel is a digest of all the kernels' sources;
- where no cache folder can be written (a read-only install without a home) kernels are compiled
  anew in each process instead of failing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

__all__ = ["OPTIONS", "helper", "inlined", "kernel"]


def _digest() -> str:
    """Digest of the sources of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _digest()


class _KernelCacheImpl(CompileResultCacheImpl):
    """Numba's storage of compiled functions, stamped with `_STAMP` and their own file."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        own = hashlib.sha256(Path(function.__code__.co_filename).read_bytes()).hexdigest()
        self._locator.get_source_stamp = lambda: _STAMP + own


class _KernelCache(FunctionCache):
    """A function cache that is stale as soon as any kernel's source changes."""

    _impl_class = _KernelCacheImpl


OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
"""Of every compiled function."""


def kernel(function: Callable, **options: Any) -> Callable:
    """Compile a kernel: ``nogil``, cached where possible, multiply-adds contracted.

    Parameters
    ----------
    function : callable
    **options
        Of `numba.njit`, in place of those of `OPTIONS`.
    """
    compiled = njit(**{**OPTIONS, **options})(function)
    try:
        compiled._cache = _KernelCache(function)
    except RuntimeError:  # "no locator available": there is nowhere to write the cache
        pass
    return compiled


def helper(function: Callable) -> Callable:
    """Compile a function that only kernels call: it is cached as part of them."""
    return njit(**OPTIONS)(function)


def inlined(function: Callable) -> Callable:
    """Compile a part of a kernel that is called for every position.

    A call passes every array of a NamedTuple by value, some forty words each: more than the work
    of a short loop over labels. These are always inlined.
    """
    return njit(forceinline=True, **OPTIONS)(function)

"""How the CPU kernels are compiled.

Kernels release the GIL and are cached on disk. Three things numba does not do by itself:

- its cache looks only at the file of the kernel called, not at those of the kernels inlined into
  it: here the stamp of every cached kernel is a digest of all the kernels' sources;
- where no cache folder can be written (a read-only install without a home) kernels are compiled
  anew in each process instead of failing;
- a cache file that is damaged, or that cannot be read or written any more, costs a compilation and
  one warning.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import linecache
import warnings
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

__all__ = ["OPTIONS", "helper", "inlined", "kernel"]


def _digest() -> str:
    """Digest of the sources of all kernels, wherever this package was imported from."""
    digest = hashlib.sha256()
    files = importlib.resources.files(__package__).iterdir()
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


_STAMP = _digest()


class _KernelCacheImpl(CompileResultCacheImpl):
    """Numba's storage of compiled functions, stamped with `_STAMP` and their own file."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        # Not by the file's path alone: the module may be in an archive.
        lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
        own = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._locator.get_source_stamp = lambda: _STAMP + own


class _KernelCache(FunctionCache):
    """A function cache that is stale as soon as any kernel's source changes, and may be broken."""

    _impl_class = _KernelCacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Compiled code for a signature, or None."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling something else may raise anything
            _warn_once(self.cache_path, error)
        try:
            self.flush()  # or what is compiled now could not be added to it
        except OSError:
            self.disable()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code for a signature, if possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(self.cache_path, error)
            self.disable()


_warned = False


def _warn_once(path: str, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"Compiled kernels in {path} cannot be used ({type(error).__name__}: {error}); they "
            "are compiled again. Remove the folder if this does not end by itself, or set "
            "NUMBA_CACHE_DIR to one that can be written.",
            RuntimeWarning,
            stacklevel=3,
        )


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

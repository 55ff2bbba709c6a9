"""How the CPU kernels are compiled.

A `Kernel` is a function of a queue of tasks, compiled together with its launch on several threads.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from flash_semicrf.streaming.cpu.parts import helper, owning, whole
from flash_semicrf.streaming.cpu.tasks import Queue
from flash_semicrf.streaming.cpu.team import Team, run_on_team, thread_seconds, wall_seconds

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["STAMP", "Kernel", "cache_folder", "cached", "kernel", "kernel_of_loops"]

_PARENT = __package__.rpartition(".")[0]


def _sources(folder: Traversable) -> Iterator[bytes]:
    """The files of a package and those below it, in the order of their names."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".py"):
            yield entry.read_bytes()
        elif entry.is_dir() and entry.name != "__pycache__":
            yield from _sources(entry)


def _digest() -> str:
    """Digest of the sources of all kernels, wherever this package was imported from."""
    digest = hashlib.sha256()
    # `streams.py` beside the package is compiled into them too.
    digest.update(importlib.resources.files(_PARENT).joinpath("streams.py").read_bytes())
    for source in _sources(importlib.resources.files(__package__)):
        digest.update(source)
    return digest.hexdigest()


STAMP = _digest()
"""Taken when this module is imported, not at a later compilation: by then an update may have
replaced the files, and kernels of the old ones must not be cached under the new ones' name."""


class _KernelCacheImpl(CompileResultCacheImpl):
    """Numba's storage of compiled functions, stamped with `STAMP` and their own file."""

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        # Not by the file's path alone: the module may be in an archive.
        lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
        own = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._locator.get_source_stamp = lambda: STAMP + own


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


def cached(compiled: Callable, function: Callable) -> Callable:
    """A compiled function, cached under the name of `function`, where a cache can be written."""
    try:
        compiled._cache = _KernelCache(function)
    except RuntimeError:  # "no locator available": there is nowhere to write the cache
        pass
    return compiled


def cache_folder() -> Path | None:
    """Folder below which kernels are cached; None where none can be written."""
    for locator_class in CompileResultCacheImpl._locator_classes:
        locator = locator_class.from_function(cache_folder, __file__)
        if locator is not None:
            # One folder for each folder of sources, or that beside them.
            return Path(config.CACHE_DIR or Path(locator.get_cache_path()).parent)
    return None


class Kernel:
    """A compiled function ``(queue, *arguments)`` that does the tasks of a queue.

    Parameters
    ----------
    function : callable
    scalar_loops : bool
        Whether LLVM makes vectors of loops and unrolls them: where these do much of the work,
        instead of the vectors of `flash_semicrf.streaming.cpu.vector`.
    **options
        Of `numba.njit`, in place of those of all kernels.
    """

    def __init__(self, function: Callable, scalar_loops: bool = False, **options: Any) -> None:
        body = owning(function, **options)

        @helper
        def work(thread, team, counter, tasks, used, arguments):
            begin = thread_seconds(team)
            body(Queue(counter, tasks), *arguments)
            used[thread, 0] = thread_seconds(team) - begin

        def launch(team, num_threads, counter, tasks, used, elapsed, arguments):
            begin = wall_seconds(team)
            given = (team, counter, tasks, used, arguments)
            failed = run_on_team(team, num_threads, work, given)
            elapsed[0] = wall_seconds(team) - begin
            return failed

        launch.__qualname__ = f"{function.__module__}.{function.__qualname__}"
        self.__doc__ = function.__doc__
        self._launch = cached(whole(launch, scalar_loops), function)

    @property
    def signatures(self) -> list:
        """Types of arguments that this process has compiled the kernel for, or loaded it."""
        return self._launch.signatures

    def launch(
        self, team: Team, num_threads: int, counter: np.ndarray, tasks: np.ndarray, arguments: tuple
    ) -> tuple[float, float]:
        """Do all tasks.

        Parameters
        ----------
        team : Team
        num_threads : int
        counter : int64 array of shape (1,)
            Tasks taken so far; launches in several threads may share it.
        tasks : int64 array of shape (N,)
        arguments : tuple

        Returns
        -------
        used, elapsed : float
            Seconds of processor time that the tasks took, in all threads together, and seconds
            until the last one was done; zeros without a team.
        """
        used, elapsed = np.zeros((num_threads, _LINE)), np.zeros(1)
        if self._launch(team, num_threads, counter, tasks, used, elapsed, arguments):
            raise MemoryError("A kernel of flash_semicrf could not allocate its workspace.")
        return used[:, 0].sum(), elapsed[0]


_LINE = 16
"""Float64 values between those of two threads: no cache line is shared."""


def kernel(function: Callable) -> Kernel:
    """Compile a kernel: ``nogil``, cached where possible, multiply-adds contracted."""
    return Kernel(function)


def kernel_of_loops(function: Callable, **options: Any) -> Kernel:
    """Compile a kernel with `Kernel`'s `scalar_loops`."""
    return Kernel(function, scalar_loops=True, **options)

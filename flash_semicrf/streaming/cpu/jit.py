"""How the CPU kernels are compiled.

A `Kernel` is a function of a queue of tasks, compiled together with its launch on several threads.
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

import numpy as np
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from flash_semicrf.streaming.cpu.tasks import Queue
from flash_semicrf.streaming.cpu.team import Team, run_on_team, seconds

__all__ = ["OPTIONS", "Kernel", "helper", "inlined", "kernel"]


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


class Kernel:
    """A compiled function ``(queue, *arguments)`` that does the tasks of a queue.

    Parameters
    ----------
    function : callable
    **options
        Of `numba.njit`, in place of those of `OPTIONS`.
    """

    def __init__(self, function: Callable, **options: Any) -> None:
        body = njit(**{**OPTIONS, **options})(function)

        @njit(**OPTIONS)
        def work(thread, clock, counter, tasks, costs, done, finished, arguments):
            body(Queue(counter, tasks, costs, done[thread]), *arguments)
            if clock != 0 and thread == 0:
                finished[0] = seconds(clock)

        @njit(**OPTIONS)
        def launch(team, num_threads, counter, tasks, costs, done, times, arguments):
            if team.clock != 0:
                times[0] = seconds(team.clock)
            given = (team.clock, counter, tasks, costs, done, times[1:], arguments)
            failed = run_on_team(team, num_threads, work, given)
            if team.clock != 0:
                times[2] = seconds(team.clock)
            return failed

        self.__doc__ = function.__doc__
        self._launch = launch
        try:
            launch._cache = _KernelCache(function)
        except RuntimeError:  # "no locator available": there is nowhere to write the cache
            pass

    def launch(
        self,
        team: Team,
        num_threads: int,
        counter: np.ndarray,
        tasks: np.ndarray,
        costs: np.ndarray,
        arguments: tuple,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Do all tasks.

        Parameters
        ----------
        team : Team
        num_threads : int
        counter : int64 array of shape (1,)
            Tasks taken so far; launches in several threads may share it.
        tasks : int64 array of shape (N,)
        costs : float64 array of shape (N,)
        arguments : tuple

        Returns
        -------
        done : float64 array of shape (num_threads,)
            Cost of what each thread has done.
        times : float64 array of shape (3,)
            Seconds at the start, when this thread had no more to do, and when all were done; zeros
            without a team.
        """
        done, times = np.zeros((num_threads, _LINE)), np.zeros(3)
        if self._launch(team, num_threads, counter, tasks, costs, done, times, arguments):
            raise MemoryError("A kernel of flash_semicrf could not allocate its workspace.")
        return done[:, 0], times


_LINE = 16
"""Float64 values between those of two threads: no cache line is shared."""


def kernel(function: Callable, **options: Any) -> Kernel:
    """Compile a kernel: ``nogil``, cached where possible, multiply-adds contracted."""
    return Kernel(function, **options)


def helper(function: Callable) -> Callable:
    """Compile a function that only kernels call: it is cached as part of them."""
    return njit(**OPTIONS)(function)


def inlined(function: Callable) -> Callable:
    """Compile a part of a kernel that is called for every position.

    A call passes every array of a NamedTuple by value, some forty words each: more than the work
    of a short loop over labels. These are always inlined.
    """
    return njit(forceinline=True, **OPTIONS)(function)

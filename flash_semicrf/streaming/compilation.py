"""Compilation of kernels, as users notice it: said in the log, told to whoever watches.

Both backends compile a kernel when it is first used, and keep it on disk. `compiling` goes around
each compilation.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

__all__ = ["Compiled", "compiling", "told", "watched"]

_LOG = logging.getLogger("flash_semicrf")

PATIENCE = 1.0
"""Seconds that a compilation may take before anything is said."""

_said: set[str] = set()
_tell: list[Callable[[str], object]] = []
_watchers: list[Callable[[Compiled], object]] = []


class Compiled(NamedTuple):
    """One compilation that is over.

    Attributes
    ----------
    kernel : str
    device : {"CPU", "GPU"}
    cpu_seconds : float
        Processor time of the whole process meanwhile.
    seconds : float
    """

    kernel: str
    device: str
    cpu_seconds: float
    seconds: float


@contextlib.contextmanager
def compiling(kernel: str, device: str) -> Iterator[None]:
    """Around the compilation of a kernel.

    If it takes more than `PATIENCE`, one line is logged (INFO, of the logger "flash_semicrf"), and
    given to the functions of `told`; once per process and device.

    Parameters
    ----------
    kernel : str
    device : {"CPU", "GPU"}
    """
    timer = threading.Timer(PATIENCE, _say, (device,))
    timer.daemon = True
    if device not in _said:
        timer.start()
    # Compilers make many objects and few circles: looking for these takes an eighth of the time.
    collects = gc.isenabled()
    gc.disable()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        timer.cancel()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    for watcher in _watchers:
        watcher(Compiled(kernel, device, cpu_seconds, seconds))


def _say(device: str) -> None:
    if device in _said:
        return
    _said.add(device)
    text = (
        f"flash_semicrf compiles its {device} kernels: some seconds for each operation, when it is "
        "first used on this machine. `python -m flash_semicrf.compile` does so beforehand."
    )
    _LOG.info(text)
    for tell in _tell:
        tell(text)


@contextlib.contextmanager
def told(tell: Callable[[str], object] | None) -> Iterator[None]:
    """Give the line about a compilation to a function too, as `print`, or to none."""
    added = [] if tell is None else [tell]
    _tell.extend(added)
    try:
        yield
    finally:
        for each in added:
            _tell.remove(each)


@contextlib.contextmanager
def watched(watcher: Callable[[Compiled], object]) -> Iterator[None]:
    """Call a function with each compilation that is over."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)

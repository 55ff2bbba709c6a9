"""Time and peak memory of one call. Standard library only: a copy runs beside the peers, too."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW_SECONDS = 5.0
"""A call that takes longer counts from its first time on, and is repeated less."""

MIN_REPEATS = 3
"""Of a call that is not slow; a slow one is repeated at most as often."""

SLOW_BUDGET_FACTOR = 4


def _status_bytes(key: str) -> int | None:
    """Read a memory entry of the process (VmRSS, VmHWM) where the system has it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _maxrss_bytes() -> int | None:
    """High-water mark since the process began, for systems without /proc."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _return_free_memory() -> None:
    """Give freed heap back to the system (glibc), so that using it again is seen."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library: what it keeps is missing from the peak


class PeakMemory:
    """Peak resident bytes inside a ``with`` block, less those resident when it began.

    On Linux the kernel's high-water mark is reset at the start, so that what imports and the
    making of inputs held for a moment is not counted (and `ru_maxrss` of a child can begin at
    that of its parent). Elsewhere the mark is monotone and the result a lower bound.
    """

    extra: int | None = None

    def __enter__(self) -> PeakMemory:
        _return_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before, self._peak = _status_bytes("VmRSS"), lambda: _status_bytes("VmHWM")
        except OSError:
            self._before, self._peak = _maxrss_bytes(), _maxrss_bytes
        return self

    def __exit__(self, *exc: object) -> None:
        peak = self._peak()
        if peak is not None and self._before is not None:
            self.extra = max(0, peak - self._before)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def measure(
    call: Callable[[], Any], warm_up: Callable[[], Any], *, budget_seconds: float, max_repeats: int
) -> tuple[dict[str, Any], Any]:
    """Warm up, take the peak memory of one call, then time repeats of it.

    Parameters
    ----------
    call : callable
        The job on the whole inputs.
    warm_up : callable
        The same job on tiny inputs: compiles what is compiled, so that no compiler's memory counts.
    budget_seconds : float
        Repeats stop once they have taken this long together.
    max_repeats : int

    Returns
    -------
    record : dict
        "repeats", "median_s", "iqr_s", "min_s", "peak_bytes".
    result : object
        What the first call returned.
    """
    warm_up()
    with PeakMemory() as memory:
        first, result = _timed(call)
    if first > SLOW_SECONDS:
        samples, fewest, most = [first], 1, MIN_REPEATS
        budget_seconds *= SLOW_BUDGET_FACTOR
    else:
        samples, fewest, most = [], MIN_REPEATS, max_repeats
    while len(samples) < fewest or (len(samples) < most and sum(samples) < budget_seconds):
        samples.append(_timed(call)[0])
    quartiles = (
        statistics.quantiles(samples, n=4, method="inclusive")
        if len(samples) > 1
        else [samples[0]] * 3
    )
    return {
        "repeats": len(samples),
        "median_s": statistics.median(samples),
        "iqr_s": quartiles[2] - quartiles[0],
        "min_s": min(samples),
        "peak_bytes": memory.extra,
    }, result

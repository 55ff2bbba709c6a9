"""Threads for the kernels: torch's own, as many as the work pays for.

Kernels run on torch's OpenMP team (`flash_semicrf.streaming.cpu.team`) or, where there is none, on
a pool of Python threads; a thread takes the next task when it is done with one. A launch that took
longer than its tasks do in one thread, as when another process keeps a core busy and the last task
waits for it, is followed by a period of launches in one thread, 20 times as long as what was lost,
and twice as long as the one before if that was such a launch, too.

A forked child has neither the team nor the pool of its parent: it starts with one thread, by
`flash_semicrf.forking`, and with more it uses a pool of its own.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from flash_semicrf.streaming.cpu.jit import Kernel
from flash_semicrf.streaming.cpu.team import NO_TEAM, Team, find_team

__all__ = ["position_cost", "run"]

_SMALL = 300_000.0
"""Cost that is not worth a second thread: about 25 microseconds. See `position_cost`."""

_PATIENCE = 20.0
"""Seconds in one thread after a launch on several that lost one."""

_LONGEST = 0.25
"""Longest period in one thread, in seconds, where `_PATIENCE` gives less after losses in a row."""


def position_cost(max_duration: int, num_labels: int) -> float:
    """Cost of a position in a pass, in multiply-adds: some 13 of them take a nanosecond."""
    return num_labels * (max_duration + num_labels + 50) + 1500.0


class _State:
    """State that launches leave for later ones."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0  # launches under way in this process
        self.alone_until = 0.0  # time.monotonic()
        self.alone_for = 0.0  # seconds, by the latest launch on several threads
        self.forked = False
        self.executor: ThreadPoolExecutor | None = None
        self.executor_size = 0


_state = _State()


def _after_fork() -> None:
    """Start a child afresh: the threads of its parent do not live on in it."""
    global _state
    _state = _State()
    _state.forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _team() -> Team:
    return find_team()


def run(
    kernel: Kernel, tasks: np.ndarray, costs: np.ndarray, arguments: tuple, threads: int = 0
) -> None:
    """Do the tasks of a kernel, the costliest first.

    Parameters
    ----------
    kernel : Kernel
    tasks : int64 array of shape (N,)
    costs : array of shape (N,)
        In the unit of `position_cost`.
    arguments : tuple
        Arguments of the kernel after the queue.
    threads : int
        How many to use, whatever the work; by default `torch.get_num_threads()` at most.
    """
    if len(tasks) == 0:
        return
    costs = np.asarray(costs, dtype=np.float64)
    state = _state
    with state.lock:
        state.running += 1
    try:
        count = threads or _worthwhile(state, costs)
        if count == 1:
            kernel.launch(NO_TEAM, 1, np.zeros(1, np.int64), tasks, arguments)
            return
        tasks = np.ascontiguousarray(tasks[np.argsort(-costs, kind="stable")])
        team = NO_TEAM if state.forked else _team()
        if team.entry:
            counter = np.zeros(1, np.int64)
            _learn(state, *kernel.launch(team, count, counter, tasks, arguments))
        else:
            _run_in_python_threads(state, kernel, count, tasks, arguments)
    finally:
        with state.lock:
            state.running -= 1


def _worthwhile(state: _State, costs: np.ndarray) -> int:
    """Number of threads for tasks of some costs."""
    if len(costs) == 1 or costs.sum() < _SMALL or time.monotonic() < state.alone_until:
        return 1
    # Callers in several Python threads share the cores. Each has an OpenMP team of its own.
    return max(1, torch.get_num_threads() // max(1, state.running))


def _learn(state: _State, used: float, elapsed: float) -> None:
    """Compare the time of a launch with the processor time that one thread would have needed."""
    if elapsed <= used:
        state.alone_for = 0.0
        return
    state.alone_for = max(_PATIENCE * (elapsed - used), min(2 * state.alone_for, _LONGEST))
    state.alone_until = time.monotonic() + state.alone_for


def _executor(state: _State, size: int) -> ThreadPoolExecutor:
    """The one pool of Python threads, of the largest size so far."""
    with state.lock:
        if state.executor is None or state.executor_size < size:
            if state.executor is not None:
                state.executor.shutdown(wait=False)  # its threads end when they have nothing to do
            state.executor, state.executor_size = ThreadPoolExecutor(size, "flash_semicrf"), size
        return state.executor


def _run_in_python_threads(
    state: _State, kernel: Kernel, count: int, tasks: np.ndarray, arguments: tuple
) -> None:
    """`run` without a team: the threads share the queue, and this one is among them."""
    given = (NO_TEAM, 1, np.zeros(1, np.int64), tasks, arguments)
    futures = []
    try:
        for _ in range(count - 1):
            futures.append(_executor(state, count - 1).submit(kernel.launch, *given))
    except RuntimeError:  # the interpreter is shutting down, or the system has no thread left
        pass
    kernel.launch(*given)
    for future in futures:
        future.result()

"""The threads of the kernels, after forks and beside other pools; caches that cannot be written."""

from __future__ import annotations

import ctypes
import ctypes.util
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.tasks import fetch_add, take
from flash_semicrf.streaming.cpu.team import NO_TEAM, find_team
from flash_semicrf.testing import random_problem

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def everything(problem):
    """Every result of a problem, as lists."""
    return (
        log_partition(problem).tolist(),
        segment_marginals(problem).position.tolist(),
        viterbi(problem).segments,
    )


@kernel
def _count(queue, counts, order):
    """Count how often each task is done, and note it in the order in which the tasks are taken."""
    task = take(queue)
    while task >= 0:
        counts[task] += 1
        order[counts.sum() - 1] = task
        task = take(queue)


@kernel
def _meet(queue, arrived, met):
    """Task i counts itself in, and waits (not forever) until the other one has."""
    task = take(queue)
    while task >= 0:
        fetch_add(arrived, 1)
        for _ in range(500_000_000):
            if fetch_add(arrived, 0) == 2:
                met[task] = True
                break
        task = take(queue)


@kernel
def _ask_for_too_much(queue, size):
    if take(queue) >= 0:
        np.empty(size)[0] = 1.0


@pytest.fixture(params=["team", "python"])
def team_or_not(request, monkeypatch):
    """Torch's OpenMP team, and the pool where there is none."""
    if request.param == "python":
        monkeypatch.setattr(threads, "_team", lambda: NO_TEAM)
    else:
        assert find_team().entry, "this build of torch uses OpenMP"
    monkeypatch.setattr(threads, "_state", threads._State())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_run_does_every_task_once(team_or_not, count):
    tasks = np.arange(50)
    counts, order = np.zeros((2, 50), dtype=np.int64)
    threads.run(_count, tasks[::-1], np.ones(50), (counts, order), threads=count)
    assert counts.tolist() == [1] * 50


def test_python_threads_are_no_more_than_the_largest_number_used(monkeypatch):
    monkeypatch.setattr(threads, "_team", lambda: NO_TEAM)
    monkeypatch.setattr(threads, "_state", threads._State())

    def alive():
        return {thread for thread in threading.enumerate() if "flash_semicrf" in thread.name}

    before = alive()
    for count in (2, 5, 3, 4, 2, 5):
        counts, order = np.zeros((2, 50), dtype=np.int64)
        threads.run(_count, np.arange(50), np.ones(50), (counts, order), threads=count)
        assert counts.tolist() == [1] * 50
    deadline = time.monotonic() + 30
    while len(alive() - before) > 4 and time.monotonic() < deadline:
        time.sleep(0.01)  # for the threads of the smaller pool to end
    assert len(alive() - before) <= 4


def test_run_begins_with_the_costliest_tasks():
    costs = np.array([1.0, 9.0, 2.0, 8.0, 3.0])
    counts, order = np.zeros((2, 5), dtype=np.int64)
    # One thread takes the sorted queue of two, as the second may come too late for any task.
    sort = np.argsort(-costs)
    _count.launch(NO_TEAM, 1, np.zeros(1, np.int64), sort, (counts, order))
    assert order.tolist() == [1, 3, 4, 2, 0]


def test_run_uses_several_threads_at_once(team_or_not):
    arrived, met = np.zeros(1, dtype=np.int64), np.zeros(2, dtype=bool)
    threads.run(_meet, np.arange(2), np.ones(2), (arrived, met), threads=2)
    assert met.all()


def test_run_raises_where_a_kernel_fails(team_or_not):
    for count in (1, 2):
        with pytest.raises(MemoryError, match="workspace"):
            threads.run(_ask_for_too_much, np.arange(4), np.ones(4), (2**59,), threads=count)


def test_small_work_and_busy_cores_get_one_thread():
    state, work = threads._State(), np.full(4, 1e9)
    state.running = 1
    assert threads._worthwhile(state, work) == 2
    assert threads._worthwhile(state, np.ones(4)) == 1  # too small
    assert threads._worthwhile(state, work[:1]) == 1  # one task
    state.running = 2
    assert threads._worthwhile(state, work) == 1  # the other thread of Python has a core
    state.running = 1
    threads._learn(state, 2.0, 1.1)  # two threads did in 1.1 s what takes one 2 s
    assert threads._worthwhile(state, work) == 2
    threads._learn(state, 2.0, 3.0)
    assert threads._worthwhile(state, work) == 1
    assert 19 < state.alone_until - time.monotonic() <= 20
    threads._learn(state, 2.0, 1.1)
    for period in (0.2, 0.25, 0.25):  # losses of 10 ms each, one after the other
        threads._learn(state, 0.03, 0.04)
        assert state.alone_for == pytest.approx(period)


def test_libomp_starts_threads_by_its_own_entry_point():
    """As on Windows; under Linux this runtime is not the one that torch uses."""
    found = ctypes.util.find_library("omp5") or ctypes.util.find_library("omp")
    if found is None:
        pytest.skip("LLVM's OpenMP runtime (libomp) is not installed")
    # In a process of its own: two OpenMP runtimes may not get along for long.
    program = f"""
import ctypes, numpy as np
from flash_semicrf.streaming.cpu import threads, team
from tests.flash_semicrf.streaming.cpu.test_threads import _meet
library = ctypes.CDLL({found!r})
library.omp_set_num_threads(2)
found = team.team_of(library, prefer_kmpc=True)
assert found.entry == 2
threads._team = lambda: found
arrived, met = np.zeros(1, dtype=np.int64), np.zeros(2, dtype=bool)
threads.run(_meet, np.arange(2), np.ones(2), (arrived, met), threads=2)
assert met.all()
"""
    run_in_a_new_process(program)


def run_in_a_new_process(program, **environment):
    """Run a program where warnings are errors; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


OUTLIVE = """
import threading, time
import torch
from flash_semicrf import log_partition
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import kernel
from flash_semicrf.streaming.cpu.tasks import fetch_add, take
from flash_semicrf.streaming.cpu.team import NO_TEAM, find_team
from flash_semicrf.streaming.cpu.team import NO_TEAM
from flash_semicrf.testing import random_problem
threads._team = lambda: NO_TEAM
threads._worthwhile = lambda state, costs: min(2, len(costs))
problem = random_problem(4, 50, 6, 3, seed=1)
expected = log_partition(problem)
def later():
    threading.main_thread().join()
    time.sleep(0.2)  # the interpreter is shutting down: its pools take no more work
    print((log_partition(problem) - expected).abs().max().item() < 1e-9)
threading.Thread(target=later).start()
"""


def test_a_thread_that_outlives_the_main_one_computes():
    assert run_in_a_new_process(OUTLIVE) == "True\n"


FORK = """
import os, torch
from flash_semicrf import SemiMarkovCRFHead
head = SemiMarkovCRFHead(3, 5, hidden_dim=64)
hidden, lengths = torch.randn(8, 400, 64), torch.full((8,), 400)
def loss():
    return float(head.compute_loss(hidden, lengths, torch.zeros(8, 400, dtype=torch.long)))
torch.set_num_threads(2)
head.long_segments = "split"
import warnings
warnings.simplefilter("ignore")
expected = loss()
child = os.fork()
if child == 0:
    os._exit(0 if abs(loss() - expected) < 1e-6 * abs(expected) else 1)
import time
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_of_a_process_with_a_head_computes():
    run_in_a_new_process(FORK)


def _in_child(problem, queue):
    queue.put(everything(problem))


# Python 3.12 warns of any fork beside threads; that it works here is what is tested.
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_forked_child_computes_after_its_parent_did():
    problem = random_problem(4, 50, 6, 3, seed=1)
    expected = everything(problem)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(problem, queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.kill()
    assert child.exitcode == 0
    assert everything(problem) == expected  # and the parent still does


def test_nested_joblib_threads():
    problems = [random_problem(3, 40 + i, 6, 3, seed=i) for i in range(8)]
    expected = [everything(problem) for problem in problems]
    found = joblib.Parallel(n_jobs=2, backend="threading")(
        joblib.delayed(everything)(problem) for problem in problems
    )
    assert found == expected


def test_joblib_processes():
    problems = [random_problem(2, 20, 4, 2, seed=i) for i in range(2)]
    found = joblib.Parallel(n_jobs=2)(joblib.delayed(everything)(problem) for problem in problems)
    assert found == [everything(problem) for problem in problems]


def test_many_python_threads_at_once():
    problem = random_problem(3, 200, 10, 3, seed=2)
    expected = everything(problem)
    found = []
    running = [threading.Thread(target=lambda: found.append(everything(problem))) for _ in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert found == [expected] * 6


COUNT = """
import numpy as np
from flash_semicrf.streaming.cpu import threads
from tests.flash_semicrf.streaming.cpu.test_threads import _count
counts, order = np.zeros((2, 5), dtype=np.int64)
threads.run(_count, np.arange(5), np.ones(5), (counts, order), threads=1)
print(counts.tolist())
"""
"""A kernel that takes a second to compile, as all do where there is no cache."""

NOWHERE = """
from numba.core.caching import CompileResultCacheImpl
CompileResultCacheImpl._locator_classes = []
"""
"""As in a read-only install without a home: root, who may run the tests, can write everywhere."""


@pytest.mark.parametrize("preparation", ["", NOWHERE], ids=["another", "none"])
def test_kernels_run_where_their_cache_cannot_be_written(preparation, tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"  # nobody can make it
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", preparation + COUNT],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1, 1, 1, 1, 1]\n"

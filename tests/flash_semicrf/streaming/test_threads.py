"""The thread pool, after a fork and under other pools, and a cache that cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch

from flash_semicrf.streaming import log_partition, segment_marginals, viterbi
from flash_semicrf.streaming.cpu import pool
from flash_semicrf.testing import assert_close, random_problem

ROOT = Path(__file__).resolve().parents[3]


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


def test_balance_gives_every_task_once_and_the_longest_first():
    costs = np.array([1, 9, 2, 8, 3])
    shares = pool.balance(costs, 2)
    assert sorted(np.concatenate(shares).tolist()) == [0, 1, 2, 3, 4]
    assert [share[0] for share in shares] == [1, 3]
    loads = [costs[share].sum() for share in shares]
    assert max(loads) - min(loads) <= 2


def test_balance_makes_no_empty_share():
    assert [share.tolist() for share in pool.balance(np.array([5, 7]), 8)] == [[1], [0]]
    assert len(pool.balance(np.ones(10))) == torch.get_num_threads()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 16])
def test_balance_deals_out_many_small_tasks(num_workers):
    costs = np.random.default_rng(0).integers(1, 60, size=5000)
    shares = pool.balance(costs, num_workers)
    assert sorted(np.concatenate(shares).tolist()) == list(range(5000))
    loads = [costs[share].sum() for share in shares]
    assert max(loads) - min(loads) <= costs.max()
    assert all((np.diff(costs[share]) <= 0).all() for share in shares)


def test_run_uses_as_many_threads_as_shares():
    # A barrier passes only if both shares run at the same time.
    barrier = threading.Barrier(2)
    names = []

    def work(share):
        barrier.wait(timeout=30)
        names.append(threading.current_thread().name)

    pool.run(work, [np.array([0]), np.array([1])])
    assert len(set(names)) == 2


def test_run_raises_what_a_worker_raises():
    def work(share):
        if share[0] == 1:
            raise KeyError("in a worker")

    with pytest.raises(KeyError, match="in a worker"):
        pool.run(work, [np.array([0]), np.array([1])])


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
    threads = [threading.Thread(target=lambda: found.append(everything(problem))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


COUNT = """
import torch
from flash_semicrf import Potentials
from flash_semicrf.streaming import log_partition
p = Potentials(torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4]))
print(float(log_partition(p).exp()))
"""

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
    assert_close(torch.tensor(float(done.stdout)), torch.tensor(5.0), torch.float32)

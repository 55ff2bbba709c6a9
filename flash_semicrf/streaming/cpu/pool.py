"""A plain pool of threads for kernels that release the GIL.

numba's own threading layers abort under nested joblib threads and after a fork; a
`ThreadPoolExecutor`, made anew in a forked child, does neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

__all__ = ["balance", "run"]

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}

_SMALL = 1 / 32
"""Tasks below this part of a worker's load are dealt out in turn: balanced to that part."""


def balance(costs: np.ndarray, num_workers: int | None = None) -> list[np.ndarray]:
    """Split tasks among workers, longest first, each to the worker with the least to do.

    Where all tasks are small they are dealt out in turn, to and fro, which takes no loop over them.

    Parameters
    ----------
    costs : array of shape (N,)
    num_workers : int, optional
        By default `torch.get_num_threads()`.

    Returns
    -------
    list of int64 arrays
        Indices of each worker's tasks; no empty ones.
    """
    num_workers = min(num_workers or torch.get_num_threads(), len(costs))
    order = np.argsort(-np.asarray(costs), kind="stable")
    if num_workers == 1:
        return [order]
    if costs[order[0]] * num_workers <= _SMALL * np.sum(costs):
        turn = np.arange(len(order)) % (2 * num_workers)
        worker = np.minimum(turn, 2 * num_workers - 1 - turn)
        return [order[worker == i] for i in range(num_workers)]
    load = np.zeros(num_workers)
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    for task in order:
        worker = int(load.argmin())
        load[worker] += costs[task]
        shares[worker].append(int(task))
    return [np.array(share, dtype=np.int64) for share in shares]


def run(function: Callable[[np.ndarray], object], shares: Sequence[np.ndarray]) -> None:
    """Call `function` on each share of tasks, on as many threads; the first in this one."""
    if len(shares) == 1:
        function(shares[0])
        return
    key = (os.getpid(), len(shares))
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(len(shares), thread_name_prefix="flash_semicrf")
    futures = [_pools[key].submit(function, share) for share in shares[1:]]
    function(shares[0])
    for future in futures:
        future.result()

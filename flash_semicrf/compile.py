"""Compile the kernels before they are needed: ``python -m flash_semicrf.compile``.

A kernel is compiled when it is first used on a machine, and kept on disk. This does so beforehand,
several at a time: when an image of a container is built, before tests, or once for the nodes of a
cluster that share a folder. By default all operations of the CPU for static transitions in float32,
without a duration tail, which is what the estimator runs by default; options add the others.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from flash_semicrf.inference.information import entropy
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.sampling import sample
from flash_semicrf.inference.viterbi import viterbi
from flash_semicrf.problem.potentials import Potentials

__all__ = ["OPERATIONS", "Task", "cache_folder", "compile_task", "compile_tasks", "main"]


def _gradient(p: Potentials) -> None:
    log_partition(p).sum().backward()


def _entropy_gradient(p: Potentials) -> None:
    entropy(p).sum().backward()


OPERATIONS: dict[str, Callable[[Potentials], object]] = {
    "log_partition": log_partition,
    "gradient": _gradient,
    "viterbi": viterbi,
    "marginals": segment_marginals,
    "entropy": entropy,
    "entropy_gradient": _entropy_gradient,
    "sample": lambda p: sample(p, 1, seed=0),
    "n_best": lambda p: n_best(p, 2),
}
"""By name; the first also compiles what the others share."""

_POSITIONS = 300
"""More than the kernels of short sequences take, and several blocks of the others."""

_SHORT = 20


class Task(NamedTuple):
    """What to compile: an operation on problems of one kind.

    Attributes
    ----------
    operation : one of `OPERATIONS`
    device : {"cpu", "cuda"}
    num_labels, max_duration : int
        C and K. On the CPU one kernel serves all; on a GPU every power of two from 8 labels on, and
        durations above 320, have kernels of their own.
    by_duration : bool
        Transitions of shape (K, C, C).
    tail, boundary : bool
        With a duration tail; with start and end scores.
    dtype : {"float32", "float64"}
    """

    operation: str
    device: str = "cpu"
    num_labels: int = 8
    max_duration: int = 16
    by_duration: bool = False
    tail: bool = False
    boundary: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = "by duration" if self.by_duration else "static"
        options = [name for name in ("tail", "boundary") if getattr(self, name)]
        sizes = [f"{self.num_labels} labels, K = {self.max_duration}"]
        parts = [self.operation, kind, *options, self.dtype, *sizes * (self.device == "cuda")]
        return ", ".join(parts)


def _problem(task: Task, num_positions: int) -> Potentials:
    """Zeros of the shapes of a task, that require a gradient. Four: a batch of short sequences."""
    dtype, device = getattr(torch, task.dtype), task.device
    b, t, k, c = 4, num_positions, task.max_duration, task.num_labels

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)

    return Potentials(
        scores=zeros(b, t, c),
        transition=zeros(k, c, c) if task.by_duration else zeros(c, c),
        duration_bias=zeros(k, c),
        lengths=torch.full((b,), t, device=device),
        duration_tail=torch.full((c,), -1.0, dtype=dtype, device=device) if task.tail else None,
        start_scores=zeros(b, t, c) if task.boundary else None,
        end_scores=zeros(b, t, c) if task.boundary else None,
    )


def compile_task(task: Task) -> None:
    """Run an operation once, on sequences that are short and on ones that are not.

    Parameters
    ----------
    task : Task
    """
    for num_positions in (_SHORT, _POSITIONS):
        problem = _problem(task, num_positions)
        with torch.set_grad_enabled(task.operation.endswith("gradient")):
            OPERATIONS[task.operation](problem)


def compile_tasks(tasks: Sequence[Task], processes: int = 1) -> Iterator[Task]:
    """Compile what is not in the cache yet, and yield each task when it is done.

    Parameters
    ----------
    tasks : sequence of Task
    processes : int
        How many to do at the same time. Those with the first of `OPERATIONS` come first, because
        the others share kernels with it.
    """
    if processes == 1:
        for task in tasks:
            compile_task(task)
            yield task
        return
    # Not by forking, which neither torch's threads nor CUDA survive.
    context = multiprocessing.get_context("spawn")
    first = [task for task in tasks if task.operation == next(iter(OPERATIONS))]
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for group in (first, [task for task in tasks if task not in first]):
            running = {pool.submit(compile_task, task): task for task in group}
            for future in as_completed(running):
                future.result()
                yield running[future]


def cache_folder(device: str = "cpu") -> Path | None:
    """Folder below which compiled kernels are; None where no folder can be written.

    Parameters
    ----------
    device : {"cpu", "cuda"}
    """
    if device == "cuda":
        from triton import knobs

        return Path(knobs.cache.dir)
    from flash_semicrf.streaming.cpu import jit

    return jit.cache_folder()


class _Bar:
    """Progress, on one line of a terminal, or a line for each task elsewhere."""

    def __init__(self, total: int, file: TextIO) -> None:
        self._total, self._file, self._begin = total, file, time.perf_counter()

    def show(self, done: int, text: str) -> None:
        width = 20
        full = width * done // self._total
        seconds = time.perf_counter() - self._begin
        bar = "#" * full + "." * (width - full)
        line = f"[{bar}] {done} of {self._total}, {seconds:.0f} s: {text}"
        if self._file.isatty():
            print(f"\r\x1b[K{line[:110]}", end="", file=self._file, flush=True)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        if self._file.isatty():
            print(file=self._file)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_semicrf.compile", description=(__doc__ or "").partition("\n")[0]
    )
    names = list(OPERATIONS)
    parser.add_argument("--operations", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--cuda", action="store_true", help="for the GPU instead of the CPU")
    parser.add_argument("--labels", nargs="+", type=int, default=[8], help="numbers of labels")
    parser.add_argument("--durations", nargs="+", type=int, default=[16], help="values of K")
    parser.add_argument(
        "--transitions", nargs="+", choices=("static", "by_duration"), default=["static"]
    )
    parser.add_argument("--tail", action="store_true", help="also with a duration tail")
    parser.add_argument("--boundary", action="store_true", help="also with start and end scores")
    parser.add_argument("--float64", action="store_true", help="also in float64")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time")
    options = parser.parse_args(argv)
    device = "cuda" if options.cuda else "cpu"
    if options.cuda and not torch.cuda.is_available():
        parser.error("--cuda: PyTorch finds no GPU here")
    tasks = [
        Task(operation, device, labels, duration, kind == "by_duration", tail, boundary, dtype)
        for dtype, tail, boundary, kind, labels, duration, operation in itertools.product(
            ["float32", "float64"] if options.float64 else ["float32"],
            [False, True] if options.tail else [False],
            [False, True] if options.boundary else [False],
            options.transitions,
            options.labels,
            options.durations,
            options.operations,
        )
    ]
    bar = _Bar(len(tasks), sys.stderr)
    for done, task in enumerate(compile_tasks(tasks, options.processes), 1):
        bar.show(done, str(task))
    bar.close()
    folder = cache_folder(device)
    where = "nowhere: no folder can be written" if folder is None else f"below {folder}"
    print(f"Compiled kernels are {where}.")


if __name__ == "__main__":
    main()

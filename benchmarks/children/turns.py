"""Check one problem, then time calls of it on request, in a process of its own.

Run as ``python -m benchmarks.children.turns PROBLEM.json THREADS CHECKOUT`` by
`benchmarks.processes.Companion`. A request is ``{"before": ..., "count": ...}``, its answer the
seconds of each call. The process has one number of threads for all of its life: shrinking
torch's team leaves threads behind that spin on, and would be timed with what follows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problems import Problem, make_inputs

ELEMENTS = 2_000_000
"""Of the tensor of the operation that goes before: torch splits those of more than 32,768."""

PAUSE_SECONDS = 0.05
"""Longer than OpenMP threads spin once they have nothing to do."""


class Calls:
    """The calls of a problem.

    With one thread the problem is checked and its kernels are loaded; then the number of threads
    is set. Nothing before is parallel, so the first call afterwards finds no team of threads.

    Parameters
    ----------
    problem : Problem
    threads : int
    """

    def __init__(self, problem: Problem, threads: int) -> None:
        # Imported here: `main` says first from which checkout.
        from benchmarks.children import ours

        torch.set_num_threads(1)
        self.error = ours.check_against_reference(problem)
        potentials = ours.make_potentials(make_inputs(problem))
        self.call = ours.job_call(potentials, problem.job)
        self.expected = self.call()
        self.tensor = torch.zeros(ELEMENTS)
        torch.set_num_threads(threads)

    def time(self, before: str, count: int) -> list[float]:
        """Seconds of each call.

        Parameters
        ----------
        before : {"first", "torch", "pause"}
            What each follows: nothing, a parallel torch operation, a pause. The second is warm:
            one more call goes before.
        count : int
        """
        seconds = []
        for _ in range(count + (before == "torch")):
            if before == "torch":
                self.tensor.exp_().clamp_(max=1.0)
            elif before == "pause":
                time.sleep(PAUSE_SECONDS)
            began = time.perf_counter()
            value = self.call()
            seconds.append(time.perf_counter() - began)
        self._check(value)
        return seconds[-count:]

    def _check(self, value: Tensor) -> None:
        """Compare log Z with that of one thread."""
        from benchmarks.children import ours

        error = ours.relative_error(value, self.expected)
        ours.require("log Z, against one thread", error, ours.VALUE_TOLERANCE)


def main(argv: list[str]) -> None:
    """Answer requests until there are none."""
    shape, threads, checkout = argv
    sys.path.insert(0, checkout)
    import flash_semicrf

    location = Path(flash_semicrf.__file__).resolve()
    if Path(checkout).resolve() not in location.parents:
        raise SystemExit(f"flash_semicrf came from {location}, not from {checkout}")
    calls = Calls(Problem(**json.loads(shape)), int(threads))
    print(json.dumps({"status": "ok", "check_error": calls.error}), flush=True)
    for line in sys.stdin:
        seconds = calls.time(**json.loads(line))
        print(json.dumps({"status": "ok", "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

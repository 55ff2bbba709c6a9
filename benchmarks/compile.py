"""What kernels cost to compile: ``python -m benchmarks.compile``.

Compiles every kind of kernel with an empty cache, in one process, and prints the processor time of
each kernel, with that of the functions it is made of, and of each operation. With ``--cuda`` for
the GPU, where the wall time is printed as well: Triton compiles in threads of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence

import numba
import numpy as np

from flash_semicrf.compile import OPERATIONS, Task, compile_task
from flash_semicrf.streaming.compilation import Compiled, watched

KINDS = {
    "static": {},
    "static with a tail": {"tail": True},
    "by duration": {"by_duration": True},
    "by duration with a tail": {"by_duration": True, "tail": True},
}


def costs_of(task: Task) -> list[Compiled]:
    """Kernels that an operation compiles which this process has not compiled yet."""
    found: list[Compiled] = []
    with watched(found.append):
        compile_task(task)
    return found


def yardstick() -> float:
    """Processor time that numba takes for a function of loops over arrays, here and now.

    Times of compilation over it can be compared between machines, and while others use the machine.
    """

    def smooth(values, weights, out):
        size = values.shape[0]
        for i in range(size):
            total, weight = 0.0, 0.0
            for j in range(max(0, i - weights.shape[0] + 1), min(size, i + weights.shape[0])):
                w = weights[abs(i - j)]
                if not np.isnan(values[j]):
                    total += w * math.exp(values[j])
                    weight += w
            out[i] = math.log(total / weight) if weight > 0.0 else -math.inf
        for i in range(1, size):
            if out[i] < out[i - 1]:
                out[i] = 0.5 * (out[i] + out[i - 1])
        return out.max()

    begin = time.process_time()
    numba.njit(smooth)(np.zeros(8), np.ones(2), np.zeros(8))
    return time.process_time() - begin


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="for the GPU instead of the CPU")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=OPERATIONS)
    parser.add_argument("--labels", type=int, default=24)
    parser.add_argument("--duration", type=int, default=16)
    options = parser.parse_args(argv)
    device = "cuda" if options.cuda else "cpu"
    yardstick()  # what numba does once in a process
    print(f"yardstick {yardstick():.3f} s\n")
    print("| kind | operation | kernel | CPU s | wall s |\n| --- | --- | --- | --- | --- |")
    total = Compiled("", "", 0.0, 0.0)
    for kind in options.kinds:
        for operation in options.operations:
            task = Task(operation, device, options.labels, options.duration, **KINDS[kind])
            for cost in costs_of(task):
                name = cost.kernel.rpartition("streaming.")[2]
                row = f"{kind} | {operation} | `{name}` | {cost.cpu_seconds:.1f}"
                print(f"| {row} | {cost.seconds:.1f} |", flush=True)
                total = Compiled("", "", *(a + b for a, b in zip(total[2:], cost[2:], strict=True)))
    print(f"| all | | | {total.cpu_seconds:.1f} | {total.seconds:.1f} |")


if __name__ == "__main__":
    if "FLASH_SEMICRF_EMPTY" not in os.environ:  # numba reads the folder when it is imported
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {
                "FLASH_SEMICRF_EMPTY": "1",
                "NUMBA_CACHE_DIR": folder,
                "TRITON_CACHE_DIR": folder,
            }
            command = [sys.executable, "-m", "benchmarks.compile", *sys.argv[1:]]
            sys.exit(os.spawnv(os.P_WAIT, sys.executable, command))
    main()

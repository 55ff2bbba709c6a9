"""Run the GPU tests, then the GPU benchmarks, on this machine: ``python -m benchmarks.gpu``.

Needs a CUDA device, PyTorch, Triton, numpy, scikit-learn, scipy, joblib and pytest, and less than
eight minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.measure import compile_kernels, run_shape
from benchmarks.gpu.problems import JOBS, SHAPES
from benchmarks.gpu.report import Record, describe_device, judge, read_csv, render, write_csv
from benchmarks.gpu.tests import run_tests
from benchmarks.processes import ROOT
from benchmarks.report import replace_generated

RESULTS = ROOT / "benchmarks" / "results" / "gpu.csv"


def announce(record: Record) -> None:
    """One line of progress."""
    head = f"{record['problem']:<11} {JOBS[record['job']]:<23}"
    if record["status"] != "ok":
        print(f"{head} {record['status']}", flush=True)
        return
    quartiles = f"({record['q1_ms']:.3f} to {record['q3_ms']:.3f})"
    line = f"{head} {record['median_ms']:8.3f} ms {quartiles:<20} asked {record['asked_ms']:g} ms"
    ratio = record.get("peak_over_scores")
    memory = "" if ratio is None else f", {ratio:.2f} x the scores"
    print(f"{line}: {record['met']}{memory}", flush=True)


def run_benchmarks(names: list[str], options: argparse.Namespace) -> list[Record]:
    """Check and time the shapes of these names; the CSV holds those that are done."""
    environment = describe_device(options.device, options.commit)
    records = []
    if torch.device(options.device).type == "cuda":
        began = time.monotonic()
        compile_kernels(names, options.device)
        print(f"kernels compiled and loaded in {time.monotonic() - began:.1f} s", flush=True)
    for name in names:
        began = time.monotonic()
        for record in run_shape(name, options.device, options.budget):
            record = judge({**record, **environment})
            announce(record)
            records.append(record)
        write_csv(options.output, records)
        print(f"{name}: {time.monotonic() - began:.1f} s with its checks", flush=True)
    return records


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tests-only", action="store_true", help="run the GPU tests alone")
    what.add_argument("--bench-only", action="store_true", help="run the benchmarks alone")
    what.add_argument("--docs", type=Path, help="page whose table is made from the CSV; runs none")
    parser.add_argument("--problem", nargs="+", choices=SHAPES, default=[*SHAPES], metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repeats each")
    parser.add_argument("--processes", type=int, help="of the tests; at most 16 by default")
    parser.add_argument("--tests-timeout", type=float, default=330.0, help="seconds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Return 1 where a test or a check failed; a figure that is not met is only reported."""
    options = parse_arguments(argv)
    if options.docs is not None:
        replace_generated(options.docs, render(read_csv(options.output)))
        return 0
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks.gpu needs a CUDA device; there is none.", file=sys.stderr)
        return 2
    passed = True
    if not options.bench_only:
        passed = run_tests(options.tests_timeout, options.processes)
    if not options.tests_only:
        records = run_benchmarks(options.problem, options)
        print(f"\n{render(read_csv(options.output))}\n\nwritten to {options.output}")
        passed &= all(record["status"] == "ok" for record in records)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run the registered problems: ``python -m benchmarks.run --help``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import REQUIREMENTS, run_peer
from benchmarks.problems import EDGES_JOB, PROBLEMS, Goal, Problem
from benchmarks.processes import ROOT, describe_environment, run_child
from benchmarks.report import (
    OURS,
    Record,
    format_seconds,
    render,
    replace_generated,
    write_results,
)

FIRST_CALLS = {
    "first-call-cold": (Goal("seconds", 20),),
    "first-call-warm": (Goal("seconds", 1),),
}

CHILD_TIMEOUT = 900.0


def run_ours(problem: Problem, budget_seconds: float, max_repeats: int) -> Record:
    """Check and measure this package on one problem, in a fresh process."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "record.json"
        arguments = [problem.name, str(output), str(budget_seconds), str(max_repeats)]
        program = "edges" if problem.job == EDGES_JOB else "ours"
        module = ["-m", f"benchmarks.children.{program}"]
        return run_child([*module, *arguments], output=output, timeout=CHILD_TIMEOUT)


def run_first_calls() -> Iterator[Record]:
    """A fresh process with an empty kernel cache, then another that finds what it compiled."""
    shape = {"implementation": OURS, "job": "log_partition_gradient", "dtype": "float32"}
    shape |= {"B": 2, "T": 50, "K": 10, "C": 4, "repeats": 1, "iqr_s": 0.0}
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "record.json"
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(Path(work) / "numba")}
        for name in FIRST_CALLS:
            record = run_child(
                ["-m", "benchmarks.children.first_call", str(output)],
                output=output,
                environment=environment,
                timeout=CHILD_TIMEOUT,
            )
            yield {"problem": name, **shape, **record}


def _difference(mine: Record, other: Record) -> float | None:
    """Relative difference of what a peer returned from what we did."""
    if "value" not in mine or "value" not in other:
        return None
    scale = max(1.0, *(abs(value) for value in mine["value"]))
    pairs = zip(mine["value"], other["value"], strict=True)
    return max(abs(a - b) for a, b in pairs) / scale


def run_problem(problem: Problem, peers: list[str], options: argparse.Namespace) -> list[Record]:
    """This package first, then each peer that can do the job."""
    shape = {key: getattr(problem, key) for key in ("B", "T", "K", "C", "job", "dtype")}
    shape["problem"] = problem.name
    limits = {"budget_seconds": options.budget, "max_repeats": options.max_repeats}
    mine = {**shape, "implementation": OURS, **run_ours(problem, **limits)}
    announce(mine)
    records = [mine]
    for peer in problem.peers:
        if peer in peers:
            record = run_peer(peer, problem, timeout=options.peer_timeout, **limits)
            record = {**shape, "implementation": peer, **record}
            record["difference"] = _difference(mine, record)
            announce(record)
            records.append(record)
    return records


def announce(record: Record) -> None:
    """One line of progress."""
    outcome = record["status"]
    if outcome == "ok":
        outcome = f"{format_seconds(record['median_s'])} ({record['repeats']} repeats)"
    print(f"{record['problem']:<22} {record['implementation']:<14} {outcome}", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [*PROBLEMS, *FIRST_CALLS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--peers", nargs="*", choices=list(REQUIREMENTS), metavar="PEER")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, help="page whose generated part is rewritten")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of repeats each")
    parser.add_argument("--max-repeats", type=int, default=100)
    parser.add_argument("--peer-timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(argv)
    if options.peers is None:
        options.peers = list(REQUIREMENTS)
    if options.list:
        print("problems:", *names)
        print("peers:", *REQUIREMENTS)
        sys.exit(0)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run, write and print; return 1 where one of our own results failed its check."""
    options = parse_arguments(argv)
    environment = describe_environment()
    records: list[Record] = []
    for name, problem in PROBLEMS.items():
        if name in options.problem:
            records += run_problem(problem, options.peers, options)
    if any(name in options.problem for name in FIRST_CALLS):
        for record in run_first_calls():
            announce(record)
            records.append(record)
    records = [{**environment, **record} for record in records]
    write_results(options.output, records)
    text = render(records, FIRST_CALLS)
    print(f"\n{text}\n\nwritten to {options.output}")
    if options.docs is not None:
        replace_generated(options.docs, text)
    failed = [r for r in records if r["implementation"] == OURS and r["status"] != "ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

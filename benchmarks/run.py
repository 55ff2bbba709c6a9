"""Run the registered problems: ``python -m benchmarks.run --help``."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import REQUIREMENTS, run_peer
from benchmarks.problems import EDGES_JOB, PROBLEMS, THREADED, Goal, Problem
from benchmarks.processes import ROOT, available_cores, describe_environment, run_child
from benchmarks.report import (
    OURS,
    Record,
    describe_machine,
    format_seconds,
    render,
    replace_generated,
    write_results,
)
from benchmarks.threads import BEFORE, GROUPS, group_table, run_groups

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
        if "ratio" in record:
            outcome += f", {record['group']}, {BEFORE[record['before']]}: {record['ratio']:.2f} x"
    print(f"{record['problem']:<22} {record['implementation']:<14} {outcome}", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names, cores = [*PROBLEMS, *FIRST_CALLS, *GROUPS], len(available_cores())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--peers", nargs="*", choices=list(REQUIREMENTS), metavar="PEER")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, help="page whose generated parts are rewritten")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of repeats each")
    parser.add_argument("--max-repeats", type=int, default=100)
    parser.add_argument("--peer-timeout", type=float, default=600.0, help="seconds")
    group = parser.add_argument_group("problems `threads` and `busy`", "One thread against all.")
    group.add_argument("--threads", type=int, default=cores, help="by default one for each core")
    group.add_argument("--row", nargs="+", choices=list(THREADED), metavar="ROW", help="not all")
    group.add_argument("--checkout", type=Path, default=ROOT, help="whose package is measured")
    group.add_argument("--processes", type=int, default=3, help="of each number of threads")
    group.add_argument("--turns", type=int, default=5, help="of each process")
    group.add_argument("--calls", type=int, default=5, help="of each turn")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(argv)
    if options.peers is None:
        options.peers = list(REQUIREMENTS)
    if options.list:
        print("problems:", *names)
        print("rows of `threads` and `busy`:", *THREADED)
        print("peers:", *REQUIREMENTS)
        sys.exit(0)
    options.groups = [name for name in GROUPS if name in options.problem]
    if options.groups and options.threads < 2:
        if options.problem is not names:
            names = ", ".join(options.groups)
            parser.error(f"{names}: --threads must be at least 2, got {options.threads}")
        options.groups = []
    return options


def run_all(options: argparse.Namespace) -> Iterator[Record]:
    """Every problem that was named, each peer's and group's records after it."""
    for name, problem in PROBLEMS.items():
        if name in options.problem:
            yield from run_problem(problem, options.peers, options)
    measured: list[Iterator[Record]] = []
    if any(name in options.problem for name in FIRST_CALLS):
        measured.append(run_first_calls())
    if options.groups:
        measured.append(run_groups(options.groups, options))
    for record in itertools.chain(*measured):
        announce(record)
        yield record


def main(argv: list[str] | None = None) -> int:
    """Run, write and print; return 1 where one of our own results failed its check."""
    options = parse_arguments(argv)
    environment = describe_environment(options.checkout)
    records = [{**environment, **record} for record in run_all(options)]
    write_results(options.output, records)
    parts = {}
    if plain := [record for record in records if "group" not in record]:
        parts["benchmarks"] = render(plain, FIRST_CALLS)
    for group in options.groups:
        mine = [record for record in records if record.get("group") == group]
        parts[group] = f"{describe_machine(mine[0])}\n\n{group_table(group, mine)}"
    for name, text in parts.items():
        print(f"\n{text}")
        if options.docs is not None:
            replace_generated(options.docs, text, name)
    print(f"\nwritten to {options.output}")
    failed = [r for r in records if r["implementation"] == OURS and r["status"] != "ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""One thread against all of them: the groups `threads` and `busy` of `benchmarks.run`.

Group `threads` compares them on a machine that is otherwise idle, group `busy` while another
process keeps one of the cores busy. Each number of threads has a process of its own, with the same
cores, and the processes take short turns, so that a change of the machine's speed meets all of
them. A ratio is one of medians within a turn; its median and quartiles over the turns are given.
Calls are timed where they stand in use: right after a parallel torch operation, as after an
encoder, whose threads are still spinning; after a pause, when they sleep; and as the first of a
process, whose kernels are loaded but whose threads are not yet there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks.problems import THREADED, Problem
from benchmarks.processes import Companion, busy_core
from benchmarks.report import OURS, Record, format_seconds, table

GROUPS = ("threads", "busy")

BEFORE = {
    "first": "the first call of a process",
    "torch": "after a torch operation",
    "pause": "after a pause",
}

TIMEOUT = 600.0
"""Seconds for an answer; the first may wait for kernels to be compiled."""


class Cell(NamedTuple):
    """Circumstances of a call."""

    before: str
    busy: bool
    threads: int


Turns = dict[Cell, list[list[float]]]
"""Seconds of each call of each turn."""


class Failed(RuntimeError):
    """A process failed; the message is the status of its record."""


def _require(answer: Record) -> Record:
    if answer["status"] != "ok":
        raise Failed(answer["status"])
    return answer


def _start(problem: Problem, threads: int, checkout: str) -> Companion:
    shape = {k: v for k, v in asdict(problem).items() if k not in ("peers", "goals")}
    module = ["-m", "benchmarks.children.turns"]
    return Companion([*module, json.dumps(shape), str(threads), checkout], timeout=TIMEOUT)


def take_turns(problem: Problem, loads: list[bool], options: Namespace) -> tuple[Turns, float]:
    """Time one problem with one thread and with all, with and without a busy core.

    Parameters
    ----------
    problem : Problem
    loads : list of bool
        Whether a core is kept busy.
    options : Namespace
        Of the command line: `threads`, `checkout`, `processes`, `turns`, `calls`.

    Returns
    -------
    turns : dict
    error : float
        The largest of the checks.

    Raises
    ------
    Failed
        Where a process ends, or finds a wrong result.
    """
    turns, errors = defaultdict(list), [0.0]
    checkout = str(options.checkout.resolve())
    for _ in range(options.processes):
        with contextlib.ExitStack() as stack:
            companions = {
                (busy, threads): stack.enter_context(_start(problem, threads, checkout))
                for busy, threads in itertools.product(loads, (1, options.threads))
            }
            errors += [_require(c.answer())["check_error"] for c in companions.values()]
            _turn(companions, ("first",), 1, turns)
            for _ in range(options.turns):
                _turn(companions, ("torch", "pause"), options.calls, turns)
    return dict(turns), max(errors)


def _turn(
    companions: dict[tuple[bool, int], Companion], kinds: tuple[str, ...], count: int, turns: Turns
) -> None:
    """Add a turn of every process, of those with a busy core after the others."""
    for load in sorted({busy for busy, _ in companions}):
        with busy_core() if load else contextlib.nullcontext():
            for before, (busy, threads) in itertools.product(kinds, companions):
                if busy == load:
                    answer = _require(companions[busy, threads].ask(before=before, count=count))
                    turns[Cell(before, busy, threads)].append(answer["seconds"])


def _summary(turns: list[list[float]], name: str = "") -> Record:
    """Median and quartiles of all calls."""
    quartiles = np.quantile(np.concatenate(turns), [0.25, 0.5, 0.75])
    keys = (f"{name}low_s", f"{name}median_s", f"{name}high_s")
    return dict(zip(keys, quartiles.tolist(), strict=True))


def _ratio(upper: list[list[float]], lower: list[list[float]], name: str = "ratio") -> Record:
    """Median and quartiles over the turns."""
    ratios = [np.median(a) / np.median(b) for a, b in zip(upper, lower, strict=True)]
    quartiles = np.quantile(ratios, [0.25, 0.5, 0.75])
    return dict(zip((f"{name}_low", name, f"{name}_high"), quartiles.tolist(), strict=True))


def make_records(groups: list[str], turns: Turns, threads: int) -> Iterator[Record]:
    """A record for each group and each of `BEFORE`: "median_s" is of all threads.

    "ratio" is one thread over all of them in the group `threads`. In `busy` it is all of them over
    one thread on the idle machine, and "ratio_busy" over one thread on the busy one.
    """
    for group in groups:
        for before in BEFORE:
            one, all_ = (turns[Cell(before, False, n)] for n in (1, threads))
            record = {"group": group, "before": before, **_summary(one, "one_thread_")}
            if group == "threads":
                record |= _ratio(one, all_)
            else:
                one_busy, all_ = (turns[Cell(before, True, n)] for n in (1, threads))
                record |= _summary(one_busy, "one_thread_busy_")
                record |= _ratio(all_, one) | _ratio(all_, one_busy, "ratio_busy")
            record |= _summary(all_)
            record["iqr_s"] = record["high_s"] - record["low_s"]
            record["min_s"] = min(map(min, all_))
            yield record | {"repeats": sum(map(len, all_))}


def run_groups(groups: list[str], options: Namespace) -> Iterator[Record]:
    """Measure the problems of `THREADED`, or those that were named."""
    loads = [False, True] if "busy" in groups else [False]
    for problem in (THREADED[name] for name in options.row or THREADED):
        common: dict[str, Any] = {"problem": problem.name, "implementation": OURS}
        common |= {key: getattr(problem, key) for key in ("B", "T", "K", "C", "job", "dtype")}
        common["threads"] = options.threads
        try:
            turns, error = take_turns(problem, loads, options)
        except Failed as failure:
            yield from ({**common, "group": g, "status": str(failure)} for g in groups)
            continue
        for record in make_records(groups, turns, options.threads):
            yield {**common, **record, "status": "ok", "check_error": error}


def _bound(record: Record) -> float | None:
    """The ratio wanted; None for a first call on an idle machine: it has the threads to start."""
    if record["group"] == "threads" and record["before"] == "first":
        return None
    goals = {goal.quantity: goal.bound for goal in THREADED[record["problem"]].goals}
    return goals[record["group"]]


def _verdict(record: Record) -> list[str]:
    """The figure asked for, and whether it is reached."""
    bound = _bound(record)
    if bound is None:
        return ["", ""]
    more = record["group"] == "threads"
    reached = record["ratio"] >= bound if more else record["ratio"] <= bound
    return [f"{'>=' if more else '<='} {bound:g}", "yes" if reached else "**no**"]


def _times(record: Record, *names: str) -> list[str]:
    """Medians with their quartiles."""
    found = []
    for name in names:
        low, middle, high = (record[f"{name}{key}_s"] for key in ("low", "median", "high"))
        found.append(f"{format_seconds(middle)} ({1e3 * low:.3g} to {1e3 * high:.3g})")
    return found


def group_table(group: str, records: list[Record]) -> str:
    """Times of one thread and of all, their ratio, and what it should be."""
    threads = records[0]["threads"]
    header = ["problem", "B, T, K, C", "call", "1 thread"]
    names = ["one_thread_"]
    if group == "threads":
        header += [f"{threads} threads", f"1 thread / {threads} threads (quartiles)"]
    else:
        header += ["1 thread, core busy", f"{threads} threads, core busy"]
        header += [f"{threads} threads, core busy / 1 thread (quartiles)", "/ 1 thread, core busy"]
        names.append("one_thread_busy_")
    rows = []
    for record in records:
        start = [f"`{record['problem']}`", "{B}, {T:,}, {K}, {C}".format(**record)]
        if record["status"] != "ok":
            row = [*start, record["status"].replace("|", "/")]
            rows.append(row + [""] * (len(header) + 2 - len(row)))
            continue
        ratio = "{ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format(**record)
        row = [*start, BEFORE[record["before"]], *_times(record, *names, ""), ratio]
        if group == "busy":
            row.append(f"{record['ratio_busy']:.2f}")
        rows.append(row + _verdict(record))
    return table([*header, "to be reached", "reached"], rows)

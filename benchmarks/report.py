"""Records -> JSON, CSV and the tables of ``docs/benchmarks.md``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.problems import PROBLEMS, Goal

OURS = "flash_semicrf"

COLUMNS = (
    *("problem", "implementation", "job", "B", "T", "K", "C", "dtype", "status"),
    *("median_s", "iqr_s", "min_s", "repeats", "peak_bytes", "check_error", "difference"),
    *("group", "before", "low_s", "high_s", "one_thread_median_s", "one_thread_low_s"),
    *("one_thread_high_s", "one_thread_busy_median_s", "one_thread_busy_low_s"),
    *("one_thread_busy_high_s", "ratio", "ratio_low", "ratio_high", "ratio_busy"),
    *("import_s", "date", "device", "cores", "affinity", "threads", "openmp", "load"),
    *("python", "torch", "numba", "commit"),
)

Record = dict[str, Any]


def write_results(folder: Path, records: list[Record]) -> None:
    """Write ``results.json`` and ``results.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def format_seconds(seconds: float) -> str:
    """Three significant digits, in the unit that suits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def format_bytes(count: float | None) -> str:
    """MiB, or nothing where it is unknown."""
    return "" if count is None else f"{count / 2**20:.3g} MiB"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    ok = (record for record in records if record["status"] == "ok")
    return {(record["problem"], record["implementation"]): record for record in ok}


def evaluate_goal(
    goal: Goal, problem: str, measured: dict[tuple[str, str], Record]
) -> tuple[str, str, bool | None]:
    """Say what was to be reached, what was measured, and whether it was reached.

    The last is None where something needed was not measured in this run.
    """
    mine = measured.get((problem, OURS))
    other = None
    if goal.quantity == "speedup":
        aim = f">= {goal.bound:g} x faster than {goal.other}"
        other = measured.get((problem, goal.other))
    elif goal.quantity == "relative_time":
        aim = f"<= {goal.bound:g} x the time of {goal.other}"
        other = measured.get((goal.other, OURS))
    elif goal.quantity == "seconds":
        aim = f"<= {format_seconds(goal.bound)}"
    elif goal.quantity == "relative_memory":
        aim = f"<= {goal.bound:g} x the peak extra memory of {goal.other}"
        other = measured.get((problem, goal.other))
    else:
        aim = f"peak extra memory <= {goal.bound:g} x the scores in float64"
    if mine is None or (goal.other is not None and other is None):
        return aim, "not measured", None
    if goal.quantity == "speedup":
        value = other["median_s"] / mine["median_s"]
        return aim, f"{value:.3g} x", value >= goal.bound
    if goal.quantity == "relative_time":
        value = mine["median_s"] / other["median_s"]
        return aim, f"{value:.3g} x", value <= goal.bound
    if goal.quantity == "seconds":
        return aim, format_seconds(mine["median_s"]), mine["median_s"] <= goal.bound
    if goal.quantity == "relative_memory":
        unit = other["peak_bytes"]
    else:
        unit = 8 * mine["B"] * mine["T"] * mine["C"]
    if mine["peak_bytes"] is None or not unit:
        return aim, "not measured", None
    value = mine["peak_bytes"] / unit
    return aim, f"{value:.3g} x", value <= goal.bound


def goals_table(records: list[Record], extra: dict[str, tuple[Goal, ...]]) -> str:
    """Each goal of the problems that were run, beside the figure of this run."""
    measured = _measured(records)
    run = dict.fromkeys(record["problem"] for record in records)
    rows = []
    for name in run:
        goals = PROBLEMS[name].goals if name in PROBLEMS else extra.get(name, ())
        for goal in goals:
            aim, value, reached = evaluate_goal(goal, name, measured)
            verdict = {True: "yes", False: "**no**", None: ""}[reached]
            rows.append([f"`{name}`", aim, value, verdict])
    return table(["problem", "to be reached", "measured", "reached"], rows)


def times_table(records: list[Record]) -> str:
    """Median, spread and memory of every implementation on every problem."""
    measured = _measured(records)
    rows = []
    for record in records:
        shape = "{B}, {T:,}, {K}, {C}".format(**record)
        start = [f"`{record['problem']}`", shape, record["implementation"]]
        if record["status"] != "ok":
            rows.append([*start, record["status"].replace("|", "/"), "", "", "", ""])
            continue
        mine = measured.get((record["problem"], OURS))
        ratio = f"{record['median_s'] / mine['median_s']:.3g}" if mine else ""
        times = [format_seconds(record[key]) for key in ("median_s", "iqr_s")]
        memory = format_bytes(record.get("peak_bytes"))
        rows.append([*start, *times, str(record["repeats"]), memory, ratio])
    header = ["problem", "B, T, K, C", "implementation", "median", "IQR", "repeats"]
    return table([*header, "peak extra memory", "time / ours"], rows)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def describe_machine(record: Record) -> str:
    """One line: where a record was measured, with what."""
    counts = ", ".join(_plural(record[f"{noun}s"], noun) for noun in ("core", "thread"))
    return (
        "{device}, {counts}, load before {load:.1f}; Python {python}, torch {torch}, "
        "numba {numba}; commit {commit}, {date}."
    ).format(**record, counts=counts)


def render(records: list[Record], extra: dict[str, tuple[Goal, ...]]) -> str:
    """The generated part "benchmarks" of ``docs/benchmarks.md``."""
    tables = [goals_table(records, extra), times_table(records)]
    return "\n\n".join([describe_machine(records[0]), *tables])


def markers(name: str = "benchmarks") -> tuple[str, str]:
    """The lines around a generated part of a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def replace_generated(page: Path, text: str, name: str = "benchmarks") -> None:
    """Put `text` between the two markers of a name on a page."""
    first, last = markers(name)
    head, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"`page` must hold the lines {first} and {last}; {page} does not.")
    page.write_text(f"{head}{first}\n{text}\n{last}{tail}", encoding="utf-8")

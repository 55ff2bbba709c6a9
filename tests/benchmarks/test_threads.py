"""The groups `threads` and `busy`: a tiny problem end to end, ratios, tables, failures."""

from __future__ import annotations

import csv
import json
import os
import sys

import pytest

from benchmarks import report, run, threads
from benchmarks.children import turns
from benchmarks.children.spin import main as spin
from benchmarks.problems import THREADED, Goal, Problem
from benchmarks.processes import Companion, available_cores, busy_core
from benchmarks.threads import BEFORE, GROUPS, Cell, group_table, make_records

GOALS = (Goal("threads", 9), Goal("busy", 9))
TINY = Problem("tiny", 2, 12, 3, 4, job="log_partition", goals=GOALS)


def test_problems_are_the_registered_ones():
    shapes = {(p.B, p.T, p.K, p.C, p.job, *(g.bound for g in p.goals)) for p in THREADED.values()}
    gradient = "log_partition_gradient"
    assert shapes == {
        (4, 1000, 100, 24, "log_partition", 1.75, 1.5),
        (4, 1000, 100, 24, gradient, 1.75, 1.5),
        (4, 1000, 100, 24, "streaming_forward", 1.75, 1.5),
        (8, 4000, 100, 24, "log_partition", 1.9, 1.5),
        (8, 4000, 100, 24, gradient, 1.9, 1.5),
        (64, 200, 20, 12, "log_partition", 1.75, 1.5),
        (64, 200, 20, 12, gradient, 1.75, 1.5),
        (32, 500, 1, 16, "log_partition", 1.75, 1.5),
        (32, 500, 1, 16, gradient, 1.75, 1.5),
    }


def test_groups_run_and_fill_their_parts_of_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "THREADED", {"tiny": TINY})
    page = tmp_path / "page.md"
    parts = ("benchmarks", *GROUPS)
    page.write_text("".join("\nold\n".join(report.markers(name)) for name in parts))
    options = ["--processes", "1", "--turns", "1", "--calls", "2", "--threads", "2"]
    options += ["--output", str(tmp_path), "--docs", str(page), "--problem", *GROUPS]
    assert run.main(options) == 0

    records = json.loads((tmp_path / "results.json").read_text())
    assert [(r["group"], r["before"]) for r in records] == [(g, b) for g in GROUPS for b in BEFORE]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = ("median_s", "one_thread_median_s", "ratio_low", "affinity", "load", "commit", "torch")
    assert all(row[name] for row in rows for name in needed)
    assert [row["repeats"] for row in rows] == ["1", "2", "2"] * 2
    assert all(row["threads"] == "2" and float(row["check_error"]) <= 1e-9 for row in rows)
    text = page.read_text()
    assert text.count("old") == 1 and "begin -->\nold\n<!-- benchmarks" in text  # not in this run
    assert text.count("| `tiny` | 2, 12, 3, 4 | after a torch operation |") == 2
    assert "threads, after a pause: " in capsys.readouterr().out


def test_a_process_that_fails_is_reported(tmp_path, monkeypatch, capsys):
    def start(problem, threads, checkout):
        return Companion(["-I", "-c", f"raise SystemExit({checkout!r})"], timeout=60)

    monkeypatch.setattr(threads, "THREADED", {"tiny": TINY})
    monkeypatch.setattr(threads, "_start", start)
    options = ["--checkout", str(tmp_path), "--output", str(tmp_path), "--threads", "2"]
    assert run.main([*options, "--problem", "threads"]) == 1
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["status"] == f"failed: {tmp_path}" and record["commit"] == "unknown"
    assert str(tmp_path) in capsys.readouterr().out


def test_another_checkout_must_hold_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"flash_semicrf came from .*, not from "):
        turns.main(["{}", "2", str(tmp_path)])
    assert sys.path[0] == str(tmp_path)


def test_one_thread_cannot_be_compared_with_itself(capsys):
    with pytest.raises(SystemExit):
        run.main(["--problem", "busy", "--threads", "1"])
    assert "busy: --threads must be at least 2, got 1" in capsys.readouterr().err
    assert run.parse_arguments(["--threads", "1"]).groups == []


def test_ratios_are_those_within_a_turn():
    times = {}
    for before in BEFORE:  # the second turn on a machine that is ten times as slow
        times[Cell(before, False, 1)] = [[2.0, 2.0], [20.0, 20.0]]
        times[Cell(before, False, 2)] = [[1.0, 1.0], [10.0, 10.0]]
        times[Cell(before, True, 1)] = [[4.0, 4.0], [40.0, 40.0]]
        times[Cell(before, True, 2)] = [[3.0, 3.0], [30.0, 30.0]]
    records = list(make_records(list(GROUPS), times, 2))
    ratios = [[r["ratio_low"], r["ratio"], r["ratio_high"]] for r in records]
    assert ratios == [[2.0] * 3] * 3 + [[1.5] * 3] * 3
    assert [r["ratio_busy"] for r in records[3:]] == [0.75] * 3
    assert {r["repeats"] for r in records} == {4}

    common = {"problem": "k100-long-gradient", "status": "ok", "threads": 2}
    records = [{**common, "B": 1, "T": 2, "K": 3, "C": 4, **record} for record in records]
    failed = {key: records[0][key] for key in ("problem", "threads", *"BTKC")}
    for group, verdict in (("threads", ">= 1.9 | yes |"), ("busy", "<= 1.5 | yes |")):
        mine = [record for record in records if record["group"] == group]
        mine.append({**failed, "group": group, "status": "failed: a | b"})
        header, _, first, second, _, last = group_table(group, mine).splitlines()
        assert first.endswith("|  |  |" if group == "threads" else verdict)
        assert second.endswith(verdict) and "failed: a / b" in last
        assert len({line.count("|") for line in (header, first, second, last)}) == 1


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("raise SystemExit('no kernel')", "failed: no kernel"),
        ("raise SystemExit(3)", "failed: exit status 3"),
        ("import time; time.sleep(60)", "failed: no result in 1 s"),
    ],
)
def test_a_companion_that_does_not_answer_is_reported(program, status):
    with Companion(["-I", "-c", program], timeout=1.0) as companion:
        assert companion.ask(before="torch")["status"] == status


def test_busy_core_begins_and_ends():
    with busy_core():
        pass
    cores = available_cores()
    try:
        spin(["0"])  # as a child whose parent has gone
        if hasattr(os, "sched_setaffinity"):
            assert available_cores() == cores[-1:]
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

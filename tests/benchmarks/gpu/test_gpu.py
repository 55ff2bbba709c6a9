"""The GPU runner on the CPU: measurements, judgement, CSV, the page, groups of tests."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import measure, problems, report
from benchmarks.gpu import tests as gpu_tests
from benchmarks.processes import ROOT
from benchmarks.report import markers

PAGE = ROOT / "docs" / "performance-gpu.md"


@pytest.fixture
def tiny(monkeypatch):
    """Make one of the shapes so small that anything runs it at once."""
    monkeypatch.setitem(problems.SHAPES, "labels64", (2, 12, 3, 4))
    options = ["--bench-only", "--device", "cpu", "--problem", "labels64", "--budget", "0"]
    return [*options, "--commit", "0123abc"]


def test_problems_are_the_registered_ones():
    assert set(problems.SHAPES.values()) == {
        (4, 1000, 100, 24),
        (32, 1000, 32, 8),
        (8, 10_000, 100, 24),
        (1, 10_000, 1000, 24),
        (256, 1000, 100, 24),
        (64, 200, 16, 64),
        (1, 1_000_000, 100, 24),
        (1, 1_000_000, 100, 8),
    }
    assert problems.ASKED_MS.keys() == problems.SHAPES.keys()
    assert [n for n in problems.SHAPES if problems.problem(n).tail] == ["k100-tail"]
    assert problems.asked_ms("k32", "decode_table") == 1.0


def test_command_line_writes_one_csv_and_the_page(tiny, tmp_path, capsys):
    output, page = tmp_path / "results" / "gpu.csv", tmp_path / "page.md"
    assert gpu.main([*tiny, "--output", str(output)]) == 0
    rows = report.read_csv(output)
    assert tuple(rows[0]) == report.COLUMNS
    assert [row["job"] for row in rows] == list(problems.JOBS)
    for row in rows:
        assert row["status"] == "ok" and row["commit"] == "0123abc" and row["device"]
        assert int(row["repeats"]) >= 20 and row["met"] in ("yes", "no")
        assert float(row["min_ms"]) <= float(row["q1_ms"]) <= float(row["median_ms"])
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*markers()))
    assert gpu.main(["--docs", str(page), "--output", str(output)]) == 0
    text = page.read_text()
    assert report.render(rows) in text and report.render(rows) in capsys.readouterr().out
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_tails_are_checked_and_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "TAILS", {"labels64"})
    monkeypatch.setattr(report, "TAILS", {"labels64"})
    output = tmp_path / "gpu.csv"
    assert gpu.main([*tiny, "--output", str(output)]) == 0
    assert "| 2, 12, 3, 4, with a tail | log Z |" in report.render(report.read_csv(output))


def test_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch):
    right = measure.log_partition

    def wrong(potentials):
        return right(potentials) + (1e-3 if potentials.dtype == torch.float32 else 0)

    monkeypatch.setattr(measure, "log_partition", wrong)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("timed a wrong result"))
    assert gpu.main([*tiny, "--output", str(tmp_path / "gpu.csv")]) == 1
    rows = report.read_csv(tmp_path / "gpu.csv")
    assert all(row["status"].startswith("failed: log Z in float64: error ") for row in rows)
    assert all(row["met"] == "no" for row in rows)
    assert "failed: log Z in float64" in report.render(rows)


@pytest.mark.parametrize(("sizes", "met"), [(5.5, "yes"), (6.5, "no")])
def test_judge_compares_time_and_memory_with_what_was_asked(sizes, met):
    shape = {"B": 4, "T": 1000, "K": 100, "C": 24, "status": "ok"}
    peak = int(sizes * 4 * 4 * 1000 * 24)
    record = {"problem": "k100", **shape, "median_ms": 1.05, "peak_bytes": peak}
    judged = report.judge({**record, "job": "log_partition_gradient"})
    assert judged["met"] == "yes" and judged["asked_ms"] == 1.1
    assert judged["memory_met"] == met and judged["peak_over_scores"] == pytest.approx(sizes)
    judged = report.judge({**record, "median_ms": 3.1, "job": "decode"})
    assert judged["met"] == "no" and "memory_met" not in judged


def test_gpu_runner_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--tests-only"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_run_group_returns_the_whole_output(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text("def test_right(): pass\n\ndef test_wrong():\n    assert 1 == 2, 'why'\n")
    far = time.monotonic() + 120
    outcome = gpu_tests.run_group("it", [f"{path}::test_wrong", f"{path}::test_right"], far, 1)
    assert not outcome.passed
    assert "AssertionError: why" in outcome.output
    assert outcome.summary.startswith("1 failed, 1 passed")
    assert gpu_tests.run_group("it", [f"{path}::test_right"], far, 1).passed


def test_run_group_stops_at_the_deadline(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text("import time\n\ndef test_slow():\n    time.sleep(600)\n")
    outcome = gpu_tests.run_group("it", [str(path)], time.monotonic() + 1, 1)
    assert not outcome.passed and outcome.summary == "not finished in time"
    assert outcome.seconds < 60


def test_files_with_gpu_tests_are_found():
    files = gpu_tests.gpu_test_files()
    assert "tests/flash_semicrf/streaming/triton/test_gpu.py" in files
    assert "tests/sklearn_api/test_gpu.py" in files


def test_page_shows_the_committed_csv():
    rows = report.read_csv(gpu.RESULTS)
    run = [(row["problem"], row["job"]) for row in rows]
    assert run == [(name, job) for name in problems.SHAPES for job in problems.JOBS]
    begin, end = markers()
    generated = PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert generated == f"\n{report.render(rows)}\n"

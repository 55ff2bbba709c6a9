"""The benchmark runner: small problems end to end, goals, tables, the isolation of peers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import peers, report
from benchmarks.children import edges, ours
from benchmarks.children.measure import PeakMemory, measure
from benchmarks.problems import EDGES_JOB, JOBS, PROBLEMS, Goal, Problem, make_inputs
from benchmarks.run import main

TINY = Problem("tiny", 2, 12, 3, 4, job="log_partition")
TINY_EDGES = replace(TINY, job=EDGES_JOB)


def test_problems_are_the_registered_ones():
    shapes = {(p.name, p.B, p.T, p.K, p.C, p.job) for p in PROBLEMS.values()}
    assert shapes == {
        ("k100-log-partition", 4, 1000, 100, 24, "log_partition"),
        ("k100-gradient", 4, 1000, 100, 24, "log_partition_gradient"),
        ("k100-decode", 4, 1000, 100, 24, "decode"),
        ("k100-posterior", 4, 1000, 100, 24, "posterior"),
        ("k100-entropy-gradient", 4, 1000, 100, 24, "entropy_gradient"),
        ("k1000-log-partition", 1, 10_000, 1000, 24, "log_partition"),
        ("linear-crf-gradient", 32, 500, 1, 16, "log_partition_gradient"),
        ("million-gradient", 1, 1_000_000, 100, 8, "log_partition_gradient"),
        ("exact-gradient", 8, 256, 16, 8, "edges_gradient"),
    }


def test_make_inputs_is_repeatable_and_centred():
    first, second = make_inputs(TINY), make_inputs(TINY)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["scores"].dtype == np.float32
    np.testing.assert_allclose(first["scores"].mean(1), 0, atol=1e-6)
    assert make_inputs(TINY, 5)["scores"].shape == (2, 5, 4)


def test_measure_counts_repeats_and_memory():
    calls = []

    def call():
        calls.append(np.ones(8_000_000).sum())
        return len(calls)

    record, result = measure(call, lambda: None, budget_seconds=0, max_repeats=5)
    assert result == 1
    assert record["repeats"] == 3
    assert record["min_s"] <= record["median_s"]
    assert record["peak_bytes"] is None or record["peak_bytes"] >= 50e6


def test_peak_memory_leaves_out_what_was_there_before():
    held = np.ones(8_000_000)
    with PeakMemory() as memory:
        pass
    assert memory.extra is None or memory.extra < held.nbytes / 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("job", JOBS)
def test_run_problem_checks_and_measures(job, dtype):
    record = ours.run_problem(replace(TINY, job=job, dtype=dtype), 0.0, 1)
    assert record["status"] == "ok"
    assert record["check_error"] <= 1e-9
    assert len(record["value"]) == TINY.B


def test_run_problem_does_not_time_a_wrong_result(monkeypatch):
    right = ours.log_partition

    def wrong(potentials, backend):
        return right(potentials, backend=backend) + (1e-3 if backend == "auto" else 0)

    monkeypatch.setattr(ours, "log_partition", wrong)
    monkeypatch.setattr(ours, "measure", lambda *_, **__: pytest.fail("timed a wrong result"))
    record = ours.run_problem(TINY, 0.0, 1)
    assert record["status"].startswith("failed: log_partition: error ")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_run_problem_on_an_edge_tensor(dtype):
    problem = replace(TINY_EDGES, dtype=dtype)
    record = edges.run_problem(problem, 0.0, 1)
    assert record["status"] == "ok"
    assert record["check_error"] <= edges.TOLERANCE[dtype]
    assert len(record["value"]) == problem.B


def test_run_problem_on_an_edge_tensor_does_not_time_a_wrong_result(monkeypatch):
    right = edges.job_call

    def wrong(leaf, **options):
        call = right(leaf, **options)
        return lambda: call() + (1e-3 if options.get("use_vectorized", True) else 0)

    monkeypatch.setattr(edges, "job_call", wrong)
    monkeypatch.setattr(edges, "measure", lambda *_, **__: pytest.fail("timed a wrong result"))
    record = edges.run_problem(replace(TINY_EDGES, dtype="float64"), 0.0, 1)
    assert record["status"].startswith("failed: log Z: error ")


def test_command_line_writes_json_and_csv(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*report.markers()))
    options = ["--output", str(tmp_path / "results"), "--docs", str(page)]
    options += ["--budget", "0", "--max-repeats", "3", "--peers"]
    assert main([*options, "--problem", "linear-crf-gradient"]) == 0

    records = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [record["implementation"] for record in records] == ["flash_semicrf"]
    with (tmp_path / "results" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    needed = ("median_s", "iqr_s", "repeats", "peak_bytes", "device", "cores", "commit", "torch")
    assert all(rows[0][name] for name in needed)

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `linear-crf-gradient` | 32, 500, 1, 16 | flash_semicrf |" in text
    assert "linear-crf-gradient" in capsys.readouterr().out


def test_command_line_rejects_unknown_problems(capsys):
    with pytest.raises(SystemExit):
        main(["--problem", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def record(name, implementation="flash_semicrf", **values):
    shape = {"problem": name, "implementation": implementation, "B": 1, "T": 10, "K": 2, "C": 5}
    return {**shape, "status": "ok", "median_s": 1.0, "peak_bytes": 800, **values}


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        (Goal("speedup", 2500, "peer"), "3e+03 x", True),
        (Goal("speedup", 3500, "peer"), "3e+03 x", False),
        (Goal("relative_time", 3, "other"), "2 x", True),
        (Goal("relative_time", 1.5, "other"), "2 x", False),
        (Goal("seconds", 0.5), "1 s", False),
        (Goal("memory", 2), "2 x", True),
        (Goal("speedup", 2, "absent"), "not measured", None),
        (Goal("relative_memory", 1, "peer"), "0.5 x", True),
        (Goal("relative_memory", 0.4, "peer"), "0.5 x", False),
        (Goal("relative_memory", 1, "absent"), "not measured", None),
    ],
)
def test_evaluate_goal(goal, value, reached):
    measured = {
        ("mine", report.OURS): record("mine"),
        ("mine", "peer"): record("mine", "peer", median_s=3000.0, peak_bytes=1600),
        ("other", report.OURS): record("other", median_s=0.5),
    }
    assert report.evaluate_goal(goal, "mine", measured)[1:] == (value, reached)


def test_replace_generated_requires_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="`page` must hold the lines"):
        report.replace_generated(page, "table")


FAKE_PEER = """
import torch

def semi_crf_streaming_forward(cum_scores, transition, duration_bias, lengths, K):
    return cum_scores[:, -1].sum(1) * 0 + K
"""


def test_peer_runs_in_a_process_without_this_package(tmp_path, monkeypatch):
    (tmp_path / "flash_semicrf").mkdir()
    (tmp_path / "flash_semicrf" / "__init__.py").write_text(FAKE_PEER)
    monkeypatch.setattr(peers, "install", lambda name: tmp_path)
    limits = {"budget_seconds": 0.0, "max_repeats": 1, "timeout": 120.0}
    result = peers.run_peer("flash-semicrf", TINY, **limits)
    assert result["status"] == "ok"
    assert result["value"] == [3.0, 3.0]

    # An empty folder: the name resolves to nothing, or to this package; neither is timed.
    monkeypatch.setattr(peers, "install", lambda name: tmp_path / "flash_semicrf")
    assert peers.run_peer("flash-semicrf", TINY, **limits)["status"].startswith("failed: ")


FAKE_TORCH_STRUCT = """
LogSemiring = None

class SemiMarkov:
    def __init__(self, semiring):
        pass

    def sum(self, edges):
        return edges.flatten(1).sum(1) * 0 + edges.shape[1]
"""


def test_peer_takes_an_edge_tensor_one_sequence_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "torch_struct.py").write_text(FAKE_TORCH_STRUCT)
    monkeypatch.setattr(peers, "install", lambda name: tmp_path)
    limits = {"budget_seconds": 0.0, "max_repeats": 1, "timeout": 120.0}
    result = peers.run_peer("torch-struct", TINY_EDGES, **limits)
    assert result["status"] == "ok"
    assert result["value"] == [11.0, 11.0]


def test_peer_that_cannot_be_installed_is_reported(tmp_path, monkeypatch):
    def refuse(name):
        raise peers.PeerUnavailable("not installed: no network")

    monkeypatch.setattr(peers, "install", refuse)
    limits = {"budget_seconds": 0.0, "max_repeats": 1, "timeout": 1.0}
    result = peers.run_peer("torch-struct", TINY, **limits)
    assert result == {"status": "not installed: no network"}

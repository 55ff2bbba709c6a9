"""Run the tests marked ``gpu`` in several processes at once.

Compilation takes most of their time, so the tests of one group (``pytest.mark.gpu(group=...)``, or
else one test function) run in one process: processes that need the same kernels would each compile
them. What one has compiled, the others find in Triton's cache on the disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.processes import ROOT

MAX_PROCESSES = 16


class Outcome(NamedTuple):
    """Outcome of the tests of one group."""

    group: str
    seconds: float
    passed: bool
    output: str

    @property
    def summary(self) -> str:
        """The last line that pytest printed."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """Files that have tests marked ``gpu``; the others may need packages that are not there."""
    # Backwards: what needs one long compilation for a few tests starts first.
    files = sorted((root / "tests").rglob("test_*.py"), reverse=True)
    marked = [f for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]
    return [f.relative_to(root).as_posix() for f in marked]


class _Collector:
    """Pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("gpu")
    return marker.kwargs.get("group") or getattr(item, "originalname", item.name)


def collect_groups(files: list[str]) -> dict[str, list[str]]:
    """Ids of the tests of each group, in order of first appearance.

    Raises
    ------
    RuntimeError
        Where a file cannot be collected; with the message of pytest.
    """
    collector = _Collector()
    said = io.StringIO()
    options = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(said):
        status = pytest.main([*options, f"--rootdir={ROOT}", *files], plugins=[collector])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the GPU tests cannot be collected:\n{said.getvalue()}")
    groups: dict[str, list[str]] = {}
    for item in collector.items:
        groups.setdefault(_group(item), []).append(item.nodeid)
    return groups


def run_group(group: str, tests: list[str], deadline: float, threads: int) -> Outcome:
    """Run the tests of one group in a process of its own, until `deadline` on the clock."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - began))
            passed = process.returncode == 0
        except subprocess.TimeoutExpired:
            process.kill()
            output, passed = process.communicate()[0] + "\nnot finished in time", False
    return Outcome(group, time.monotonic() - began, passed, output)


def run_tests(seconds: float, processes: int | None = None) -> bool:
    """Run all GPU tests within so many seconds; print every failure in full.

    Returns
    -------
    bool
        Whether all of them passed, or were skipped for a reason that is printed.
    """
    began = time.monotonic()
    files = gpu_test_files()
    groups = collect_groups(files)
    # Of a file that is skipped as a whole there are no tests: it is named, with the reason.
    empty = [f for f in files if not any(t.startswith(f) for ids in groups.values() for t in ids)]
    groups |= {file: [file] for file in empty}
    cores = os.cpu_count() or 1
    processes = processes or min(MAX_PROCESSES, cores)
    threads = max(1, cores // processes)
    tests = sum(map(len, groups.values()))
    print(f"{tests} tests in {len(groups)} groups, {processes} processes", flush=True)
    outcomes = []

    def run(group: str) -> None:
        outcome = run_group(group, groups[group], began + seconds, threads)
        if group in empty and "skipped" in outcome.summary:  # pytest: nothing was run
            outcome = outcome._replace(passed=True)
        word = "ok" if outcome.passed else "FAILED"
        print(f"{word:<7}{outcome.seconds:6.1f} s  {group}: {outcome.summary}", flush=True)
        outcomes.append(outcome)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, groups))
    for outcome in outcomes:
        if not outcome.passed:
            print(f"\n{'=' * 20} {outcome.group}\n{outcome.output}")
        elif "skipped" in outcome.summary:
            lines = [line for line in outcome.output.splitlines() if line.startswith("SKIPPED")]
            print("\n".join(dict.fromkeys(lines)))
    failed = sum(not outcome.passed for outcome in outcomes)
    wall = time.monotonic() - began
    print(f"GPU tests: {len(groups) - failed} of {len(groups)} groups passed in {wall:.0f} s")
    return failed == 0

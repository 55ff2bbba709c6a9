"""Start a measurement in a fresh process, and describe the machine it runs on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_child(
    arguments: list[str],
    *,
    output: Path,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float,
) -> dict[str, Any]:
    """Run ``python ARGUMENTS`` in `folder` and read the record that it writes to `output`.

    Returns
    -------
    dict
        The record; where there is none, its "status" says why.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"failed: no result in {timeout:.0f} s"}
    if done.returncode != 0:
        return _failure(done.stderr, done.returncode)
    return json.loads(output.read_text())


def _failure(errors: str, code: int) -> dict[str, Any]:
    """The record of a process that failed: the last line of its errors."""
    lines = errors.strip().splitlines() or [f"exit status {code}"]
    return {"status": f"failed: {lines[-1]}"}


class Companion:
    """A child process that stays, for measurements that take turns with those of others.

    It writes a line of JSON when it is ready, and one for each line of JSON that it reads.

    Parameters
    ----------
    arguments : list of str
        Of ``python``, which runs in `ROOT`.
    timeout : float
        Seconds that an answer may take.
    """

    def __init__(self, arguments: list[str], *, timeout: float) -> None:
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads fills up
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def answer(self) -> dict[str, Any]:
        """The next record that the process writes; where there is none, its "status" says why."""
        watch = threading.Timer(self._timeout, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            in_time = watch.is_alive()
            watch.cancel()
        if line:
            return json.loads(line)
        if not in_time:
            return {"status": f"failed: no result in {self._timeout:.0f} s"}
        code = self._process.wait()
        self._errors.seek(0)
        return _failure(self._errors.read(), code)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        with contextlib.suppress(OSError):  # it has died: `answer` has the reason
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process, by `benchmarks.children.spin`."""
    command = [sys.executable, "-m", "benchmarks.children.spin", str(os.getpid())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()  # written once it is on its core
            yield
        finally:
            process.kill()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def installed_version(package: str) -> str:
    """Version of an installed package; "none" where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def available_cores() -> list[int]:
    """The cores that this process may run on; all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def load_average() -> float:
    """Processes that ran or waited for a core over the last minute; NaN where it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def describe_environment(checkout: Path = ROOT) -> dict[str, Any]:
    """Device, versions and commit: what a figure means nothing without.

    Parameters
    ----------
    checkout : Path
        The working tree whose commit is meant.
    """
    cores = available_cores()
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    settings = [
        f"{k}={v}" for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))
    ]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": _cpu_model(),
        "cores": len(cores),
        "affinity": " ".join(map(str, cores)),
        "threads": torch.get_num_threads(),
        "openmp": " ".join(sorted(settings)),
        "load": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": installed_version("numba"),
        "commit": (_git(checkout, "rev-parse", "--short=12", "HEAD") or "unknown")
        + ("+changes" if changed else ""),
    }

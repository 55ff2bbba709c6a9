"""Start a measurement in a fresh process, and describe the machine it runs on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
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
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"status": f"failed: {lines[-1]}"}
    return json.loads(output.read_text())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
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


def describe_environment() -> dict[str, Any]:
    """Device, versions and commit: what a figure means nothing without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": installed_version("numba"),
        "commit": (_git("rev-parse", "--short=12", "HEAD") or "unknown")
        + ("+changes" if changed else ""),
    }

"""The peers: each installed into a folder of its own and run as a black box in its own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.problems import Problem, make_inputs
from benchmarks.processes import run_child

# Without their dependencies: all of them need torch, and must share ours.
REQUIREMENTS = {
    "flash-semicrf": "flash-semicrf==0.2.0",
    "torch-struct": "torch-struct==0.5",
    "pytorch-crf": "pytorch-crf==0.7.2",
    "python-crfsuite": "python-crfsuite==0.9.12",
}

CHILDREN = Path(__file__).parent / "children"


class PeerUnavailable(RuntimeError):
    """The peer could not be installed."""


def cache_folder() -> Path:
    """Where peers are installed: outside the tree, and kept from run to run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flash_semicrf_peers"


def install(name: str, cache: Path | None = None) -> Path:
    """Install a peer with pip unless it is there already.

    Returns
    -------
    Path
        The folder to put first on the path.

    Raises
    ------
    PeerUnavailable
        With the last line of what pip said.
    """
    folder = (cache or cache_folder()) / REQUIREMENTS[name].replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Installed aside and renamed, so that an interrupted install is not taken for a whole one.
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        target = Path(aside) / "install"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(target), REQUIREMENTS[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["pip failed"]
            raise PeerUnavailable(f"not installed: {lines[-1]}")
        target.rename(folder)
    return folder


def memory_limit() -> int:
    """Half of the machine's memory, in bytes: what a peer may allocate."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def run_peer(
    name: str, problem: Problem, *, budget_seconds: float, max_repeats: int, timeout: float
) -> dict[str, Any]:
    """Measure one peer on one problem.

    Returns
    -------
    dict
        As `benchmarks.children.measure.measure` makes it, with "status" and "value".
    """
    try:
        folder = install(name)
    except PeerUnavailable as error:
        return {"status": str(error)}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for program in ("peer.py", "measure.py"):
            shutil.copy(CHILDREN / program, work)
        np.savez(work / "inputs.npz", **make_inputs(problem))
        # The script's own folder comes first on sys.path, PYTHONPATH second, then the
        # environment's packages, where an editable install of this repository may be.
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        arguments = [name, problem.job, "inputs.npz", "record.json", str(folder)]
        arguments += [str(budget_seconds), str(max_repeats), str(memory_limit())]
        return run_child(
            [str(work / "peer.py"), *arguments],
            output=work / "record.json",
            folder=work,
            environment=environment,
            timeout=timeout,
        )

"""``python -m flash_semicrf.compile`` fills the cache, from which other processes load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flash_semicrf.compile import OPERATIONS, Task, compile_task, main

COMPILED = """
from flash_semicrf.compile import Task, compile_task
from flash_semicrf.streaming.compilation import watched

found = []
with watched(found.append):
    compile_task(Task("viterbi"))
print(len(found))
"""


def run(folder, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_cache_is_filled(tmp_path):
    command = ["-m", "flash_semicrf.compile", "--operations", "viterbi", "--processes", "2"]
    result = run(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    assert "1 of 1" in result.stderr
    assert "viterbi, static, float32" in result.stderr
    assert result.stdout == f"Compiled kernels are below {tmp_path}.\n"
    kernels = {path.name.partition(".")[0] for path in tmp_path.rglob("*.nbc")}
    assert kernels == {"viterbi"}
    result = run(tmp_path, "-c", COMPILED)
    assert result.stdout == "0\n", result.stderr


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", [{}, {"tail": True, "boundary": True}, {"by_duration": True}])
def test_every_operation_runs_on_every_kind(operation, kind):
    compile_task(Task(operation, dtype="float64", **kind))


def test_errors_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["--operations", "logz"])
    assert "invalid choice: 'logz'" in capsys.readouterr().err

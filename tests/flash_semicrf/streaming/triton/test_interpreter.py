"""The kernels without a GPU: `interpreted*.py` in processes whose Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_semicrf.streaming.triton.backend import HAS_TRITON

ROOT = Path(__file__).parents[4]

FILES = sorted(path.name for path in Path(__file__).parent.glob("interpreted*.py"))


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    path = Path(__file__).with_name(name).relative_to(ROOT)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    # No device: the interpreter would copy every tensor to and from it.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

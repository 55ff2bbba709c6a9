"""What is said while kernels are compiled, and what the garbage collector does meanwhile."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import time

import pytest

from flash_semicrf.streaming import compilation
from flash_semicrf.streaming.compilation import compiling, told, watched

FIT = """
import logging, sys
from sklearn_api import SemiCRFSegmenter
from sklearn_api.datasets import make_segmentations

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
X, y = make_segmentations(6, (20, 30), random_state=0)
SemiCRFSegmenter("linear", max_epochs=2, verbose=1, random_state=0).fit(X, y).predict(X)
"""


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(compilation, "_said", set())
    monkeypatch.setattr(compilation, "PATIENCE", 0.05)


def test_one_line_per_device_when_it_takes_long(nothing_said, caplog):
    caplog.set_level(logging.INFO, "flash_semicrf")
    heard = []
    with told(heard.append), told(None):
        for device in ("CPU", "CPU", "GPU"):
            with compiling("kernel", device):
                time.sleep(0.3)
    with compiling("kernel", "GPU"):
        time.sleep(0.3)
    assert [record.getMessage() for record in caplog.records] == heard
    assert [line.split()[3] for line in heard] == ["CPU", "GPU"]
    assert all("python -m flash_semicrf.compile" in line for line in heard)


def test_nothing_is_said_when_it_is_quick(nothing_said, caplog):
    caplog.set_level(logging.INFO, "flash_semicrf")
    with compiling("kernel", "CPU"):
        pass
    time.sleep(0.2)
    assert not caplog.records


def test_watchers_get_the_times():
    found = []
    with watched(found.append), compiling("kernel", "CPU"):
        time.sleep(0.02)
    with compiling("another", "CPU"):
        pass
    (one,) = found
    assert (one.kernel, one.device) == ("kernel", "CPU")
    assert one.seconds >= 0.02 > one.cpu_seconds >= 0.0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_also_after_an_error(enabled):
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(RuntimeError, match="no"), compiling("kernel", "CPU"):
            assert not gc.isenabled()
            raise RuntimeError("no")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_first_fit_says_it_before_the_first_epoch(tmp_path):
    command = [sys.executable, "-c", FIT]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for cold in (True, False):
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        logged = [i for i, line in enumerate(lines) if line.startswith("flash_semicrf: ")]
        printed = [i for i, line in enumerate(lines) if line.startswith("flash_semicrf compiles")]
        assert len(logged) == len(printed) == (1 if cold else 0)
        epochs = [i for i, line in enumerate(lines) if line.split()[:1] == ["1"]]
        assert all(i < epochs[0] for i in printed + logged)

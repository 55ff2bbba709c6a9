"""Kernels: compiled again where their cache is damaged or blocked, imported from an archive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numba
import pytest

from flash_semicrf.streaming.cpu import jit, parts

ROOT = Path(__file__).parents[4]


def double(x):
    return 2 * x


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and no warning given so far."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "_warned", False)
    return tmp_path


def compile_cached():
    """A compiled function as in a new process."""
    return jit.cached(parts.whole(double), double)


def hits(expected_warnings: int = 0) -> int:
    """Call a kernel as a new process would; return how often its cache served."""
    compiled = compile_cached()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled(21) == 42
        assert compiled(1.5) == 3.0
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == expected_warnings, messages
    assert all("Compiled kernels in " in message for message in messages)
    return sum(compiled.stats.cache_hits.values())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"")])
def test_damaged_files_are_replaced_with_one_warning(cache, suffix, damage):
    assert hits() == 0
    assert hits() == 2
    for path in cache.rglob(f"*.{suffix}"):
        damage(path)
    assert hits(expected_warnings=1) == 0
    assert hits() == 2


def test_files_that_cannot_be_read_or_written_are_done_without(cache):
    hits()
    (index,) = cache.rglob("*.nbi")
    index.unlink()
    index.mkdir()  # permissions would not stop root
    assert hits(expected_warnings=1) == 0


def test_a_folder_that_can_no_longer_be_written_is_done_without(cache, monkeypatch):
    compiled = compile_cached()
    folder = Path(compiled._cache.cache_path)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR to one that can be written"):
        assert compiled(21) == 42
    assert compiled(1.5) == 3.0


def test_the_package_is_imported_from_an_archive(tmp_path):
    archive = tmp_path / "packages.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((ROOT / "flash_semicrf").rglob("*.py")):
            file.write(path, path.relative_to(ROOT))
    code = f"""
import importlib, pkgutil
import flash_semicrf.streaming.cpu as cpu
from flash_semicrf.streaming.cpu.jit import STAMP

assert cpu.__path__[0].startswith({str(archive)!r})
assert STAMP == {jit.STAMP!r}
for module in pkgutil.walk_packages(cpu.__path__, f"{{cpu.__name__}}."):
    importlib.import_module(module.name)
"""
    environment = {**os.environ, "PYTHONPATH": str(archive), "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr

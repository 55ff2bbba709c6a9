"""Counts of `benchmarks.house`, on packages made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import house

SOURCES = {
    "flash_semicrf/__init__.py": "from flash_semicrf.a import f\n",
    "flash_semicrf/a/__init__.py": "from .one import f\n",
    "flash_semicrf/a/one.py": "def f():\n    from flash_semicrf.b import _g\n",
    "flash_semicrf/b.py": (
        "from flash_semicrf.a import one\ndef _g(a, b, c, d, e, f, g, h, i, j, k): ...\n"
    ),
    "flash_semicrf/c.py": ("if TYPE_CHECKING:\n    from flash_semicrf import d\n"),
    "flash_semicrf/d.py": "import flash_semicrf.c\n",
    "flash_semicrf/triton/k.py": "@kernel\ndef k(a, b, c, d, e, f, g, h, i, j, k): ...\n",
}


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Path]:
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return house.modules(tmp_path)


def test_modules_and_lines(found):
    assert set(found) == {"flash_semicrf", *(f"flash_semicrf.{x}" for x in "abcd")} | {
        "flash_semicrf.a.one",
        "flash_semicrf.triton.k",
    }
    assert house.count_lines(list(found.values())) == 11


def test_imports_are_resolved_and_those_for_types_left_out(found):
    assert house.imports("flash_semicrf.a", found) == {("flash_semicrf.a.one", "f")}
    assert house.imports("flash_semicrf.a.one", found) == {("flash_semicrf.b", "_g")}
    assert house.imports("flash_semicrf.b", found) == {("flash_semicrf.a.one", "")}
    assert house.imports("flash_semicrf.c", found) == set()
    assert house.imports("flash_semicrf.d", found) == {("flash_semicrf.c", "")}


def test_circles_between_modules_and_rooms(found):
    between_modules, between_rooms = house.graphs(found)
    assert house.circles(between_modules) == [{"flash_semicrf.a.one", "flash_semicrf.b"}]
    assert house.circles(between_rooms) == [{"flash_semicrf.a", "flash_semicrf.b"}]


def test_long_signatures_outside_triton(found):
    assert house.long_signatures(found) == [("flash_semicrf.b", "_g", 11)]

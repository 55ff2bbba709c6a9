"""The unusual problems of `benchmarks.cliffs`, made small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import cliffs

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("name", cliffs.CLIFFS)
def test_results_are_right(name):
    small = replace(cliffs.CLIFFS[name], shape=(3, 60, 12, 3))
    ordinary, unusual = cliffs.make(small)
    same = all(np.array_equal(ordinary[key], unusual[key]) for key in ordinary)
    assert not same
    cliffs.check(small, "cpu")


def test_one_long_is_compared_with_as_many_positions():
    ordinary, unusual = cliffs.make(cliffs.CLIFFS["one-long"])
    totals = [int(inputs["lengths"].sum()) for inputs in (ordinary, unusual)]
    assert totals[0] == pytest.approx(totals[1], rel=0.01)
    assert ordinary["scores"].shape[1] == ordinary["lengths"][0]


def test_table(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- cliffs: begin -->\n<!-- cliffs: end -->\n")
    cliffs.main(["--cliff", "short-transitions", "--budget", "0", "--docs", str(page)])
    text = page.read_text()
    assert "| transitions times 10,000, short sequences | 64, 200, 20, 12 |" in text
    assert "x " in text.splitlines()[-2]
    assert "written" not in capsys.readouterr().err

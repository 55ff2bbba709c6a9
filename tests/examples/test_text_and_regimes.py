"""The examples of text and of regimes run, on a small setting, and draw what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *options):
    return runpy.run_path(str(EXAMPLES / name))["main"]([str(option) for option in options])


def test_plot_chunking_runs(tmp_path, capsys):
    picture = tmp_path / "chunking.png"
    scores = run("plot_chunking.py", "--texts", 6, "--output", picture)
    printed = capsys.readouterr().out
    assert "precision" in printed and "Heaviest weights" in printed and "[NP " in printed
    assert scores["words"] > 0.65
    assert scores["words and parts of speech"] > 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_regimes_runs(tmp_path, capsys):
    picture = tmp_path / "regimes.png"
    setting = "--train 6 --test 2 --length 600 --folds 2 --epochs 40 --max-duration 40".split()
    scores = run("plot_regimes.py", *setting, "--output", picture)
    printed = capsys.readouterr().out
    assert "<- best" in printed and "longest segment" in printed
    assert scores["semi-Markov CRF"]["frame"] < scores["single positions"]["frame"]
    assert scores["semi-Markov CRF"]["segment"] < 0.5 < scores["single positions"]["segment"]
    assert picture.read_bytes().startswith(b"\x89PNG")

"""The examples run, on a small setting, and say and draw what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_plot_ecg_delineation_runs(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "plot_ecg_delineation.py"))["main"]
    picture = tmp_path / "ecg.png"
    options = "--train 40 --test 4 --epochs 10 --hidden-size 32 --output".split()
    scores = main([*options, str(picture)])
    printed = capsys.readouterr().out
    assert "train_loss" in printed and "mean absolute" in printed
    assert len(scores) == 12
    assert scores["QRS", "onset", 150] > 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")

"""The examples of bird song and genes run, on a small setting, and find what they look for."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.flash_semicrf.cases import long

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG"


def test_plot_birdsong_names_the_syllables(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "plot_birdsong.py"))["main"]
    picture = tmp_path / "song.png"
    options = "--train 4 --test 2 --epochs 10 --hidden-size 24 --output".split()
    errors = main([*options, str(picture)])
    printed = capsys.readouterr().out
    assert "train_loss" in printed and "syllable error rate" in printed
    assert errors["syllable error rate"] < 0.1
    assert errors["frame error"] < 0.05
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("--length 16000 --epochs 4 --hidden-size 16", ["coding F1"]),
        long("--length 40000 --epochs 3", ["coding F1", "position accuracy"]),
    ],
)
def test_plot_gene_structure_beats_long_reading_frames(setting, names, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "plot_gene_structure.py"))["main"]
    picture = tmp_path / "genes.png"
    options = f"--test V {setting} --start 0 --stop 10000 --quiet --output".split()
    results = main([*options, str(picture)])
    assert f"{options[3]} bases segmented" in capsys.readouterr().out
    model, baseline, _ = results.values()
    assert all(model[name] > baseline[name] for name in names)
    assert picture.read_bytes().startswith(PNG)

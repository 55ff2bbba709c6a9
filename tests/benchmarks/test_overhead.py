"""The benchmark of the overhead of `fit` runs, and its parts are those of an epoch."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import overhead


def test_overhead_is_measured(tmp_path, capsys, monkeypatch):
    small = overhead.Case({"hidden_size": 4, "num_layers": 1}, batch_size=2, num_sequences=3)
    monkeypatch.setitem(overhead.CASES, "cnn 48", small)
    arguments = ["--case", "cnn 48", "--repeats", "2", "--output", str(tmp_path)]
    assert overhead.main(arguments) == 0
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["batches"] == 2 and record["max_duration"] > 1
    assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
    times = [record[f"{name}_s"] for name in overhead.PARTS]
    assert min(times) > 0
    assert np.isclose(sum(times) + record["rest_s"], record["whole_s"])
    assert "| cnn 48 |" in capsys.readouterr().out


def test_parts_are_those_of_an_epoch():
    case = overhead.Case({"hidden_size": 4, "num_layers": 1}, batch_size=2, num_sequences=3)
    epoch = overhead.Epoch(case)
    before = epoch.segmenter.n_iter_
    assert epoch.whole() > 0
    assert epoch.segmenter.n_iter_ == before + 1
    head = epoch.module.head
    for parameter in epoch.module.parameters():
        parameter.grad = None
    epoch.encoder()
    assert head.transition.grad is None  # the encoder alone
    assert all(p.grad is not None for p in epoch.module.encoder.parameters())
    epoch.loss()
    assert head.transition.grad.isfinite().all()

"""Time that `fit` adds to its encoder: ``python -m benchmarks.overhead``.

The wall time of an epoch of `SemiCRFSegmenter` on ECGs over that of the encoder's own forward and
backward passes on the same batches, which any training has to pay. The two alternate in one
process, and each part of an epoch is also timed by itself: together they show where the rest goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.processes import describe_environment, load_average
from benchmarks.report import describe_machine, format_seconds, table, write_results
from sklearn_api import SemiCRFSegmenter
from sklearn_api._training.data import SequenceDataset, bucketed_loader
from sklearn_api.datasets import load_ecg

MOST = 1.25


class Case(NamedTuple):
    """An encoder, and the batches it sees."""

    params: dict[str, Any]
    batch_size: int = 8
    num_sequences: int = 16


CASES = {
    "cnn 48": Case({"hidden_size": 48}),
    "cnn 48, stride 4": Case({"hidden_size": 48, "module__stride": 4}),
    "cnn 48, 6 layers, stride 4": Case(
        {"hidden_size": 48, "num_layers": 6, "module__stride": 4, "dropout": 0.1}
    ),
    "cnn 128, 6 layers": Case({"hidden_size": 128, "num_layers": 6}, num_sequences=8),
}


class Epoch:
    """The parts of an epoch of one case, each as a function of no arguments.

    Parameters
    ----------
    case : Case
    """

    def __init__(self, case: Case) -> None:
        X, y = load_ecg(return_X_y=True)
        self.X, self.y = X[: case.num_sequences], y[: case.num_sequences]
        self.segmenter = SemiCRFSegmenter(
            "cnn",
            **case.params,
            max_epochs=1,
            batch_size=case.batch_size,
            n_iter_no_change=10**6,
            device="cpu",
            random_state=0,
        ).fit(self.X, self.y)
        sequences, segments = self.segmenter._prepare(self.X, self.y, None, False)
        self.dataset = SequenceDataset(sequences.values, segments)
        self.batches = list(self._load())
        self.module = self.segmenter.module_
        with torch.no_grad():
            self.hidden = [self.module(**inputs) for inputs, _ in self.batches]
        self.cotangents = [torch.randn_like(hidden) / hidden.numel() for hidden in self.hidden]
        self.module.train()

    def _load(self):
        return bucketed_loader(self.dataset, self.segmenter.batch_size, shuffle=True, seed=0)

    def whole(self) -> float:
        """Run one epoch of `fit`; return the seconds that it took without checking the data."""
        self.segmenter.net_.run(self.dataset, epochs=1, seed=self.segmenter.n_iter_)
        self.module.train()
        return self.segmenter.history_[-1]["dur"]

    def encoder(self) -> None:
        """Forward and backward pass of the encoder."""
        for (inputs, _), cotangent in zip(self.batches, self.cotangents, strict=True):
            self.module(**inputs).backward(cotangent)

    def loss(self) -> None:
        """Log-likelihood and its gradient, by the hidden states and the head's parameters."""
        net = self.segmenter.net_
        for (inputs, gold), hidden in zip(self.batches, self.hidden, strict=True):
            net.get_loss(hidden.requires_grad_(), gold, X=inputs).backward()

    def penalty(self) -> None:
        """The penalty and its gradient."""
        for _ in self.batches:
            self.module.penalty().backward()

    def batching(self) -> None:
        """Putting the batches together."""
        for _ in self._load():
            pass

    def step(self) -> None:
        """The optimiser."""
        for _ in self.batches:
            self.segmenter.net_.optimizer_.step()


PARTS = ("encoder", "loss", "penalty", "batching", "step")


def seconds(part: Callable[[], float | None]) -> float:
    """Wall time of a call, unless it measured its own."""
    began = time.perf_counter()
    own = part()
    return time.perf_counter() - began if own is None else own


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Time an epoch and its parts, in turn.

    Returns
    -------
    dict
        Median seconds of "whole" and of each of `PARTS`, and the median and quartiles of the ratio
        of "whole" to "encoder" in the same turn.
    """
    epoch = Epoch(case)
    parts = ("whole", *PARTS)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name in parts:
            taken = seconds(getattr(epoch, name))
            if turn:  # the first turn warms up
                found[name].append(taken)
    ratios = np.divide(found["whole"], found["encoder"])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    medians = {f"{name}_s": statistics.median(times) for name, times in found.items()}
    rest = medians["whole_s"] - sum(medians[f"{name}_s"] for name in PARTS)
    return {
        "batches": len(epoch.batches),
        "labels": len(epoch.segmenter.classes_),
        "max_duration": epoch.segmenter.max_duration_,
        **medians,
        "rest_s": rest,
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


def render(records: list[dict[str, Any]]) -> str:
    """Ratios, and where the time goes."""
    rows = []
    for record in records:
        ratio = f"{record['ratio']:.2f} ({record['ratio_low']:.2f} to {record['ratio_high']:.2f})"
        times = [format_seconds(record[f"{name}_s"]) for name in ("whole", *PARTS)]
        times.append(f"{1e3 * record['rest_s']:.3g} ms")  # of noise alone it may be negative
        rows.append([record["encoder"], ratio, "yes" if record["ratio"] <= MOST else "**no**"])
        rows[-1] += times
    header = ["encoder", "epoch / encoder (quartiles)", f"<= {MOST}", "epoch", *PARTS, "rest"]
    return table(header, rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7, help="turns of each case")
    parser.add_argument("--output", type=Path, help="folder of results.json and results.csv")
    options = parser.parse_args(argv)
    environment, records = describe_environment(), []
    for name in options.case:
        common = {"problem": "fit-overhead", "encoder": name, "load": load_average()}
        records.append({**environment, **common, **measure(CASES[name], options.repeats)})
    if options.output is not None:
        write_results(options.output, records)
    print(f"{describe_machine(records[0])}\n\n{render(records)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Delineation of electrocardiograms
=================================

Trains on the records of 160 patients, finds the P, QRS and T waves of 40 others, and draws one:

    python examples/plot_ecg_delineation.py

Between the waves the signal is at rest, and all rests look alike. The wave that may follow depends
on the preceding one, however: after a P wave it is a QRS complex. The rests are therefore named
after the preceding wave, and ``transition_constraints="observed"`` keeps the order of waves in the
cardiologists' annotations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.signal import butter, sosfiltfilt
from skorch.callbacks import LRScheduler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.datasets import load_ecg
from sklearn_api.display import SegmentationDisplay
from sklearn_api.metrics import boundary_errors, boundary_precision_recall_f1

WAVES = ["P", "QRS", "T"]
REST_AFTER = {"P": "PQ", "QRS": "ST", "T": "TP"}
RATE = 250  # positions in a second
PICTURE = Path(__file__).parent / "output" / "ecg_delineation.png"


def preprocess(signal: np.ndarray) -> np.ndarray:
    """Remove the slow drift of the baseline and scale the record to a common amplitude."""
    drift_free = butter(2, 0.5, "highpass", fs=RATE, output="sos")
    x = sosfiltfilt(drift_free, signal[:, 0] - np.median(signal))
    return (x / np.quantile(np.abs(x), 0.98)).astype(np.float32)[:, None]


def name_rests(labels: np.ndarray) -> np.ndarray:
    """Name each rest ("none") after the wave before it."""
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    stops = np.append(starts[1:], len(labels))
    named, before = labels.copy(), None
    for start, stop in zip(starts, stops, strict=True):
        if labels[start] == "none":
            named[start:stop] = REST_AFTER.get(before, "none")
        before = labels[start]
    return named


def merge_rests(labels: np.ndarray) -> np.ndarray:
    """Name all rests "none" again."""
    return np.where(np.isin(labels, WAVES), labels, "none")


def fit(X: list, y: list, epochs: int, hidden_size: int, verbose: int) -> SemiCRFSegmenter:
    """Train a dilated CNN with a semi-Markov CRF on top."""
    batch_size = 8
    schedule = LRScheduler(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=0.01,
        total_steps=epochs * -(-len(X) // batch_size),
        step_every="batch",
    )
    segmenter = SemiCRFSegmenter(
        "cnn",
        hidden_size=hidden_size,
        num_layers=6,
        dropout=0.1,
        module__stride=4,
        transition_constraints="observed",
        max_epochs=epochs,
        n_iter_no_change=epochs,  # the schedule decides when to stop
        batch_size=batch_size,
        callbacks=[schedule],
        random_state=0,
        verbose=verbose,
    )
    return segmenter.fit(X, y)


def report(y_true: list, y_pred: list) -> dict[tuple[str, str, int], float]:
    """Print how well onsets and offsets are found; return F1 by wave, boundary and tolerance."""
    scores = {}
    print(f"\n{'':14}{'within 150 ms':^28}{'within 40 ms':^28}{'mean absolute':>15}")
    print(f"{'':14}" + 2 * f"{'precision':>10}{'recall':>8}{'F1':>8}  " + f"{'error, ms':>15}")
    for wave in WAVES:
        for kind in ("onset", "offset"):
            line = f"{wave:>4} {kind:9}"
            for milliseconds in (150, 40):
                tolerance = milliseconds * RATE / 1000
                result = boundary_precision_recall_f1(
                    y_true, y_pred, tolerance=tolerance, labels=[wave], kind=kind
                )
                scores[wave, kind, milliseconds] = result.f1
                line += f"{result.precision:10.4f}{result.recall:8.4f}{result.f1:8.4f}  "
            error = boundary_errors(
                y_true, y_pred, tolerance=0.15 * RATE, labels=[wave], kind=kind
            )[wave]
            print(line + f"{1000 / RATE * np.abs(error).mean():15.1f}")
    return scores


def draw(
    segmenter: SemiCRFSegmenter, x: np.ndarray, signal: np.ndarray, truth: np.ndarray, path: Path
) -> None:
    """Save a picture of one record: truth, prediction and boundary posterior."""
    display = SegmentationDisplay.from_predictions(
        truth,
        merge_rests(segmenter.predict(x)),
        signal=signal,
        boundary_proba=segmenter.predict_boundary_proba(x),
        labels=WAVES,
        ignore_label="none",
        sampling_rate=RATE,
        signal_name="lead II, mV",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[tuple[str, str, int], float]:
    """Run the example; return F1 by wave, boundary and tolerance in milliseconds."""
    parser = argparse.ArgumentParser(description="Delineate electrocardiograms.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--train", type=int, default=160, help="train on the first so many records")
    parser.add_argument("--test", type=int, default=40, help="test on so many from record 160 on")
    parser.add_argument("--record", type=int, default=160, help="the record to draw")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--quiet", action="store_true", help="no line per epoch")
    options = parser.parse_args(argv)

    ecg = load_ecg()
    X = [preprocess(x) for x in ecg.X]
    y = [name_rests(labels) for labels in ecg.y]
    test = range(160, 160 + options.test)

    began = time.perf_counter()
    print(f"Training on {options.train} records, {options.epochs} epochs")
    segmenter = fit(
        X[: options.train],
        y[: options.train],
        options.epochs,
        options.hidden_size,
        int(not options.quiet),
    )
    print(f"Trained in {time.perf_counter() - began:.0f} s")

    predicted = segmenter.predict([X[i] for i in test])
    print(f"\nWaves of {len(test)} patients that the model has not seen:")
    scores = report([ecg.y[i] for i in test], [merge_rests(labels) for labels in predicted])
    i = options.record
    draw(segmenter, X[i], ecg.X[i], ecg.y[i], options.output)
    print(f"\nRecord {i}: truth, prediction and boundary posterior are in {options.output}")
    return scores


if __name__ == "__main__":
    # Convolutions this small gain little from a second thread, and wait for it on a busy machine.
    torch.set_num_threads(1)
    main()

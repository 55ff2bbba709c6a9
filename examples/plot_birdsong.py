"""Annotation of birdsong syllables
================================

Trains on the songs of a Bengalese finch from one day, annotates those of the next day, and draws
one:

    python examples/plot_birdsong.py

Two errors are reported. The frame error is the fraction of positions with a wrong label, including
silence. The syllable error rate is the number of insertions, deletions and substitutions that turn
the predicted string of syllables into the true one, per true syllable; it is the relevant error in
studies of song syntax.

Syllables last about fifty milliseconds, silences from four milliseconds to two seconds. Durations
therefore have individual scores up to `LONGEST_SCORED` and a constant log-rate beyond, and
``transition_constraints="observed"`` enforces the alternation of syllables and silences. All
settings were chosen on songs of the first day.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from skorch.callbacks import LRScheduler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.datasets import load_birdsong
from sklearn_api.display import SegmentationDisplay
from sklearn_api.metrics import frame_error_rate, segment_error_rate

LONGEST_SCORED = 40  # positions of 4 ms: longer than any syllable
PICTURE = Path(__file__).parent / "output" / "birdsong.png"


def fit(X: list, y: list, epochs: int, hidden_size: int, verbose: int) -> SemiCRFSegmenter:
    """Train a dilated CNN with a semi-Markov CRF on top, on crops of the songs."""
    schedule = LRScheduler(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=epochs)
    segmenter = SemiCRFSegmenter(
        "cnn",
        hidden_size=hidden_size,
        num_layers=5,
        dropout=0.2,
        module__stride=2,
        boundary_scores=True,
        max_duration=LONGEST_SCORED,
        duration_tail="geometric",
        transition_constraints="observed",
        solver="adamw",
        max_epochs=epochs,
        n_iter_no_change=epochs,  # the schedule decides when to stop
        crop_length=400,
        batch_size=4,
        callbacks=[schedule],
        random_state=0,
        verbose=verbose,
    )
    return segmenter.fit(X, y)


def report(segmenter: SemiCRFSegmenter, X: list, y: list) -> dict[str, float]:
    """Print the errors on some songs and return them."""
    errors = {
        "frame error": frame_error_rate(y, segmenter.predict(X)),
        "syllable error rate": segment_error_rate(
            y, segmenter.predict_segments(X), ignore_label="silence"
        ),
    }
    for name, error in errors.items():
        print(f"{name:20}{100 * error:6.2f} %")
    unknown = sorted(set(np.concatenate(y)) - set(segmenter.classes_))
    if unknown:
        print(f"Syllables that training does not have, always errors: {', '.join(unknown)}")
    return errors


def draw(
    segmenter: SemiCRFSegmenter, x: np.ndarray, truth: np.ndarray, rate: float, path: Path
) -> None:
    """Save a picture of one song: bands, truth, prediction and boundary posterior."""
    display = SegmentationDisplay.from_predictions(
        truth,
        segmenter.predict(x),
        signal=x,
        boundary_proba=segmenter.predict_boundary_proba(x),
        ignore_label="silence",
        sampling_rate=rate,
        signal_name="band",
    )
    display.figure_.set_figwidth(16)
    path.parent.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the example; return the two errors."""
    parser = argparse.ArgumentParser(description="Annotate songs of a Bengalese finch.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--hidden-size", type=int, default=48)
    parser.add_argument("--train", type=int, default=10, help="train on so many songs of day 1")
    parser.add_argument("--test", type=int, default=10, help="test on so many songs of day 2")
    parser.add_argument("--song", type=int, default=0, help="the song of day 2 to draw")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--quiet", action="store_true", help="no line per epoch")
    options = parser.parse_args(argv)

    song = load_birdsong()
    first, second = (np.flatnonzero(song.groups == day) for day in np.unique(song.groups))
    train, test = first[: options.train], second[: options.test]

    began = time.perf_counter()
    print(f"Training on {len(train)} songs of the first day, {options.epochs} epochs")
    segmenter = fit(
        song.X[train], song.y[train], options.epochs, options.hidden_size, int(not options.quiet)
    )
    print(f"Trained in {time.perf_counter() - began:.0f} s")

    print(f"\n{len(test)} songs of the second day:")
    errors = report(segmenter, song.X[test], song.y[test])
    drawn, picture = second[options.song], options.output
    draw(segmenter, song.X[drawn], song.y[drawn], song.sampling_rate, picture)
    print(
        f"\n{song.names[drawn]}: truth, prediction and boundary posterior are in {options.output}"
    )
    return errors


if __name__ == "__main__":
    # Convolutions this small gain little from a second thread, and wait for it on a busy machine.
    torch.set_num_threads(1)
    main()

"""Gene finding in a piece of a genome
===================================

Trains on pieces of five chromosomes of the worm C. elegans, labels every base of a piece of the
sixth in one run, and draws some of its genes:

    python examples/plot_gene_structure.py

A gene may be on either strand, and a gene on one strand is its mirror image on the other; training
therefore uses both readings of every piece. Coding sequence (CDS) is read in steps of three bases
and contains no stop codon in its reading frame, so the features of each base include the lengths of
the six open reading frames around it, and the encoder has a stride of three. Introns and intergenic
regions have tens to thousands of bases: durations have individual scores up to `LONGEST_SCORED`,
which covers most introns, and a constant log-rate beyond. Training uses random crops of the pieces;
prediction segments a piece as a whole.

The baseline labels every open reading frame longer than a threshold as coding; the threshold is
chosen on the training pieces. The piece of chromosome X, the default test, is unlike the others:
more than half of it are RNA genes, pseudogenes and transposable elements. ``--test II`` holds out a
more typical one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score, precision_recall_fscore_support
from skorch.callbacks import LRScheduler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.datasets import load_gene_structure
from sklearn_api.display import SegmentationDisplay
from sklearn_api.metrics import frame_error_rate, segment_precision_recall_f1

CODING = ["CDS+", "CDS-"]
LONGEST_SCORED = 100
CROP_LENGTH = 8000
PICTURE = Path(__file__).parent / "output" / "gene_structure.png"


def frame_lengths(bases: np.ndarray) -> np.ndarray:
    """Lengths of the open reading frames around each base, read from left to right.

    Returns an int array of shape (T, 3): column p is for the frame that reads the base as number p
    of a codon. TAA, TAG and TGA end a frame.
    """
    a, _, g, t = bases.T.astype(bool)
    stop = np.zeros(len(bases), dtype=bool)
    stop[:-2] = t[:-2] & ((a[1:-1] & (a[2:] | g[2:])) | (g[1:-1] & a[2:]))
    position = np.arange(len(bases))
    lengths = np.empty((len(bases), 3), dtype=np.int64)
    for frame in range(3):
        inside = position % 3 == frame
        edges = np.r_[frame - 3, position[stop & inside], len(bases) + 3]
        after = np.searchsorted(edges, position, side="right")
        lengths[:, frame] = edges[after] - edges[after - 1]
    return np.take_along_axis(lengths, (position[:, None] - np.arange(3)) % 3, axis=1)


def features(bases: np.ndarray) -> np.ndarray:
    """Bases, then log-lengths of the open reading frames of the + and the - strand: (T, 10)."""
    reverse = frame_lengths(bases[::-1, ::-1])[::-1]
    return np.hstack([bases, np.log(frame_lengths(bases)), np.log(reverse)], dtype=np.float32)


def reverse_complement(bases: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The other strand of a piece and its labels."""
    names, index = np.unique(y, return_inverse=True)
    other = np.array([name.translate(str.maketrans("+-", "-+")) for name in names])
    return bases[::-1, ::-1], other[index][::-1]


def long_frames(x: np.ndarray, threshold: float) -> np.ndarray:
    """The baseline: open reading frames longer than `threshold` bases, as labels of shape (T,)."""
    plus, minus = np.exp(x[:, 4:7]).max(axis=1), np.exp(x[:, 7:10]).max(axis=1)
    strand = np.where(plus >= minus, "CDS+", "CDS-")
    return np.where(np.maximum(plus, minus) > threshold, strand, "intergenic")


def choose_threshold(X: list, y: list) -> int:
    """The threshold of `long_frames` with the best F1 of coding positions."""

    def coding_f1(threshold: int) -> float:
        pred = np.concatenate([long_frames(x, threshold) for x in X])
        return f1_score(true, pred, labels=CODING, average="micro")

    true = np.concatenate(y)
    return max(range(200, 601, 100), key=coding_f1)


def fit(X: list, y: list, epochs: int, hidden_size: int, verbose: int) -> SemiCRFSegmenter:
    """Train a dilated CNN with a semi-Markov CRF on top, on crops of the pieces."""
    most_crops = sum(len(x) // CROP_LENGTH + 2 for x in X)
    schedule = LRScheduler(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=0.01,
        total_steps=epochs * most_crops,
        step_every="batch",
    )
    segmenter = SemiCRFSegmenter(
        "cnn",
        hidden_size=hidden_size,
        num_layers=6,
        kernel_size=7,
        dropout=0.1,
        module__stride=3,
        boundary_scores=True,
        max_duration=LONGEST_SCORED,
        duration_tail="geometric",
        transition_constraints="observed",
        solver="adamw",
        max_epochs=epochs,
        n_iter_no_change=epochs,  # the schedule decides when to stop
        crop_length=CROP_LENGTH,
        batch_size=1,
        window_length=32768,
        callbacks=[schedule],
        random_state=0,
        verbose=verbose,
    )
    return segmenter.fit(X, y)


def score(y_true: np.ndarray, y_pred: np.ndarray, segments: list | None = None) -> dict[str, float]:
    """Accuracy of positions, and how well coding positions and whole coding exons are found.

    Exons are those of `segments`, or else the runs of labels of `y_pred`.
    """
    coding = precision_recall_fscore_support(
        y_true, y_pred, labels=CODING, average="micro", zero_division=0.0
    )
    exons = {"labels": CODING, "zero_division": 0.0}
    found = y_pred if segments is None else segments
    return {
        "position accuracy": 1 - frame_error_rate(y_true, y_pred),
        "without ncRNA": 1 - frame_error_rate(y_true, y_pred, ignore_label="ncRNA/pseudo/TE"),
        "coding precision": coding[0],
        "coding recall": coding[1],
        "coding F1": coding[2],
        "exon F1, exact": segment_precision_recall_f1(y_true, found, **exons).f1,
        "exon F1, 10 bases": segment_precision_recall_f1(y_true, found, tolerance=10, **exons).f1,
    }


def report(results: dict[str, dict[str, float]]) -> None:
    """Print a table of scores: one column per method."""
    print(f"\n{'':20}" + "".join(f"{name:>22}" for name in results))
    for name in next(iter(results.values())):
        print(f"{name:20}" + "".join(f"{scores[name]:22.3f}" for scores in results.values()))


def draw(
    segmenter: SemiCRFSegmenter,
    x: np.ndarray,
    truth: np.ndarray,
    pred: np.ndarray,
    part: slice,
    path: Path,
) -> None:
    """Save a picture of a part of a piece: open reading frames, truth, prediction, boundaries."""
    # Columns are ordered by the place of the base in a codon; the picture shows fixed frames.
    place = np.arange(len(x))
    frames = [
        np.take_along_axis(columns, (along[:, None] - np.arange(3)) % 3, axis=1)
        for columns, along in ((x[:, 4:7], place), (x[:, 7:10], place[::-1]))
    ]
    display = SegmentationDisplay.from_predictions(
        truth[part],
        pred[part],
        signal=np.hstack(frames)[part],
        boundary_proba=segmenter.predict_boundary_proba(x)[part],
        labels=[label for label in segmenter.classes_ if label != "intergenic"],
        ignore_label="intergenic",
        signal_name="reading frame, + and -",
    )
    display.figure_.set_figwidth(16)
    path.parent.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example; return the scores by method."""
    parser = argparse.ArgumentParser(description="Find genes of C. elegans.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--test", default="X", help="train on the other chromosomes")
    parser.add_argument("--length", type=int, help="use only so many bases of each piece")
    parser.add_argument("--start", type=int, default=100000, help="first base to draw")
    parser.add_argument("--stop", type=int, default=120000, help="and one past the last")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--quiet", action="store_true", help="no line per epoch")
    options = parser.parse_args(argv)

    genes = load_gene_structure()
    pieces = [
        (x[: options.length], y[: options.length]) for x, y in zip(genes.X, genes.y, strict=True)
    ]
    held_out = genes.groups.tolist().index(options.test)
    bases, y_test = pieces.pop(held_out)
    x_test = features(bases)
    train = [*pieces, *(reverse_complement(*piece) for piece in pieces)]
    X, y = [features(bases) for bases, _ in train], [labels for _, labels in train]

    began = time.perf_counter()
    print(f"Training on {sum(map(len, y))} bases of both strands, {options.epochs} epochs")
    segmenter = fit(X, y, options.epochs, options.hidden_size, int(not options.quiet))
    print(f"Trained in {time.perf_counter() - began:.0f} s")

    began = time.perf_counter()
    predicted = segmenter.predict(x_test)
    seconds = time.perf_counter() - began
    print(f"\nChromosome {options.test}: {len(x_test)} bases segmented in {seconds:.1f} s")
    threshold = choose_threshold(X[: len(pieces)], y[: len(pieces)])
    results = {
        "semi-Markov CRF": score(y_test, predicted, segmenter.predict_segments(x_test)),
        f"frames over {threshold}": score(y_test, long_frames(x_test, threshold)),
        "all intergenic": score(y_test, np.full_like(y_test, "intergenic")),
    }
    report(results)
    part = slice(options.start, options.stop)
    draw(segmenter, x_test, y_test, predicted, part, options.output)
    print(f"\nBases {options.start} to {options.stop}: a picture is in {options.output}")
    return results


if __name__ == "__main__":
    # Convolutions this small gain little from a second thread, and wait for it on a busy machine.
    torch.set_num_threads(1)
    main()

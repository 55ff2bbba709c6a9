"""Regimes of a machine from its vibration
=======================================

Searches for the duration parameters, segments held-out recordings, and draws one:

    python examples/plot_regimes.py

The recordings are synthetic. A machine is idle, working or overloaded; each regime has its own
mean, variance and pitch, and its own durations: work lasts about a minute, overload about twenty
seconds, and idling has no typical duration, occasionally ten minutes. A classifier of single
positions can use only the first three. With a ``duration_tail`` the semi-Markov CRF finds segments
longer than ``max_duration`` in one piece. No true segment is cut in training, so the likelihood of
held-out recordings is a valid criterion for ``max_duration`` and the distribution of durations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import lfilter
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.display import BoundaryDisplay, SegmentationDisplay
from sklearn_api.metrics import (
    boundary_precision_recall_f1,
    frame_error_rate,
    log_likelihood_scorer,
    segment_error_rate,
)
from sklearn_api.model_selection import SequenceKFold
from sklearn_api.preprocessing import PerPosition

PICTURE = Path(__file__).parent / "output" / "regimes.png"
RATE = 1  # positions in a second
# Mean, standard deviation, and pitch in cycles per position of each regime.
REGIMES = {"idle": (0.0, 0.6, 0.02), "work": (0.3, 0.9, 0.10), "overload": (0.5, 1.1, 0.16)}
FOLLOWERS = {"idle": ["work"], "work": ["idle", "overload"], "overload": ["work"]}


def draw_duration(regime: str, rng: np.random.Generator) -> int:
    """Draw how many positions a regime lasts."""
    if regime == "idle":
        return 10 + int(rng.exponential(120))
    mean, shape = {"work": (60, 30), "overload": (20, 15)}[regime]
    return 1 + int(rng.gamma(shape, mean / shape))


def record(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a recording of shape (length,) and the regime at each of its positions."""
    labels: list[str] = []
    regime = str(rng.choice(list(REGIMES)))
    while len(labels) < length:
        labels += [regime] * draw_duration(regime, rng)
        regime = str(rng.choice(FOLLOWERS[regime]))
    y = np.array(labels[:length])
    signal = 0.3 * rng.normal(size=length)
    for regime, (mean, scale, pitch) in REGIMES.items():
        # White noise through a resonance: a pitch that wanders in phase and loudness.
        damping = 0.9
        poles = [1, -2 * damping * np.cos(2 * np.pi * pitch), damping**2]
        tone = lfilter([1], poles, rng.normal(size=length))
        signal += (y == regime) * (mean + scale * tone / tone.std())
    return signal, y


def features(signal: np.ndarray, width: int = 9) -> np.ndarray:
    """Mean, spread and roughness of the signal around each position, of shape (T, 3)."""
    mean = uniform_filter1d(signal, width)
    spread = uniform_filter1d((signal - mean) ** 2, width)
    rough = uniform_filter1d(np.diff(signal, prepend=signal[0]) ** 2, width)
    return np.stack([mean, np.log(spread), np.log(rough)], axis=1)


def search(X: list, y: list, grid: dict, folds: int, epochs: int) -> GridSearchCV:
    """Fit all settings of a grid; keep the one with the largest held-out likelihood."""
    pipeline = make_pipeline(
        PerPosition(StandardScaler()),
        SemiCRFSegmenter(
            duration_tail="geometric",
            transition_constraints="observed",
            boundary_scores=True,
            alpha=0.1,
            learning_rate=0.1,
            max_epochs=epochs,
            batch_size=4,
            random_state=0,
        ),
    )
    grid = {f"semicrfsegmenter__{name}": values for name, values in grid.items()}
    found = GridSearchCV(pipeline, grid, scoring=log_likelihood_scorer, cv=SequenceKFold(folds))
    return found.fit(X, y)


def fit_frames(X: list, y: list) -> Pipeline:
    """Train a classifier of single positions on the same features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=10.0))
    return classifier.fit(np.concatenate(X), np.concatenate(y))


def compare(y_true: list, predictions: dict[str, list]) -> dict[str, dict[str, float]]:
    """Print and return the errors of each model."""
    scores = {}
    columns = f"{'frame error':>12}{'segment error':>15}{'F1 of starts, 5 s':>19}{'segments':>10}"
    print(f"\n{'':24}{columns}")
    for name, y_pred in predictions.items():
        runs = sum(1 + int((labels[1:] != labels[:-1]).sum()) for labels in y_pred)
        boundaries = boundary_precision_recall_f1(y_true, y_pred, tolerance=5 * RATE)
        scores[name] = {
            "frame": frame_error_rate(y_true, y_pred),
            "segment": segment_error_rate(y_true, y_pred),
            "f1": boundaries.f1,
        }
        frame, segment, f1 = scores[name].values()
        print(f"{name:24}{frame:12.4f}{segment:15.3f}{f1:19.3f}{runs:10d}")
    return scores


def draw(model, frames, signal, X: list, y: list, path: Path) -> None:
    """Save a picture of one recording in both segmentations, and of all boundaries."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(3, 1, figsize=(10, 8), height_ratios=[5, 1.2, 3], layout="constrained")
    options = {"labels": list(REGIMES), "sampling_rate": RATE}
    SegmentationDisplay.from_estimator(
        model, X[0], y[0], signal=signal, signal_name="vibration", ax=axes[0], **options
    )
    SegmentationDisplay.from_predictions(y_pred=frames.predict(X[0]), ax=axes[1], **options)
    axes[1].set_title("single positions", loc="left", fontsize="medium")
    BoundaryDisplay.from_estimator(model, X, y, window=15, sampling_rate=RATE, ax=axes[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example; return the errors of each model."""
    parser = argparse.ArgumentParser(description="Find the regimes of a machine.")
    parser.add_argument("--train", type=int, default=12, help="recordings to train on")
    parser.add_argument("--test", type=int, default=6, help="recordings to test on")
    parser.add_argument("--length", type=int, default=1000, help="positions in a recording")
    parser.add_argument("--folds", type=int, default=3, help="of the search")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--max-duration", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args(argv)

    rng = np.random.default_rng(0)
    recordings = [record(options.length, rng) for _ in range(options.train + options.test)]
    X = [features(signal) for signal, _ in recordings]
    y = [labels for _, labels in recordings]
    train, test = slice(options.train), slice(options.train, None)

    began = time.perf_counter()
    grid = {
        "max_duration": options.max_duration,
        "duration_distribution": ["geometric", "negative_binomial", "learned"],
    }
    model = search(X[train], y[train], grid, options.folds, options.epochs)
    count = len(model.cv_results_["params"])
    print(f"Searched {count} settings in {time.perf_counter() - began:.0f} s")
    results = model.cv_results_
    for params, mean in zip(results["params"], results["mean_test_score"], strict=True):
        text = ", ".join(f"{key.partition('__')[2]}={value}" for key, value in params.items())
        best = "  <- best" if params == model.best_params_ else ""
        print(f"{text:70}{mean:9.4f} nats per position{best}")

    frames = fit_frames(X[train], y[train])
    scores = compare(
        y[test],
        {
            "single positions": [frames.predict(x) for x in X[test]],
            "semi-Markov CRF": list(model.predict(X[test])),
        },
    )
    pipeline = model.best_estimator_
    found = pipeline[-1].predict_segments(pipeline[:-1].transform(X[test]))
    longest = max(segment.duration for segments in found for segment in segments)
    print(
        f"\nThe longest segment found has {longest} positions; durations up to "
        f"{pipeline[-1].max_duration_} have scores of their own, longer ones a rate."
    )
    draw(model, frames, recordings[options.train][0], X[test], y[test], options.output)
    print(f"The first test recording and all its starts are in {options.output}")
    return scores


if __name__ == "__main__":
    main()

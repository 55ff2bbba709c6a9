"""Chunking of sentences
=====================

Trains on nine short texts, finds the chunks of three others, and draws the durations of chunks:

    python examples/plot_chunking.py

A chunk is a phrase of one or a few words: "the old bridge", "has been rebuilt". The model is linear
in sparse features of words and trained by L-BFGS to the minimum of a convex loss. A semi-Markov CRF
scores whole chunks: with ``boundary_scores=True``, features have weights for the start and the end
of a chunk at a word, and each type of chunk has a learnt distribution of its number of words.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.pipeline import Pipeline, make_pipeline

from flash_semicrf.problem.segments import bio_to_segments
from sklearn_api import SemiCRFSegmenter
from sklearn_api.datasets import load_chunks
from sklearn_api.display import DurationDisplay
from sklearn_api.metrics import chunk_precision_recall_f1
from sklearn_api.preprocessing import TokenFeatures

PICTURE = Path(__file__).parent / "output" / "chunking.png"
EDGE = {"word": "<edge>", "pos": "<edge>"}


def features(sentence: list[dict], parts_of_speech: bool) -> list[dict]:
    """Describe each token by itself and its neighbours."""
    padded = [EDGE, EDGE, *sentence, EDGE, EDGE]
    rows = []
    for t in range(len(sentence)):
        window = padded[t : t + 5]
        row = {"bias": True, "capital": window[2]["word"][0].isupper()}
        for offset in (-1, 0, 1):
            word = window[2 + offset]["word"].lower()
            row[f"word[{offset}]"] = word
            row[f"ending[{offset}]"] = word[-2:]
        if parts_of_speech:
            row |= {f"pos[{offset}]": window[2 + offset]["pos"] for offset in range(-2, 3)}
            row["pos[-1,0]"] = window[1]["pos"] + " " + window[2]["pos"]
        rows.append(row)
    return rows


def fit(X: list, y: np.ndarray, alpha: float) -> Pipeline:
    """Train a linear semi-Markov CRF on features of tokens."""
    segmenter = SemiCRFSegmenter(solver="lbfgs", tagging="bio", boundary_scores=True, alpha=alpha)
    return make_pipeline(TokenFeatures(), segmenter).fit(X, y)


def bracketed(sentence: list[dict], tags: np.ndarray) -> str:
    """Write a sentence with its chunks in brackets."""
    words = [token["word"] for token in sentence]
    parts = []
    for start, stop, kind in bio_to_segments(tags):
        text = " ".join(words[start:stop])
        parts.append(text if kind == "O" else f"[{kind} {text}]")
    return " ".join(parts)


def print_scores(y_true: list, y_pred: list, kinds: list[str]) -> None:
    """Print precision, recall and F1 of each type of chunk."""
    scores = chunk_precision_recall_f1(y_true, y_pred, labels=kinds, average=None)
    print(f"\n{'':6}{'precision':>10}{'recall':>8}{'F1':>8}")
    for kind, precision, recall, f1 in zip(kinds, *scores, strict=True):
        print(f"{kind:6}{precision:10.3f}{recall:8.3f}{f1:8.3f}")


def print_weights(model: Pipeline, count: int) -> None:
    """Print the features with the largest weights for each type of chunk."""
    names = model[0].get_feature_names_out()
    segmenter = model[-1]
    weights = segmenter.module_.head.projection.weight.detach().numpy()
    print("\nHeaviest weights:")
    for kind, row in zip(segmenter.classes_, weights, strict=True):
        best = np.argsort(row)[: -count - 1 : -1]
        print(f"{kind:5} " + ", ".join(f"{names[i]} {row[i]:.1f}" for i in best))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the example; return the F1 of chunks with and without parts of speech."""
    parser = argparse.ArgumentParser(description="Find the phrases of sentences.")
    parser.add_argument("--texts", type=int, default=9, help="train on the first so many texts")
    parser.add_argument("--alpha", type=float, default=0.1, help="strength of the L2 penalty")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args(argv)

    data = load_chunks()
    texts = list(dict.fromkeys(data.groups.tolist()))
    train = np.isin(data.groups, texts[: options.texts])
    test = np.isin(data.groups, texts[-3:])
    print(f"Training on {train.sum()} sentences, testing on {test.sum()}: {', '.join(texts[-3:])}")
    scores = {}
    for name, parts_of_speech in [("words", False), ("words and parts of speech", True)]:
        began = time.perf_counter()
        X = [features(sentence, parts_of_speech) for sentence in data.X]
        model = fit([X[i] for i in np.flatnonzero(train)], data.y[train], options.alpha)
        seconds = time.perf_counter() - began
        predicted = model.predict([X[i] for i in np.flatnonzero(test)])
        scores[name] = chunk_precision_recall_f1(data.y[test], predicted).f1
        columns = model[-1].n_features_in_
        print(f"{name}: {columns} features, trained in {seconds:.1f} s, F1 {scores[name]:.3f}")

    print_scores(data.y[test], predicted, data.target_names[1:])
    print_weights(model, 4)
    print("\nThe first sentences with a mistake, true and predicted chunks:")
    sentences = data.X[test]
    wrong = [i for i, y in enumerate(data.y[test]) if (y != predicted[i]).any()]
    for i in wrong[:3]:
        print(bracketed(sentences[i], data.y[test][i]))
        print(bracketed(sentences[i], predicted[i]) + "\n")

    display = DurationDisplay.from_estimator(
        model, y=[bio_to_segments(tags) for tags in data.y[train]], ignore_label="O"
    )
    display.figure_.suptitle("Tokens in a chunk: in training, and as the model scores them")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    display.figure_.savefig(options.output, dpi=120)
    print(f"The durations of chunks are in {options.output}")
    return scores


if __name__ == "__main__":
    main()

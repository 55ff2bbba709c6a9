"""Train the linear segmenter on CoNLL-2000 and tag its test sentences, in a process of its own.

Run as ``python -m benchmarks.children.chunking FOLDER LIMIT OUTPUT.json``.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks.children.chunking_data import attributes, read_sentences
from benchmarks.children.measure import PeakMemory
from sklearn_api import SemiCRFSegmenter
from sklearn_api.preprocessing import TokenFeatures

SETTINGS = {
    "solver": "lbfgs",
    "tagging": "bio",
    "boundary_scores": True,
    "max_duration": 12,
    "alpha": 0.5,
}


def main(argv: list[str]) -> None:
    """Time vectorising and fitting; write times, iterations and tags."""
    folder, limit, output = argv
    warnings.filterwarnings("ignore", "[0-9]+ gold segments are longer")
    train = read_sentences(Path(folder) / "train.tsv.gz", int(limit) or None)
    tokens = [attributes(sentence) for sentence in train]
    y = [np.array([token[2] for token in sentence]) for sentence in train]
    warm_up = TokenFeatures(n_features=8)
    SemiCRFSegmenter(**SETTINGS).fit(warm_up.fit_transform(tokens[:3]), y[:3])
    with PeakMemory() as memory:
        begin = time.perf_counter()
        features = TokenFeatures()
        X = features.fit_transform(tokens)
        vectorised = time.perf_counter()
        segmenter = SemiCRFSegmenter(**SETTINGS).fit(X, y)
        trained = time.perf_counter()
    test = read_sentences(Path(folder) / "test.tsv.gz")
    tags = segmenter.predict(features.transform([attributes(sentence) for sentence in test]))
    record = {
        "status": "ok",
        "features_s": vectorised - begin,
        "train_s": trained - vectorised,
        "iterations": segmenter.n_iter_,
        "peak_bytes": memory.extra,
        "tags": [sentence.tolist() for sentence in tags],
    }
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])

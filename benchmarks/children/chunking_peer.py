"""Train CRFsuite on CoNLL-2000 and tag its test sentences, beside nothing of this repository.

Copied with ``chunking_data.py`` and ``measure.py`` into an empty folder and run there as
``python chunking_peer.py FOLDER LIMIT OUTPUT.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pycrfsuite
from chunking_data import attributes, read_sentences
from measure import PeakMemory


def main(argv: list[str]) -> None:
    """Time adding the sentences and training; write times, iterations and tags."""
    folder, limit, output = argv
    train = read_sentences(Path(folder) / "train.tsv.gz", int(limit) or None)
    inputs = [(attributes(s), [token[2] for token in s]) for s in train]
    with PeakMemory() as memory:
        begin = time.perf_counter()
        trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
        trainer.set_params({"c1": 0.0, "c2": 1.0})
        for tokens, tags in inputs:
            trainer.append(tokens, tags)
        added = time.perf_counter()
        trainer.train("model.crfsuite")
        trained = time.perf_counter()
    tagger = pycrfsuite.Tagger()
    tagger.open("model.crfsuite")
    test = read_sentences(Path(folder) / "test.tsv.gz")
    record = {
        "status": "ok",
        "features_s": added - begin,
        "train_s": trained - added,
        "iterations": trainer.logparser.last_iteration["num"],
        "peak_bytes": memory.extra,
        "tags": [tagger.tag(attributes(sentence)) for sentence in test],
    }
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])

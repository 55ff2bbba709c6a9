"""CoNLL-2000 chunking beside CRFsuite: ``python -m benchmarks.chunking FOLDER``.

FOLDER holds ``train.tsv.gz`` and ``test.tsv.gz`` (word, part of speech, BIO tag; a blank line
between sentences). The data set states no licence and is not part of the repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.children.chunking_data import read_sentences
from benchmarks.peers import CHILDREN, PeerUnavailable, install
from benchmarks.processes import describe_environment, run_child
from benchmarks.report import OURS, format_bytes, format_seconds, table, write_results
from sklearn_api.metrics import chunk_precision_recall_f1

PEER = "python-crfsuite"
LEAST_F1 = 0.94
MOST_BYTES = 3 * 10**9
TIMEOUT = 3600.0


def run_ours(folder: Path, limit: int) -> dict[str, Any]:
    """Train and tag with this package."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "record.json"
        arguments = ["-m", "benchmarks.children.chunking", str(folder), str(limit), str(output)]
        return run_child(arguments, output=output, timeout=TIMEOUT)


def run_peer(folder: Path, limit: int) -> dict[str, Any]:
    """Train and tag with CRFsuite, L-BFGS with c2 = 1."""
    try:
        installed = install(PEER)
    except PeerUnavailable as error:
        return {"status": str(error)}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for program in ("chunking_peer.py", "chunking_data.py", "measure.py"):
            shutil.copy(CHILDREN / program, work)
        arguments = [str(work / "chunking_peer.py"), str(folder), str(limit), "record.json"]
        return run_child(
            arguments,
            output=work / "record.json",
            folder=work,
            environment={**os.environ, "PYTHONPATH": str(installed)},
            timeout=TIMEOUT,
        )


def scored(record: dict[str, Any], gold: list[list[str]]) -> dict[str, Any]:
    """A record with the F1 of its tags in their place."""
    tags = record.pop("tags", None)
    return record if tags is None else {**record, "f1": chunk_precision_recall_f1(gold, tags).f1}


def goals(records: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """Figures asked for on the whole data set, figures measured, and whether they are reached."""
    mine, peer = records
    ratio = mine["train_s"] / peer["train_s"]
    memory = mine["peak_bytes"]
    return [
        (f"F1 >= {LEAST_F1}", f"{mine['f1']:.4f}", mine["f1"] >= LEAST_F1),
        (f"training time <= 1 x that of {PEER}", f"{ratio:.2f} x", ratio <= 1),
        ("peak extra memory <= 3 GB", format_bytes(memory), memory is None or memory <= MOST_BYTES),
    ]


def render(records: list[dict[str, Any]]) -> str:
    """A table of both, and of the goals where both were measured."""
    rows = []
    for record in records:
        if record["status"] != "ok":
            rows.append([record["implementation"], record["status"], "", "", "", "", ""])
            continue
        times = [format_seconds(record[key]) for key in ("features_s", "train_s")]
        memory = format_bytes(record["peak_bytes"])
        rest = [str(record["iterations"]), memory, f"{record['load']:.1f}"]
        rows.append([record["implementation"], f"{record['f1']:.4f}", *times, *rest])
    header = ["implementation", "test F1", "features", "training", "iterations"]
    text = table([*header, "peak extra memory", "load before"], rows)
    if all(record["status"] == "ok" for record in records):
        verdicts = [[aim, value, "yes" if met else "**no**"] for aim, value, met in goals(records)]
        text += "\n\n" + table(["to be reached", "measured", "reached"], verdicts)
    return text


def main(argv: list[str] | None = None) -> int:
    """Run both, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunking", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=0, help="of training; 0 is all")
    parser.add_argument("--output", type=Path, help="folder of results.json and results.csv")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    test = read_sentences(folder / "test.tsv.gz")
    gold = [[token[2] for token in sentence] for sentence in test]
    environment, records = describe_environment(), []
    for name, run in ((OURS, run_ours), (PEER, run_peer)):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        record = scored(run(folder, options.sentences), gold)
        common = {"problem": "conll2000", "implementation": name, "load": load}
        records.append({**environment, **common, **record})
    if options.output is not None:
        write_results(options.output, records)
    print(render(records))
    return 0 if records[0]["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())

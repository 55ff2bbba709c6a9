"""Inputs that must not be slow: unusual values beside an ordinary problem of the same size.

``python -m benchmarks.cliffs --docs docs/performance.md`` compares each of `CLIFFS` with the
ordinary problem of its shape, call by call in one process, and writes the page's table; with
``--device cuda`` and ``--docs docs/performance-gpu.md`` on a GPU. Every result is compared with the
float64 loop before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.children.ours import job_call, make_potentials
from benchmarks.gpu import problems as gpu
from benchmarks.gpu.measure import check_against_reference, synchronize
from benchmarks.problems import Problem, make_inputs
from benchmarks.processes import ROOT, describe_environment
from benchmarks.report import describe_machine, format_seconds, replace_generated, table

__all__ = ["CLIFFS", "JOBS", "Cliff"]

JOBS = {job: name for job, name in gpu.JOBS.items() if job != "decode"}
"""Without the one that makes lists, whose cost is that of Python objects."""

ASKED = 4.0
"""Largest ratio wanted."""

CHECK_SEQUENCES, CHECK_POSITIONS = 2, 300
"""Of the shortened problem for the float64 loop."""

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cliff:
    """An unusual problem.

    Parameters
    ----------
    what : str
        The row of the table.
    shape : tuple of int
        B, T, K, C.
    change : callable
        Makes the unusual inputs of the ordinary ones, in place.
    by_duration : bool
        Transitions (K, C, C).
    """

    what: str
    shape: tuple[int, int, int, int]
    change: Callable[[Inputs], None]
    by_duration: bool = False


def _growing(rate: float) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs["duration_bias"] += rate * np.arange(len(inputs["duration_bias"]))[:, None]

    return change


def _every_second_duration(inputs: Inputs) -> None:
    inputs["duration_bias"][1::2] = -np.inf


def _only_longest(inputs: Inputs) -> None:
    inputs["duration_bias"][:-1] = -np.inf


def _masked_scores(mask: float) -> Callable[[Inputs], None]:
    """One label is left at every position, and others at random."""

    def change(inputs: Inputs) -> None:
        scores = inputs["scores"]
        rng = np.random.default_rng(1)
        alive = rng.random(scores.shape) < 0.05
        kept = rng.integers(scores.shape[2], size=scores.shape[:2])
        np.put_along_axis(alive, kept[:, :, None], True, axis=2)
        scores[~alive] = mask

    return change


def _large_transitions(factor: float) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        inputs["transition"] *= factor

    return change


def _poisson(mean: float) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        k = np.arange(1, len(inputs["duration_bias"]) + 1)
        log_factorials = np.cumsum(np.log(k))
        inputs["duration_bias"][:] = (k * np.log(mean) - mean - log_factorials)[:, None]

    return change


def _one_long(inputs: Inputs) -> None:
    """One sequence as long as all positions together, among those of 20."""
    inputs["lengths"][1:] = 20


CLIFFS = {
    "bias-1": Cliff("duration bias grows by 1 per step", (1, 4000, 1000, 24), _growing(1)),
    "bias-10": Cliff("duration bias grows by 10 per step", (1, 4000, 1000, 24), _growing(10)),
    "bias-50": Cliff("duration bias grows by 50 per step", (1, 4000, 1000, 24), _growing(50)),
    "second-durations": Cliff(
        "every second duration masked", (4, 1000, 100, 24), _every_second_duration
    ),
    "only-longest": Cliff("only duration K allowed", (4, 1000, 100, 24), _only_longest),
    "masked-scores": Cliff("95 % of the scores -inf", (4, 1000, 100, 24), _masked_scores(-np.inf)),
    "finite-masks": Cliff("95 % of the scores -1e9", (4, 1000, 100, 24), _masked_scores(-1e9)),
    "finite-masks-long": Cliff(
        "95 % of the scores -1e9, long durations", (1, 4000, 1000, 24), _masked_scores(-1e9)
    ),
    "transitions": Cliff("transitions times 10,000", (4, 1000, 100, 24), _large_transitions(1e4)),
    "short-transitions": Cliff(
        "transitions times 10,000, short sequences", (64, 200, 20, 12), _large_transitions(1e4)
    ),
    "by-duration": Cliff(
        "transitions by duration times 1,000", (4, 500, 20, 12), _large_transitions(1e3), True
    ),
    "poisson": Cliff("durations of Poisson(2800)", (1, 12_000, 3000, 8), _poisson(2800)),
    "one-long": Cliff("one of 20,000 among 59 of 20", (60, 20_000, 100, 24), _one_long),
}


def make(cliff: Cliff, num_positions: int | None = None) -> tuple[Inputs, Inputs]:
    """The ordinary inputs and the unusual ones.

    Where the change is to the lengths, the ordinary problem has as many positions in as many
    sequences, all of one length.
    """
    B, T, K, C = cliff.shape
    problem = Problem("", B, T, K, C, "log_partition")
    unusual = make_inputs(problem, num_positions)
    if cliff.by_duration:
        rng = np.random.default_rng(0)
        unusual["transition"] = 0.3 * rng.standard_normal((K, C, C)).astype(np.float32)
    ordinary = {name: value.copy() for name, value in unusual.items()}
    cliff.change(unusual)
    total = int(unusual["lengths"].sum())
    if total < unusual["scores"].shape[1] * B:
        length = total // B
        ordinary["scores"] = np.ascontiguousarray(ordinary["scores"][:, :length])
        ordinary["lengths"] = np.full(B, length)
    return ordinary, unusual


def check(cliff: Cliff, device: str) -> None:
    """Log Z, every gradient and the best scores of the shortened problem against the loop.

    Raises
    ------
    benchmarks.children.ours.CheckFailed
        Where one of them differs.
    """
    T, K = min(cliff.shape[1], CHECK_POSITIONS), cliff.shape[2]
    if K <= T:
        T -= T % K  # so that segments of K positions tile it
    _, inputs = make(cliff, T)
    for name in ("scores", "lengths"):
        inputs[name] = inputs[name][:CHECK_SEQUENCES]
    check_against_reference(inputs, device)


def compare(cliff: Cliff, job: str, device: str, budget: float) -> dict[str, float]:
    """Medians of the ordinary and the unusual problem, calls alternating."""
    calls = [job_call(make_potentials(i, device=device), job) for i in make(cliff)]
    for call in calls:
        call()
    seconds: list[list[float]] = [[], []]
    began = time.perf_counter()
    while len(seconds[0]) < 5 or (len(seconds[0]) < 50 and time.perf_counter() - began < budget):
        for call, times in zip(calls, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
    ordinary, unusual = map(statistics.median, seconds)
    return {"ordinary": ordinary, "unusual": unusual, "ratio": unusual / ordinary}


def run(names: list[str], device: str, budget: float) -> Iterator[list[str]]:
    """A row of the table for each cliff."""
    for name in names:
        cliff = CLIFFS[name]
        check(cliff, device)
        row = [cliff.what, "{}, {:,}, {}, {}".format(*cliff.shape)]
        for job in JOBS:
            found = compare(cliff, job, device, budget)
            ratio = f"{found['ratio']:.1f}"
            if found["ratio"] > ASKED:
                ratio = f"**{ratio}**"
            row.append(f"{format_seconds(found['ordinary'])}, x {ratio}")
        print(name, *row[2:], sep=" | ", flush=True)
        yield row


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the page where one is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cliffs", description=__doc__)
    parser.add_argument("--cliff", nargs="+", choices=CLIFFS, default=[*CLIFFS], metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repeats each")
    parser.add_argument("--docs", type=Path, help="page whose table is rewritten")
    options = parser.parse_args(argv)
    rows = list(run(options.cliff, options.device, options.budget))
    text = table(["problem", "B, T, K, C", *JOBS.values()], rows)
    environment: dict[str, Any] = describe_environment(ROOT)
    if options.device == "cpu":
        text = f"{describe_machine(environment)}\n\n{text}"
    else:
        text = f"{torch.cuda.get_device_name(options.device)}, torch {torch.__version__}.\n\n{text}"
    print(f"\n{text}")
    if options.docs is not None:
        replace_generated(options.docs, text, "cliffs")


if __name__ == "__main__":
    main()

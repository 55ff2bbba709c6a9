"""Models that forget quickly, slowly and never: which of them can be done in pieces?

``python -m benchmarks.forgetting --docs docs/long_sequences.md`` draws problems of each, compares
log Z, gradients and decoding in pieces with the sequential kernels, and writes the page's table.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import replace_generated
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots

__all__ = ["FORGETFUL", "MODELS", "draw"]


def _ring(transition: torch.Tensor) -> None:
    """Allow only the next label."""
    labels = torch.arange(len(transition))
    transition[:] = -torch.inf
    transition[labels, (labels + 1) % len(labels)] = 0.0


def _random(p: Potentials) -> None:
    pass


def _confident(p: Potentials) -> None:
    p.scores.mul_(6)


def _sticky(p: Potentials) -> None:
    p.transition.sub_(3)
    p.scores.mul_(0.3)


def _weak(p: Potentials) -> None:
    p.scores.mul_(0.05)
    _peaked(p)


def _peaked(p: Potentials) -> None:
    k = torch.arange(1, p.max_duration + 1, dtype=torch.float64)[:, None]
    p.duration_bias[:] = -(((k - 0.6 * p.max_duration) / (p.max_duration / 8)) ** 2)


def _no_evidence(p: Potentials) -> None:
    p.scores.zero_()
    _peaked(p)


def _least_durations(p: Potentials) -> None:
    p.duration_bias[: p.max_duration // 3] = -torch.inf
    _ring(p.transition)


def _counter(p: Potentials) -> None:
    """Segments of one duration in a fixed order, of which the first may be shorter."""
    p.scores.zero_()
    p.duration_bias[:-1] = -torch.inf
    _ring(p.transition)
    # The last label may have any duration, once: nothing leads to it.
    p.duration_bias[:, -1] = 0.0
    p.transition[:, -1] = -torch.inf
    p.transition[-1, 0] = 0.0
    p.transition[-2, 0] = 0.0
    p.initial_scores[:] = -torch.inf
    p.initial_scores[-1] = 0.0


MODELS: dict[str, Callable[[Potentials], None]] = {
    "random": _random,
    "confident": _confident,
    "sticky": _sticky,
    "weak": _weak,
    "no evidence": _no_evidence,
    "least durations": _least_durations,
    "counter": _counter,
}

FORGETFUL = ("random", "confident", "sticky")
"""Models that every attempt is meant to succeed with, if its warm-up is not too short."""


def draw(
    model: str, lengths: list[int], max_duration: int, num_labels: int, seed: int = 0
) -> Potentials:
    """A problem of a model, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    p = Potentials(
        scores=normal(len(lengths), max(lengths), num_labels),
        transition=normal(num_labels, num_labels) * 0.5,
        duration_bias=normal(max_duration, num_labels) * 0.3,
        lengths=torch.tensor(lengths),
        initial_scores=normal(num_labels),
    )
    MODELS[model](p)
    return p


SIZES = {"lengths": [24_000], "max_duration": 100, "num_labels": 8}

_WANTED = {"scores", "transition", "duration_bias"}


class _Watched(NumbaBackend):
    """Notes what it was asked for."""

    def __init__(self) -> None:
        self.attempts = 0
        self.whole = False

    def gradients(self, potentials, wanted):
        self.whole = True
        return super().gradients(potentials, wanted)

    def gradients_of_pieces(self, potentials, wanted, core, span):
        self.attempts += 1
        return super().gradients_of_pieces(potentials, wanted, core, span)


def compare(model: str, seed: int) -> tuple[str, list[float]]:
    """How a problem ended, and the differences from the sequential kernels: log Z relative,
    probabilities, expected counts relative to the largest, best score relative."""
    p = draw(model, seed=seed, **SIZES)
    plain, watched = NumbaBackend(), _Watched()
    pieces = InPieces(watched, Slots(528, 1500, patient=False))
    log_z, expected = plain.gradients(p, _WANTED)
    found, gradients = pieces.gradients(p, _WANTED)
    ended = "whole" if watched.whole else ("first", "second")[watched.attempts - 1]
    off = {n: (gradients[n] - expected[n]).abs().max() for n in _WANTED}
    counts = max(off[n] / expected[n].max() for n in ("transition", "duration_bias"))
    best, reference = pieces.viterbi(p)[0], plain.viterbi(p)[0]
    differences = [
        ((found - log_z) / log_z).abs().max(),
        off["scores"],
        counts,
        ((best - reference) / reference).abs().max(),
    ]
    return ended, [float(x) for x in differences]


def table(problems: int) -> str:
    """Markdown: a row for each model."""
    T, K, C = SIZES["lengths"][0], SIZES["max_duration"], SIZES["num_labels"]
    lines = [
        f"{problems} problems of each model, T = {T:,}, K = {K}, {C} labels, float64, on the CPU "
        "with the cuts of an H100.",
        "",
        "| model | first attempt | second | whole | log Z | probabilities | counts | best score |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        results = [compare(model, seed) for seed in range(problems)]
        ends = Counter(ended for ended, _ in results)
        shares = [f"{ends[end] / problems:.0%}" for end in ("first", "second", "whole")]
        worst = [f"{max(x):.0e}" for x in zip(*(off for _, off in results), strict=True)]
        lines.append("| " + " | ".join([model, *shares, *worst]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("--problems", type=int, default=145, help="of each model")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    found = table(options.problems)
    if options.docs is not None:
        replace_generated(options.docs, found)


if __name__ == "__main__":
    main()

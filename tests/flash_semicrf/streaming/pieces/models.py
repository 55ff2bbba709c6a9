"""Models that forget quickly, slowly and never, for tests of what is done in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flash_semicrf.problem.potentials import Potentials

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

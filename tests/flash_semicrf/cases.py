"""Problems that the tests of every implementation share, and a score written out term by term."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.testing import random_problem

BACKENDS = ("reference", "numba")

SHAPES = {
    "usual": {"num_positions": 4, "max_duration": 3, "num_labels": 2},
    "one duration": {"num_positions": 4, "max_duration": 1, "num_labels": 3},
    "K > T": {"num_positions": 3, "max_duration": 6, "num_labels": 2},
    "one label": {"num_positions": 6, "max_duration": 3, "num_labels": 1},
}
"""Small enough to enumerate every segmentation."""

TAIL_SHAPES = {
    "usual": {"num_positions": 5, "max_duration": 2, "num_labels": 2},
    "one duration": {"num_positions": 4, "max_duration": 1, "num_labels": 3},
    "K > T": {"num_positions": 3, "max_duration": 4, "num_labels": 2},
    "one label": {"num_positions": 7, "max_duration": 3, "num_labels": 1},
}
"""Sequences longer than K, to enumerate with a duration tail."""

LONG_SHAPES = {
    "one block": {"num_positions": 16, "max_duration": 5, "num_labels": 3},
    "one more": {"num_positions": 17, "max_duration": 16, "num_labels": 8},
    "two blocks": {"num_positions": 33, "max_duration": 4, "num_labels": 5},
    "wraps": {"num_positions": 150, "max_duration": 13, "num_labels": 3},
    "wraps past 32": {"num_positions": 200, "max_duration": 33, "num_labels": 2},
    "one duration": {"num_positions": 70, "max_duration": 1, "num_labels": 9},
    "K > T": {"num_positions": 35, "max_duration": 50, "num_labels": 3},
    "one label": {"num_positions": 90, "max_duration": 7, "num_labels": 1},
    "one position": {"num_positions": 1, "max_duration": 3, "num_labels": 3},
    "many labels": {"num_positions": 40, "max_duration": 6, "num_labels": 19},
}
"""Lengths on either side of the blocks of 16 and 32 positions that kernels work in, and several
times the window that they buffer."""


class Case(NamedTuple):
    """One combination of options.

    Attributes
    ----------
    shape : str
        Key of `SHAPES` or `LONG_SHAPES`.
    by_duration : bool
        Transition of shape (K, C, C).
    start, end, initial, final : bool
        Which optional scores are given.
    forbid : float
        Fraction of entries that are -inf.
    tail : bool
        With a duration tail.
    """

    shape: str
    by_duration: bool = False
    start: bool = False
    end: bool = False
    initial: bool = False
    final: bool = False
    forbid: float = 0.0
    tail: bool = False

    def __str__(self) -> str:
        options = ("by_duration", "start", "end", "initial", "final", "forbid", "tail")
        return "-".join([self.shape, *(name for name in options if getattr(self, name))])

    def problem(self, shapes: dict[str, dict[str, int]] = SHAPES, **options) -> Potentials:
        """Draw the problem; `options` as for `random_problem`."""
        arguments = {"batch_size": 3, "seed": len(str(self)), **shapes[self.shape], **options}
        drawn = random_problem(
            by_duration=self.by_duration,
            boundary=self.start or self.end,
            ends=self.initial or self.final,
            tail=self.tail,
            **{"forbid": self.forbid, **arguments},
        )
        absent = [name for name in ("start", "end", "initial", "final") if not getattr(self, name)]
        if options.get("integers") and not self.initial:
            absent.remove("initial")  # without them the log-sum-exp over sources is no whole number
        return drawn.replace(**{f"{name}_scores": None for name in absent})


SMALL_CASES = [
    Case(shape, *flags, forbid)
    for shape in SHAPES
    for flags in itertools.product((False, True), repeat=5)
    for forbid in (0.0, 0.15)
]
"""Every combination of options."""

TAIL_CASES = [
    Case(shape, *flags, forbid, tail=True)
    for shape in TAIL_SHAPES
    for flags in itertools.product((False, True), repeat=5)
    for forbid in (0.0, 0.15)
]
"""The same with a duration tail."""

LONG_CASES = [
    Case(shape, False, boundary, boundary, ends, ends, forbid)
    for shape in LONG_SHAPES
    for boundary, ends in itertools.product((False, True), repeat=2)
    for forbid in (0.0, 0.1)
]
"""Static transitions at the sizes where kernels change their ways."""


def thinned(cases: list, step: int) -> list:
    """Cases to parametrise by: one of `step` always, the others marked `long`.

    `step` should be odd: options vary by powers of two along a list, so that each meets every
    other in what is left.
    """
    return [case if i % step == 0 else long(case) for i, case in enumerate(cases)]


def thinned_pairs(first: list, second: list) -> list:
    """Pairs of two lists to parametrise by: each value once always, the other pairs `long`."""
    return [
        (a, b) if i % len(second) == j else long(a, b)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def long(*values):
    """Values to parametrise by in long tests only."""
    return pytest.param(*values, marks=pytest.mark.long)


def naive_score(potentials: Potentials, index: int, segments: list[tuple[int, int, int]]) -> float:
    """Score of one segmentation of sequence `index`, term by term as the conventions state it.

    Parameters
    ----------
    potentials : Potentials
    index : int
    segments : list of (start, stop, label)
        Half-open, tiling the sequence.
    """
    p = potentials
    scores, bias, transition = (
        x.tolist() for x in (p.scores[index], p.duration_bias, p.transition)
    )
    total = 0.0
    previous = None
    for start, stop, label in segments:
        for position in range(start, stop):
            total += scores[position][label]
        duration = stop - start
        row = min(duration, p.max_duration) - 1
        total += bias[row][label]
        if duration > p.max_duration:
            total += (duration - p.max_duration) * float(p.duration_tail[label])
        matrix = transition[row] if p.transition.dim() == 3 else transition
        if previous is not None:
            total += matrix[previous][label]
        elif p.initial_scores is not None:
            total += float(p.initial_scores[label])
        else:
            sources = [row[label] for row in matrix]
            summed = math.fsum(map(math.exp, sources))
            total += math.log(summed) if summed > 0 else -math.inf
        if p.start_scores is not None:
            total += float(p.start_scores[index, start, label])
        if p.end_scores is not None:
            total += float(p.end_scores[index, stop - 1, label])
        if p.segment_scores is not None:
            total += float(p.segment_scores[index, start, row, label])
        if p.transition_scores is not None and previous is not None:
            total += float(p.transition_scores[index, start, previous, label])
        previous = label
    if p.final_scores is not None:
        total += float(p.final_scores[previous])
    return total


def with_gradients(potentials: Potentials) -> Potentials:
    """The same problem with every parameter a leaf that requires a gradient."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in potentials.parameters().items()}
    return potentials.replace(**leaves)


def gradients_of(value: Tensor, potentials: Potentials) -> dict[str, Tensor]:
    """Gradient of a scalar by every parameter of `with_gradients`."""
    parameters = potentials.parameters()
    found = torch.autograd.grad(
        value, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def message_of(kind, call, *args, **options) -> str:
    """Message of the error, of exactly this kind, that a call raises."""
    with pytest.raises(kind) as error:
        call(*args, **options)
    assert error.type is kind
    return str(error.value)


def at(value: Tensor, index: tuple[int, ...], entry: float) -> Tensor:
    """A copy with another entry at an index."""
    changed = value.clone()
    changed[index] = entry
    return changed

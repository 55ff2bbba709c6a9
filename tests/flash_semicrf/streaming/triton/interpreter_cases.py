"""Short problems for the tests in Triton's interpreter, and what they are compared with."""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import random_problem

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py, with TRITON_INTERPRET=1", allow_module_level=True)

# The interpreter's maximum skips NaN and warns where there is nothing else: padding, for instance.
INTERPRETED = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
"""Marks of every test that runs in the interpreter."""

REFERENCE, TRITON = BACKENDS["reference"], BACKENDS["triton"]
BY_POSITION = ("scores", "start_scores", "end_scores")


class Case(NamedTuple):
    """One combination of sizes and options."""

    positions: int
    durations: int
    labels: int
    boundary: bool = False
    ends: bool = False
    forbid: float = 0.0
    scale: float = 1.0
    batch: int = 1
    dtype: torch.dtype = torch.float64
    by_duration: bool = False
    tail: bool = False

    def __str__(self) -> str:
        flags = ("boundary", "ends", "by_duration", "tail")
        options = [name for name in flags if getattr(self, name)]
        numbers = [f"T{self.positions}", f"K{self.durations}", f"C{self.labels}"]
        options += [f"forbid{self.forbid}", f"scale{self.scale:g}", str(self.dtype)[6:]]
        return "-".join(numbers + options)

    def problem(self, **options) -> Potentials:
        """Draw the problem; `options` as for `random_problem`."""
        arguments = {"scale": self.scale, "seed": 5, "tail": self.tail, **options}
        return random_problem(
            self.batch, self.positions, self.durations, self.labels,
            by_duration=self.by_duration, boundary=self.boundary, ends=self.ends,
            ragged=self.batch > 1, forbid=self.forbid, dtype=self.dtype, **arguments,
        )  # fmt: skip


def with_poisoned_padding(problem: Potentials) -> Potentials:
    """The problem with NaN after the end of every sequence."""
    outside = torch.arange(problem.num_positions) >= problem.lengths[:, None]
    given = {n: getattr(problem, n) for n in BY_POSITION if getattr(problem, n) is not None}
    return problem.replace(
        **{name: value.masked_fill(outside[..., None], math.nan) for name, value in given.items()}
    )


def use_layout(monkeypatch: pytest.MonkeyPatch, **options: int) -> None:
    """Lay the passes for static transitions out by these options of `plan_of`."""
    from flash_semicrf.streaming.triton.static import decoding, gradient, plan

    for module in (decoding, gradient):
        monkeypatch.setattr(module, "plan_of", functools.partial(plan.plan_of, **options))

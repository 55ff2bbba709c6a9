"""Problems of few kernel configurations for the tests on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf.inference.expectations import _direction
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.streaming.triton.backend import HAS_TRITON
from flash_semicrf.testing import random_problem

CONDITIONS = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    # Tests run in deterministic mode, for its poisoned buffers. What warns is plain PyTorch, such
    # as cumsum; the kernels' own results are compared bit by bit.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

BY_POSITION = ("scores", "start_scores", "end_scores")
EVERYTHING = {*BY_POSITION, "transition", "duration_bias"}

PLAIN = {"dtype": torch.float32}
FULL = {"boundary": True, "ends": True, "forbid": 0.01}

SETTINGS = {
    "usual, full": ((2, 300, 100, 24), FULL),
    "many short, full": ((16, 150, 32, 8), FULL),
    "three labels, full": ((2, 400, 30, 3), FULL),
    "long segments, full": ((2, 400, 350, 3), FULL),
    "long segments": ((1, 500, 1000, 24), PLAIN),
    "usual": ((4, 300, 100, 24), PLAIN),
    "many short": ((16, 150, 32, 8), PLAIN),
    "many labels": ((4, 150, 16, 64), PLAIN),
    "many labels, full": ((2, 100, 16, 50), FULL),
    "most labels": ((2, 80, 20, 128), PLAIN),
    "by duration": ((3, 60, 9, 5), {**PLAIN, "by_duration": True}),
    "by duration, full": ((2, 50, 20, 17), {**FULL, "by_duration": True}),
    "by duration, tail": ((3, 60, 9, 5), {**FULL, "by_duration": True, "tail": True}),
    "three labels, tail": ((2, 400, 30, 3), {**FULL, "tail": True}),
    "usual, tail": ((4, 300, 100, 24), {**PLAIN, "tail": True}),
    "long segments, tail": ((2, 800, 350, 3), {**FULL, "tail": True}),
    "many labels, tail": ((4, 150, 16, 64), {**PLAIN, "tail": True}),
    "long": ((1, 600, 100, 24), PLAIN),
    "large batch": ((64, 40, 60, 24), PLAIN),
    "one label, full": ((3, 400, 7, 1), {**FULL, "forbid": 0.0}),
    "one duration, full": ((3, 300, 1, 5), FULL),
}
"""(B, T, K, C) and options: several chunks of boundaries and of segments, every layout of the
warps. Compilation takes most of the time, a minute for each combination of padded labels, dtype and
options: there are few, and those that take longest come first."""

SAME_KERNELS = {
    "long": "usual",
    "large batch": "usual",
    "one label, full": "three labels, full",
    "one duration, full": "many short, full",
}


def marked(*names: str) -> list:
    """Parameters by setting, each in the group of the tests that run the same kernels."""
    return [
        pytest.param(name, marks=pytest.mark.gpu(group=SAME_KERNELS.get(name, name)))
        for name in names
    ]


def draw(setting: str, **options) -> Potentials:
    """Problem of a setting, on the CPU."""
    shape, given = SETTINGS[setting]
    return random_problem(*shape, **{"seed": 1, **given, **options})


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance
    )


def with_direction(problem: Potentials, seed: int = 2) -> tuple[Potentials, Potentials]:
    """The problem, and one to differentiate its gradient along, as `tangents` takes them."""
    p = explicit_start(problem)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(p.device)
        for name, value in p.parameters().items()
    }
    return p, _direction(p.replace(**drawn))


def results_of(problem: Potentials) -> list[torch.Tensor]:
    """Everything that the backend computes, in a fixed order."""
    wanted = EVERYTHING | (problem.parameters().keys() & {"duration_tail"})
    log_z, found = choose("triton", problem).gradients(problem, wanted)
    scores, table = viterbi_table(problem, "triton")
    results = [log_z, *(found[name] for name in sorted(found)), scores, *table]
    if problem.dtype == torch.float64:  # what follows has no kernels of its own for float32
        backend = choose("triton", problem)
        p, direction = with_direction(problem)
        log_z, mean, found = backend.tangents(p, direction, set(p.parameters()))
        results += [log_z, mean, *(found[name] for name in sorted(found))]
        results += backend.sample(problem, 3, 0)
    return results

"""Gradients without float64 arithmetic, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import long
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    BY_POSITION,
    INTERPRETED,
    REFERENCE,
    Case,
    with_poisoned_padding,
)

pytestmark = INTERPRETED

NARROW = {"dtype": torch.float32}

CASES = [
    Case(1, 3, 3, True, True, **NARROW),
    Case(16, 1, 5, True, True, batch=3, **NARROW),
    Case(33, 12, 1, **NARROW),
    Case(17, 17, 8, True, False, 0.1, 10.0, **NARROW),
    Case(31, 40, 17, False, True, **NARROW),
    Case(20, 5, 17, True, True, 0.1, 3.0, batch=2, **NARROW),
    Case(25, 17, 3, True, True, 0.1, 100.0, **NARROW),
    Case(25, 9, 20, True, True, 0.1, 100.0, **NARROW),
    Case(12, 8, 33, False, True, **NARROW),
    Case(6, 3, 64, True, True, **NARROW),
    Case(4, 3, 70, **NARROW),
    Case(70, 40, 3, True, True, 0.02, **NARROW),
]


def gradients(problem: Potentials, **options: bool) -> tuple[torch.Tensor, dict]:
    from flash_semicrf.streaming.triton import static

    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    with torch.no_grad():
        return static.gradients(with_poisoned_padding(problem), wanted, narrow=True, **options)


def assert_agrees_with_reference(problem: Potentials, **options: bool) -> None:
    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    expected_log_z, expected = REFERENCE.gradients(problem.to(torch.float64), wanted)
    log_z, found = gradients(problem, **options)
    assert_close(log_z, expected_log_z)
    assert found.keys() == wanted
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in BY_POSITION else torch.float64)
        assert_close(value, expected[name], torch.float32)
    outside = torch.arange(problem.num_positions) >= problem.lengths[:, None]
    assert all(bool((found[name][outside] == 0).all()) for name in BY_POSITION)


def flags(problem: Potentials) -> list[bool]:
    """Which sequences are done in float64."""
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static import apart, launch, plan

    p = with_poisoned_padding(problem)
    with torch.no_grad():
        messages = launch.run_passes(p, problem_of(p), plan.plan_of(p), True)[1]
        return apart.find_apart(problem_of(p), messages, ()).any(1).tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem())


@pytest.mark.parametrize("case", [CASES[5], Case(12, 6, 3, forbid=0.1, **NARROW)], ids=str)
def test_messages_in_logs_agree_with_reference(case):
    assert_agrees_with_reference(case.problem(), always_log=True)

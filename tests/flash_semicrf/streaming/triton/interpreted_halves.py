"""Log Z from two halves of a sequence, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    INTERPRETED,
    REFERENCE,
    TRITON,
    Case,
    with_poisoned_padding,
)

pytestmark = INTERPRETED

CASES = [
    Case(1, 3, 3, True, True),
    Case(7, 3, 2, ends=True),
    Case(16, 5, 3, True, True, dtype=torch.float32),
    Case(17, 1, 8, True),
    Case(23, 40, 3, True, True, 0.03),
    Case(31, 9, 1, False, True, scale=10.0),
    Case(33, 17, 17, forbid=0.1),
    Case(27, 10, 33, True),
    Case(40, 12, 3, True, True, 0.03, 100.0),
    Case(50, 20, 3, scale=3.0, dtype=torch.float32),
]


def log_z_of(problem: Potentials, always_log: bool = False) -> torch.Tensor:
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static import launch, plan

    p = with_poisoned_padding(problem)
    with torch.no_grad():
        return launch.run_halves(p, problem_of(p), plan.plan_of(p), always_log)[1]


def assert_agrees_with_reference(problem: Potentials, **options: bool) -> None:
    expected = REFERENCE.log_partition(problem.to(torch.float64))
    assert_close(log_z_of(problem, **options), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem())


@pytest.mark.parametrize("durations", [1, 8, 9, 30])
def test_lengths_around_the_blocks(durations):
    lengths = torch.tensor([1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33])
    p = random_problem(len(lengths), 33, durations, 2, boundary=True, ends=True)
    assert_agrees_with_reference(p.replace(lengths=lengths))


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_log_blocks_agree_with_reference(case):
    assert_agrees_with_reference(case.problem(), always_log=True)


def test_only_segments_that_span_the_middle_are_left():
    problem = Case(37, 20, 3, True, True).problem()
    bias = problem.duration_bias.clone()
    bias[:17] = -math.inf  # two segments of 18 and 19: none ends at 16
    problem = problem.replace(duration_bias=bias)
    assert_agrees_with_reference(problem)
    assert log_z_of(problem).isfinite().all()


def test_only_segments_that_end_in_the_middle_are_left():
    problem = Case(32, 16, 3, True, True).problem()
    bias = problem.duration_bias.clone()
    bias[:15] = -math.inf
    assert_agrees_with_reference(problem.replace(duration_bias=bias))
    assert log_z_of(problem.replace(duration_bias=bias)).isfinite().all()


@pytest.mark.parametrize("positions", [37, 40])
@pytest.mark.parametrize("mask", [-math.inf, -1e9, -1e30])
def test_masks_near_the_middle(mask, positions):
    problem = Case(positions, 24, 3, True, scale=2.0).problem()
    scores = problem.scores.clone()
    scores[0, 10, 0] = scores[0, 13:15, 1] = scores[0, 16, 2] = scores[0, 25, 1] = mask
    scores[0, 15, 0] = scores[0, 19, 0] = scores[0, 22:24, 2] = mask
    assert_agrees_with_reference(problem.replace(scores=scores))


@pytest.mark.parametrize("first", [6, 15, 16, 21])
def test_masks_that_cannot_be_avoided_keep_their_score(first):
    problem = Case(36, 30, 2).problem()
    scores = problem.scores.clone()
    # One segment of label 1 spans the middle, after some of label 0, where label 0 is forbidden.
    scores[0, 4:30, 0] = -math.inf
    scores[0, first : first + 4, 1] -= 3e4
    scores[0, first : first + 4, 0] = 0.0
    bias = problem.duration_bias.clone()
    bias[2:, 0] = -math.inf
    bias[:25, 1] = -math.inf
    assert_agrees_with_reference(problem.replace(scores=scores, duration_bias=bias))


def test_huge_scores_common_to_all_labels():
    problem = Case(35, 9, 3, scale=3.0).problem()
    shift = torch.zeros(1, 35, 1, dtype=torch.float64)
    shift[0, [3, 15, 16, 30]] = torch.tensor([[-1e12], [3e11], [1e9], [-(2.0**40)]]).double()
    assert_agrees_with_reference(problem.replace(scores=problem.scores + shift))


@pytest.mark.parametrize("slope", [10.0, -10.0, 50.0])
def test_steep_durations(slope):
    problem = Case(42, 20, 3, True).problem()
    bias = problem.duration_bias + slope * torch.arange(20, dtype=torch.float64)[:, None]
    assert_agrees_with_reference(problem.replace(duration_bias=bias))


def test_confident_scores_under_minimum_durations():
    problem = Case(48, 20, 3).problem()
    bias = problem.duration_bias.clone()
    bias[:9] = -math.inf
    signs = torch.randint(0, 2, problem.scores.shape) * 2.0 - 1.0
    assert_agrees_with_reference(problem.replace(scores=100.0 * signs.double(), duration_bias=bias))


def test_long_windows_in_parts(monkeypatch):
    from flash_semicrf.streaming.triton.static import plan

    # Parts of two blocks, where 128 steps are too long for the interpreter.
    monkeypatch.setattr(plan, "PART", 16)
    monkeypatch.setattr(plan, "_LONG_WINDOW", 3)
    p = random_problem(4, 83, 27, 2, boundary=True, ends=True, forbid=0.02)
    p = p.replace(lengths=torch.tensor([83, 80, 33, 3]))
    assert_agrees_with_reference(p)


def test_infeasible_sequences_are_minus_infinity_and_leave_the_others_alone():
    problem = Case(35, 5, 3, True, True, batch=4).problem()
    problem = problem.replace(lengths=torch.tensor([35, 35, 30, 35]))
    expected = log_z_of(problem)
    scores = problem.scores.clone()
    scores[0, 3] = scores[1, 20] = -math.inf
    scores[3, 15:17] = -math.inf
    found = log_z_of(problem.replace(scores=scores))
    assert found[[0, 1, 3]].tolist() == [-math.inf] * 3
    assert found[2] == expected[2]


def test_results_repeat_bit_by_bit():
    problem = Case(45, 20, 3, True, True, 0.05, batch=2).problem()
    assert torch.equal(log_z_of(problem), log_z_of(problem))


def test_sequences_of_the_length_from_which_it_pays():
    from flash_semicrf.streaming.triton.static import plan

    problem = Case(plan._SHORTEST, 20, 3, batch=2).problem()
    assert_close(TRITON.log_partition(problem), REFERENCE.log_partition(problem))
    assert torch.equal(TRITON.log_partition(problem), log_z_of(problem))

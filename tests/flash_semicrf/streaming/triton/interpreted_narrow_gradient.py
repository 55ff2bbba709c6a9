"""Gradients without float64 arithmetic, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import long, thinned
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


def flags(problem: Potentials, always_log: bool = False) -> list[bool]:
    """Which sequences are done in float64."""
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static import apart, launch, plan

    p = with_poisoned_padding(problem)
    with torch.no_grad():
        messages = launch.run_passes(p, problem_of(p), plan.plan_of(p), True, always_log)[1]
        return apart.find_apart(problem_of(p), messages, ()).any(1).tolist()


@pytest.mark.parametrize("case", thinned(CASES, 2), ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem())


@pytest.mark.parametrize("case", [CASES[5], Case(12, 6, 3, forbid=0.1, **NARROW)], ids=str)
def test_messages_in_logs_agree_with_reference(case):
    assert_agrees_with_reference(case.problem(), always_log=True)


def test_kernels_of_many_programs_agree_with_reference(monkeypatch):
    from flash_semicrf.streaming.triton.static import chunks, gradient

    monkeypatch.setattr(gradient, "_FEW_PROGRAMS", 0)  # as if these were many
    monkeypatch.setattr(chunks, "FEW", 1)
    assert_agrees_with_reference(Case(70, 17, 3, True, True, 0.02, **NARROW).problem())


def test_usual_problems_are_not_apart():
    assert flags(Case(20, 5, 3, True, True, 0.1, 100.0, batch=4, **NARROW).problem()) == [False] * 4


@pytest.mark.parametrize(("labels", "mask"), [(3, -1e30), (17, -2e4), long(17, -1e9)])
def test_sequences_with_deep_scores_are_apart(mask, labels):
    problem = Case(20, 5, labels, True, True, batch=3, **NARROW).problem()
    scores = problem.scores.clone()
    scores[1, 3:9, 0] = mask
    problem = problem.replace(scores=scores)
    assert flags(problem) == [False, True, False]
    assert_agrees_with_reference(problem)


@pytest.mark.parametrize("name", ["start_scores", long("end_scores"), "duration_bias"])
def test_sequences_out_of_range_are_apart(name):
    problem = Case(18, 5, 3, True, True, batch=2, **NARROW).problem()
    value = getattr(problem, name).clone()
    value[1 if name != "duration_bias" else ...] -= 5e7
    problem = problem.replace(**{name: value})
    assert flags(problem, always_log=True) == [name == "duration_bias", True]
    assert_agrees_with_reference(problem, always_log=True)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("transition", -1e9),
        ("duration_bias", -1e30),
        ("start_scores", -1e5),
        ("end_scores", -math.inf),
        long("transition", -math.inf),
        long("duration_bias", -1e5),
        long("start_scores", -1e30),
        long("end_scores", -1e9),
    ],
)
def test_masks_in_other_parameters(name, mask):
    problem = Case(20, 6, 4, True, True, **NARROW).problem()
    value = getattr(problem, name).clone()
    value[..., 1] = mask
    assert_agrees_with_reference(problem.replace(**{name: value}), always_log=True)


def test_gradients_of_what_is_forbidden_are_exactly_zero():
    problem = Case(34, 6, 17, **NARROW).problem()
    transition, bias = problem.transition.clone(), problem.duration_bias.clone()
    transition[3, 5] = bias[2, 4] = -math.inf
    bias[5, :] = -math.inf
    found = gradients(problem.replace(transition=transition, duration_bias=bias))[1]
    assert found["transition"][0, 3, 5] == 0 and found["duration_bias"][0, 2, 4] == 0
    assert bool((found["duration_bias"][0, 5] == 0).all())


def test_huge_scores_common_to_all_labels_change_no_marginals():
    problem = Case(17, 5, 3, scale=3.0, **NARROW).problem(integers=True)
    shift = torch.zeros(1, 17, 1)
    shift[0, [3, 4, 14]] = torch.tensor([[-1e6], [3e5], [-(2.0**20)]])
    found = gradients(problem.replace(scores=problem.scores + shift))[1]
    expected = REFERENCE.gradients(problem.to(torch.float64), set(found))[1]
    for name, value in found.items():
        assert_close(value, expected[name], torch.float32)


@pytest.mark.parametrize("slope", [30.0, long(-30.0), 2e3])
def test_steep_durations(slope):
    problem = Case(30, 20, 3, True, **NARROW).problem()
    bias = problem.duration_bias + slope * torch.arange(20)[:, None]
    assert_agrees_with_reference(problem.replace(duration_bias=bias))


@pytest.mark.parametrize("labels", [3, 17])
def test_confident_scores_under_minimum_durations(labels):
    problem = Case(24, 12, labels, **NARROW).problem()
    bias = problem.duration_bias.clone()
    bias[:9] = -math.inf
    signs = torch.randint(0, 2, problem.scores.shape) * 2.0 - 1.0
    assert_agrees_with_reference(problem.replace(scores=100.0 * signs, duration_bias=bias))


def test_infeasible_sequences_have_no_gradient_and_leave_the_others_alone():
    problem = Case(8, 5, 3, True, True, batch=3, **NARROW).problem()
    scores = problem.scores.clone()
    scores[1, 0] = -math.inf
    found = gradients(problem)[1]
    log_z, dead = gradients(problem.replace(scores=scores))
    assert log_z[1] == -math.inf
    assert all(bool((value[1] == 0).all()) for value in dead.values())
    for b in (0, 2):
        assert all(torch.equal(dead[name][b], found[name][b]) for name in found)


def test_large_logs_that_cancel_cost_no_digits():
    # Running scores and messages near 1e6, the scores of labels 1 and 2 alike.
    problem = random_problem(1, 40, 6, 3, dtype=torch.float32, seed=3)
    scores = problem.scores.clone()
    scores[..., 0] -= 9.5e3
    scores -= 9.9e3 * 0.1
    transition = problem.transition.clone()
    transition[:, 1] += 2.5e4
    problem = problem.replace(scores=scores, transition=transition)
    assert flags(problem) == [False]
    assert_agrees_with_reference(problem)


def test_cores_of_pieces():
    from flash_semicrf.streaming.triton import static

    problem = Case(96, 6, 3, batch=2, **NARROW).problem().replace(lengths=torch.tensor([96, 90]))
    core = torch.tensor([[32, 64], [32, 90]])
    wanted = {"scores", "transition", "duration_bias"}
    expected = static.gradients_of_pieces(problem, wanted, core, 32)[1]
    found = static.gradients_of_pieces(problem, wanted, core, 32, narrow=True)[1]
    for name in wanted:
        assert found[name].dtype == expected[name].dtype
        assert_close(found[name], expected[name], torch.float32)


def test_systematic_errors_of_many_segments_are_closed():
    """Two labels that take turns every other position: rounded transitions would add up."""
    problem = random_problem(1, 700, 2, 2, dtype=torch.float32, scale=0.3, ragged=False, seed=2)
    wanted = {"scores"}
    expected = REFERENCE.gradients(problem.to(torch.float64), wanted)[1]
    error = gradients(problem)[1]["scores"].double() - expected["scores"]
    assert float(error.abs().max()) < 2e-6

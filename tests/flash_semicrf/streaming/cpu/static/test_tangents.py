"""Hessian-vector products of log Z: kernels against the reference, differentiated twice."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.inference.expectations import _direction
from flash_semicrf.problem.potentials import explicit_start
from flash_semicrf.streaming import dispatch
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import LONG_CASES, LONG_SHAPES, SHAPES, SMALL_CASES, Case, thinned

NUMBA, REFERENCE = dispatch.BACKENDS["numba"], dispatch.BACKENDS["reference"]
LONG_BY_DURATION = [case._replace(by_duration=True) for case in LONG_CASES]
GRID = [(case, SHAPES) for case in SMALL_CASES[1::4]]
GRID += [(case, LONG_SHAPES) for case in (*LONG_CASES[::5], *LONG_BY_DURATION[2::9])]


def direction_like(case, shapes, problem):
    """Another problem of the same kind: what to differentiate along."""
    drawn = explicit_start(case._replace(forbid=0.0).problem(shapes, seed=99))
    return _direction(drawn.replace(lengths=problem.lengths))


def assert_same(problem, direction, scale=1.0):
    wanted = set(problem.parameters())
    expected_z, expected_mean, expected = REFERENCE.tangents(problem, direction, wanted)
    log_z, mean, found = NUMBA.tangents(problem, direction, wanted)
    assert_close(log_z, expected_z)
    assert_close(mean / scale, expected_mean / scale)
    assert found.keys() == wanted
    for name, value in found.items():
        assert value.shape == expected[name].shape and value.dtype == torch.float64
        assert_close(value / scale, expected[name] / scale)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "place", thinned(list(range(len(GRID))), 3), ids=lambda place: str(GRID[place][0])
)
def test_tangents_match_the_reference(place):
    case, shapes = GRID[place]
    problem = explicit_start(case.problem(shapes))
    # Counts of a long sequence add up rounding of as many terms.
    scale = max(1.0, problem.num_positions / 16)
    assert_same(problem, direction_like(case, shapes, problem), scale)


@pytest.mark.parametrize("kind", ["confident", "masks", "minimum durations", "forbidden"])
@pytest.mark.parametrize("by_duration", [False, True])
def test_tangents_of_extreme_scores_match_the_reference(by_duration, kind):
    problem = explicit_start(
        random_problem(
            2, 50, 13, 5, boundary=True, ends=True, by_duration=by_duration,
            scale=10.0 if kind == "masks" else 100.0, forbid=0.05 if kind == "forbidden" else 0.0,
        )
    )  # fmt: skip
    drawn = random_problem(
        2, 50, 13, 5, boundary=True, ends=True, by_duration=by_duration, seed=3
    ).replace(lengths=problem.lengths)
    if kind == "masks":
        masked = torch.rand(problem.scores.shape) < 0.1
        problem = problem.replace(scores=problem.scores.masked_fill(masked, -1e9))
    if kind == "minimum durations":
        bias = problem.duration_bias.clone()
        bias[:4, :2] = -math.inf
        problem = problem.replace(duration_bias=bias)
    # The reference sums scores of 1e4: its probabilities are good to 1e-12 of that.
    assert_same(problem, _direction(drawn), scale=1e3)


@pytest.mark.parametrize("by_duration", [False, True])
def test_tangents_by_one_parameter_are_finite_differences(by_duration):
    problem = explicit_start(random_problem(1, 40, 7, 3, by_duration=by_duration, ragged=False))
    zeros = {name: torch.zeros_like(v) for name, v in problem.parameters().items()}
    step = 1e-5
    for name, value in problem.parameters().items():
        slope = torch.randn(value.shape, dtype=torch.float64)
        direction = problem.replace(**{**zeros, name: slope})
        _, mean, found = NUMBA.tangents(problem, direction, {"scores", "duration_bias"})
        ahead, behind = (
            NUMBA.gradients(problem.replace(**{name: value + h * slope}), set(found))
            for h in (step, -step)
        )
        assert abs(float((ahead[0] - behind[0]) / (2 * step) - mean)) < 1e-7
        for key, product in found.items():
            difference = (ahead[1][key] - behind[1][key]) / (2 * step)
            assert float((difference - product).abs().max()) < 1e-7


def test_tangents_of_an_infeasible_sequence_are_zero():
    problem = explicit_start(random_problem(2, 8, 3, 2, ragged=False))
    scores = problem.scores.clone()
    scores[0, 1] = -math.inf
    problem = problem.replace(scores=scores)
    for backend in (NUMBA, REFERENCE):
        log_z, mean, found = backend.tangents(problem, _direction(problem), {"scores"})
        assert log_z[0] == -math.inf and mean[0] == 0
        assert bool((found["scores"][0] == 0).all()) and bool((found["scores"][1] != 0).any())


@pytest.mark.parametrize("by_duration", [False, True])
def test_messages_match_the_reference(by_duration):
    case = Case("wraps", by_duration, True, True, True, True)
    problem = case.problem(LONG_SHAPES)
    expected = REFERENCE.messages(problem)
    found = NUMBA.messages(problem)
    assert_close(found[0], expected[0])
    for b, length in enumerate(problem.lengths.tolist()):
        for own, reference in zip(found[1:], expected[1:], strict=True):
            assert_close(own[b, 1 : length + 1], reference[b, 1 : length + 1])

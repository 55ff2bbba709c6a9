"""The sampling kernels draw what the reference draws; their random numbers and their search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.streaming.cpu import walks
from flash_semicrf.streaming.cpu.parts import whole
from flash_semicrf.streaming.cpu.vector_search import count_below
from flash_semicrf.streaming.cpu.walks import draw
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.streaming.streams import mix, streams, uniform
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import LONG_CASES, LONG_SHAPES, thinned


@whole
def run_count(x, x_at, y, y_at, count, bound):
    return count_below(x, x_at, y, y_at, count, bound)


@whole
def run_draw(state, increment, number):
    return draw(state, increment, np.uint64(number))


def assert_same_samples(problem, num_samples=4):
    actual = sample_table(problem, num_samples, 11, "numba")
    expected = sample_table(problem, num_samples, 11, "reference")
    for mine, others in zip(actual, expected, strict=True):
        assert torch.equal(mine, others)


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned([c for c in LONG_CASES if not c.forbid], 3), ids=str)
def test_samples_are_those_of_the_reference(case):
    assert_same_samples(case.problem(LONG_SHAPES), 2)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", ["two blocks", "K > T", "one label", "one position"])
def test_samples_by_duration_are_those_of_the_reference(shape):
    options = {"boundary": True, "ends": True, "by_duration": True}
    assert_same_samples(random_problem(2, **LONG_SHAPES[shape], **options))


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("by_duration", [False, True])
def test_samples_of_confident_models_are_those_of_the_reference(by_duration, scale):
    problem = random_problem(
        3, 50, 9, 4, scale=scale, forbid=0.03, boundary=True, by_duration=by_duration, seed=1
    )
    assert_same_samples(problem)


def test_samples_obey_minimum_durations_and_forbidden_transitions():
    problem = random_problem(2, 120, 30, 3, ragged=False, scale=30.0, seed=8)
    bias = problem.duration_bias.clone()
    bias[:11] = -math.inf
    transition = problem.transition.masked_fill(torch.eye(3, dtype=torch.bool), -math.inf)
    problem = problem.replace(duration_bias=bias, transition=transition)
    assert_same_samples(problem)
    table = sample_table(problem, 50, 0)
    assert int((table.stop - table.start).min()) >= 12
    follows = table.start[1:] > 0
    assert bool((table.label[1:] != table.label[:-1])[follows].all())


def test_labels_far_below_the_best_are_drawn_by_logarithms():
    # Label 1 can only follow label 2, which is e^-900 less likely than label 0 everywhere.
    transition = torch.zeros(3, 3, dtype=torch.float64)
    transition[:2, 1] = -math.inf
    problem = random_problem(1, 12, 2, 3, ragged=False)
    scores = torch.zeros_like(problem.scores)
    scores[..., 2] = -900.0
    scores[:, 6, [0, 2]] = -math.inf
    problem = problem.replace(scores=scores, transition=transition)
    assert_same_samples(problem, 20)
    table = sample_table(problem, 20, 0)
    ones = (table.label[1:] == 1) & (table.start[1:] > 0)
    assert int(ones.sum()) == 20 and bool((table.label[:-1][ones] == 2).all())


def test_masks_are_sampled_as_the_reference_samples_them():
    problem = random_problem(2, 30, 5, 3, ragged=False, seed=4)
    scores = problem.scores.clone()
    scores[:, ::3, 1] = -1e9
    scores[:, 7] -= 1e9  # a mask of all labels
    assert_same_samples(problem.replace(scores=scores))


def test_float32_problems_are_sampled_in_float64():
    narrow = random_problem(2, 60, 9, 3, dtype=torch.float32, boundary=True)
    assert_same_samples(narrow)
    for mine, others in zip(
        sample_table(narrow, 3, 0), sample_table(narrow.to(torch.float64), 3, 0), strict=True
    ):
        assert torch.equal(mine, others)


def test_samples_drawn_in_parts_are_the_same(monkeypatch):
    problem = random_problem(3, 30, 5, 3, seed=6)
    expected = sample_table(problem, 10, 0)
    monkeypatch.setattr(walks, "_BUFFER", 3 * 30 * 4 + 1)  # four samples at a time
    for mine, others in zip(sample_table(problem, 10, 0), expected, strict=True):
        assert torch.equal(mine, others)


def test_infeasible_sequences_have_no_rows():
    problem = random_problem(3, 9, 3, 2, ragged=False)
    scores = problem.scores.clone()
    scores[1, 4] = -math.inf
    for backend in ("numba", "reference"):
        table = BACKENDS[backend].sample(problem.replace(scores=scores), 2, 0)
        assert set(table.sequence.tolist()) == {0, 2, 3, 5}


def test_mix_gives_the_published_numbers():
    # SplitMix64 of seed 1234567, as its implementations list them.
    step = np.uint64(0x9E3779B97F4A7C15)
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * step
    assert mix(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_compiled_draws_are_those_of_numpy():
    state, increment = streams(5, 2, 3)
    numbers = np.arange(50, dtype=np.uint64)
    expected = uniform(state[1, 2], increment[1, 2], numbers)
    actual = [run_draw(state[1, 2], increment[1, 2], i) for i in range(50)]
    assert actual == expected.tolist()
    assert 0.0 <= min(actual) and max(actual) < 1.0


def test_streams_are_uniform_and_uncorrelated():
    state, increment = streams(0, 40, 25).reshape(2, 1000, 1)
    assert len(np.unique(state)) == len(np.unique(increment)) == 1000
    assert (increment % 2 == 1).all()
    draws = uniform(state, increment, np.arange(100, dtype=np.uint64))
    assert np.abs(draws.mean() - 0.5) < 5 * (1 / 12 / draws.size) ** 0.5
    counts = np.bincount((draws * 100).astype(int).ravel(), minlength=100)
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 170  # 99 degrees of freedom
    # Neighbours in a stream, and equal places of neighbouring streams.
    for a, b in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / draws.size**0.5


@pytest.mark.kernels
@pytest.mark.parametrize("count", [8, 24, 64])
def test_count_below_is_the_search_in_a_cumulative_sum(count):
    generator = np.random.default_rng(count)
    x, y = generator.random((2, count + 3))
    x[5] = x[9] = 0.0
    sums = np.cumsum(x[1 : count + 1] * y[3 : count + 3])
    # Between the sums, so that rounding cannot decide; 0 is below the first.
    for i, bound in enumerate([0.0, *((sums[1:] + sums[:-1]) / 2), 1.1 * sums[-1]]):
        expected = np.searchsorted(sums, bound, side="right") if i < count else count
        if i == 0 or i == count or sums[i] > sums[i - 1]:
            assert run_count(x, 1, y, 3, count, bound) == expected

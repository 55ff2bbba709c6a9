"""The tools that the other tests stand on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_semicrf.testing import (
    assert_close,
    enumerate_scores,
    enumerate_segmentations,
    random_problem,
)


def count_segmentations(num_positions: int, max_duration: int, num_labels: int) -> int:
    counts = [1]
    for t in range(1, num_positions + 1):
        counts.append(num_labels * sum(counts[max(0, t - max_duration) : t]))
    return counts[-1]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_enumerate_segmentations_tile_once_each(num_positions, max_duration, num_labels):
    found = list(enumerate_segmentations(num_positions, max_duration, num_labels))
    assert len({tuple(segments) for segments in found}) == len(found)
    assert len(found) == count_segmentations(num_positions, max_duration, num_labels)
    for segments in found:
        bounds = [0, *(stop for _, stop, _ in segments)]
        assert [start for start, _, _ in segments] == bounds[:-1] and bounds[-1] == num_positions
        assert all(1 <= stop - start <= max_duration for start, stop, _ in segments)
        assert all(0 <= label < num_labels for _, _, label in segments)


def test_enumerate_scores_uses_the_sequences_own_length_and_scores():
    problem = random_problem(3, 4, 2, 2, boundary=True, seed=2)
    for b in range(3):
        length = int(problem.lengths[b])
        segmentations, scores = enumerate_scores(problem, b)
        assert len(segmentations) == len(scores) == count_segmentations(length, 2, 2)
        alone = problem.replace(
            lengths=problem.lengths[b : b + 1],
            **{
                name: getattr(problem, name)[b : b + 1]
                for name in ("scores", "start_scores", "end_scores")
            },
        )
        assert torch.equal(enumerate_scores(alone, 0)[1], scores)


def test_random_problem_shapes():
    problem = random_problem(2, 5, 3, 4, by_duration=True, boundary=True, ends=True)
    shapes = {name: tuple(value.shape) for name, value in problem.parameters().items()}
    assert shapes == {
        "scores": (2, 5, 4),
        "transition": (3, 4, 4),
        "duration_bias": (3, 4),
        "start_scores": (2, 5, 4),
        "end_scores": (2, 5, 4),
        "initial_scores": (4,),
        "final_scores": (4,),
    }


def test_random_problem_is_reproducible():
    a, b, other = (random_problem(seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a.scores, b.scores) and torch.equal(a.lengths, b.lengths)
    assert not torch.equal(a.scores, other.scores)


def test_random_problem_options():
    ragged = random_problem(20, 9)
    assert int(ragged.lengths.max()) == 9 and int(ragged.lengths.min()) < 9
    assert random_problem(3, 9, ragged=False).lengths.tolist() == [9, 9, 9]
    forbidden = random_problem(20, 20, forbid=0.3).scores == -math.inf
    assert 0.25 < float(forbidden.double().mean()) < 0.35
    whole = random_problem(integers=True, scale=5.0)
    assert all(torch.equal(value, value.round()) for value in whole.parameters().values())
    assert random_problem(dtype=torch.float32).dtype == torch.float32
    assert 80 < float(random_problem(20, 20, scale=100.0).scores.std()) < 120


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
def test_assert_close_tolerance_follows_the_dtype(dtype, error):
    expected = torch.ones(3, dtype=torch.float64)
    assert_close((expected + error / 100).to(dtype), expected)
    with pytest.raises(AssertionError):
        assert_close((expected + error).to(dtype), expected)


def test_assert_close_takes_the_precision_that_a_computation_had():
    expected = torch.ones(3, dtype=torch.float64)
    assert_close(expected + 1e-6, expected, dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close(expected + 1e-6, expected)


def test_assert_close_refuses_nan_and_other_shapes():
    nan = torch.full((2,), math.nan)
    for actual, expected in ((nan, nan), (torch.zeros(2), torch.zeros(3))):
        with pytest.raises(AssertionError):
            assert_close(actual, expected)


def test_assert_close_takes_equal_infinities():
    assert_close(torch.tensor([-math.inf]), torch.tensor([-math.inf]))

"""Bad values in the kernels, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from tests.flash_semicrf.flag_cases import (
    assert_all_is_nan,
    assert_bad_sequence_is_nan,
    assert_padding_is_ignored,
    with_bad_value,
    with_length,
)
from tests.flash_semicrf.streaming.triton.interpreter_cases import INTERPRETED, TRITON, Case

pytestmark = INTERPRETED

STATIC = Case(9, 4, 3, True, True, batch=3).problem()
TAIL = Case(8, 3, 3, batch=2, tail=True).problem()
BY_DURATION = Case(6, 3, 2, batch=2, by_duration=True, tail=True).problem()
KINDS = pytest.mark.parametrize(
    "problem", [STATIC, TAIL, BY_DURATION], ids=["static", "tail", "durations"]
)


def test_flags_are_found_in_one_launch():
    from flash_semicrf.streaming.triton.values import flags_of

    problem = Case(40, 5, 3, True, True, 0.2, batch=3, tail=True).problem()
    lengths, bad = flags_of(problem)
    assert torch.equal(lengths, problem.lengths) and not bad.any()
    for name, value in problem.parameters().items():
        shared = value.shape[0] != 3 or value.dim() < 3
        for refused in (math.nan, math.inf, 1e38):
            lengths, bad = flags_of(with_bad_value(problem, name, refused))
            assert bad.tolist() == ([True] * 3 if shared else [False, True, False])
            assert torch.equal(lengths, problem.lengths.masked_fill(bad, 0))
        assert not flags_of(with_bad_value(problem, name, -1e38))[1].any()
    for length in (-3, 0, 41, 2**40):
        assert flags_of(with_length(problem, length))[1].tolist() == [False, True, False]


@pytest.mark.parametrize(
    "problem", [STATIC, TAIL, BY_DURATION], ids=["static", "tail", "durations"]
)
def test_a_bad_score_makes_its_sequence_nan(problem):
    assert_bad_sequence_is_nan(problem, with_bad_value(problem, "scores", math.nan), "triton")


@pytest.mark.parametrize(
    "problem", [STATIC, TAIL, BY_DURATION], ids=["static", "tail", "durations"]
)
def test_a_bad_shared_parameter_makes_everything_nan(problem):
    assert_all_is_nan(with_bad_value(problem, "transition", math.nan), "triton")


def test_padding_is_ignored():
    assert_padding_is_ignored(STATIC, "triton")


@pytest.mark.parametrize("problem", [STATIC, BY_DURATION], ids=["static", "durations"])
def test_the_kernels_take_lengths_of_zero(problem):
    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    _, found = TRITON.gradients(problem.replace(lengths=torch.zeros_like(problem.lengths)), wanted)
    assert all(bool((value == 0).all()) for value in found.values())


def test_a_long_sequence_is_looked_at_in_parts():
    from flash_semicrf.streaming.triton.values import flags_of

    problem = Case(30_000, 4, 3, batch=2).problem()
    assert not flags_of(problem)[1].any()
    problem.scores[1, -1, -1] = math.nan
    lengths, bad = flags_of(problem)
    expected = int(problem.lengths[1]) == 30_000
    assert bad.tolist() == [False, expected]
    problem = problem.replace(lengths=torch.tensor([30_000, 30_000]))
    lengths, bad = flags_of(problem)
    assert bad.tolist() == [False, True] and lengths.tolist() == [30_000, 0]
    problem = problem.replace(lengths=torch.tensor([30_000, 29_999]))
    assert not flags_of(problem)[1].any()

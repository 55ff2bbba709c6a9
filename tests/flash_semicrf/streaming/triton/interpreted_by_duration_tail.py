"""Duration tails with transitions by duration in Triton's interpreter, against the reference loop.

Run by `test_interpreter.py`, as `interpreted.py` is, in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.unroll import fold_durations, unrolled
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    BY_POSITION,
    INTERPRETED,
    REFERENCE,
    TRITON,
    Case,
    with_poisoned_padding,
)

pytestmark = INTERPRETED

FULL = Case(6, 2, 3, True, True, batch=2, by_duration=True, tail=True)
SMALL = FULL._replace(positions=5, batch=1)

CASES = [
    FULL,
    FULL._replace(positions=1),
    FULL._replace(durations=1, forbid=0.1, boundary=False),
    SMALL._replace(durations=9, ends=False, labels=5),
    SMALL._replace(labels=1, scale=100.0, boundary=False),
    SMALL._replace(durations=3, dtype=torch.float32, ends=False, forbid=0.05, scale=10.0),
]


def assert_agrees_with_reference(problem: Potentials, exact: Potentials | None = None) -> None:
    """Log Z and all gradients; `exact` is the problem of the reference, if another."""
    wanted = {*problem.parameters(), *BY_POSITION}
    expected_log_z, expected = REFERENCE.gradients((exact or problem).to(torch.float64), wanted)
    given = with_poisoned_padding(problem)
    log_z, found = choose("triton", given).gradients(given, wanted)
    assert_close(log_z, expected_log_z)
    for name in wanted:
        assert_close(found[name], expected[name], problem.dtype)


def with_tail(problem: Potentials, *rates: float) -> Potentials:
    return problem.replace(duration_tail=torch.tensor(rates, dtype=problem.dtype))


def assert_same_path(problem: Potentials) -> int:
    """Decode as the reference does; return the longest duration."""
    scores, table = TRITON.viterbi(problem)
    expected_scores, expected = REFERENCE.viterbi(problem)
    assert torch.equal(scores, expected_scores)
    for column, values in zip(table, expected, strict=True):
        assert torch.equal(column, values)
    return int((table.stop - table.start).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem())


@pytest.mark.parametrize("rates", [(0.5, 0.5, 0.5), (0.0, -math.inf, -0.1)])
def test_agrees_with_reference_at_any_rate(rates):
    assert_agrees_with_reference(with_tail(SMALL.problem(), *rates))


def test_initial_scores_by_duration():
    problem = SMALL.problem()
    initial = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_agrees_with_reference(problem.replace(initial_scores=initial))


def test_counts_are_those_of_all_durations_written_out():
    problem = SMALL.problem()
    wanted = set(problem.parameters())
    log_z, found = TRITON.gradients(problem, wanted)
    expected_log_z, expected = TRITON.gradients(unrolled(problem), wanted - {"duration_tail"})
    assert_close(log_z, expected_log_z)
    assert_close(TRITON.log_partition(problem), expected_log_z)
    beyond, by_row = fold_durations(expected.pop("duration_bias"), problem.max_duration)
    expected["duration_tail"], expected["duration_bias"] = beyond, by_row
    expected["transition"] = fold_durations(expected["transition"], problem.max_duration)[1]
    for name in wanted:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("mask", [-math.inf, -1e9])
def test_forbidden_positions_end_long_segments(mask):
    problem = with_tail(SMALL.problem(), 0.5, 0.3, 0.5)
    dead = torch.zeros(problem.scores.shape, dtype=torch.bool)
    dead[:, 3, 0] = dead[:, 4, 1] = True
    forbidden = problem.replace(scores=problem.scores.masked_fill(dead, -math.inf))
    masked = problem.replace(scores=problem.scores.masked_fill(dead, mask))
    assert_agrees_with_reference(masked, exact=forbidden)
    assert_close(TRITON.viterbi(masked)[0], REFERENCE.viterbi(forbidden)[0])


def test_infeasible_sequences_have_no_gradient():
    problem = FULL._replace(positions=3).problem()
    problem.scores[0, 0] = -math.inf
    log_z, found = TRITON.gradients(problem, set(problem.parameters()))
    assert (log_z == -math.inf).tolist() == [True, False]
    assert all(bool((value[0] == 0).all()) for value in found.values())


def test_messages_agree():
    problem = FULL._replace(forbid=0.05).problem()
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    assert_close(TRITON.max_messages(problem)[inside], REFERENCE.max_messages(problem)[inside])
    inside[:, 0] = False
    _, *expected = REFERENCE.messages(problem)
    _, *found = TRITON.messages(problem)
    for messages, values in zip(found, expected, strict=True):
        assert_close(messages[inside], values[inside])


def test_viterbi_is_that_of_the_reference():
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    problem = FULL.problem(integers=True, scale=0.7)
    assert_same_path(problem)
    assert assert_same_path(with_tail(problem, 4.0, 4.0, 0.0)) > 2


def test_viterbi_of_all_zeros_takes_the_shortest_and_lowest():
    problem = SMALL.problem(scale=0.0)
    _, table = TRITON.viterbi(problem)
    assert table.start.tolist() == list(range(5)) and set(table.label.tolist()) == {0}

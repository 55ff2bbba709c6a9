"""The numba kernels for eight short sequences at once against the reference loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu.lanes import batch as short
from flash_semicrf.streaming.cpu.static import batch as static
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import LONG_CASES, LONG_SHAPES, thinned, thinned_pairs

EVERYTHING = {
    "scores",
    "transition",
    "duration_bias",
    "start_scores",
    "end_scores",
    "initial_scores",
    "final_scores",
}


def given_by(problem: Potentials) -> set[str]:
    """What the problem has gradients by."""
    return {*problem.parameters(), "start_scores", "end_scores"}


class Others:
    """The kernels for the sequences that are handed on, and which those were."""

    def __init__(self):
        self.problems = []

    def log_partition(self, problem):
        self.problems.append(problem)
        return static._log_partition(problem)

    def gradients(self, problem, wanted):
        self.problems.append(problem)
        return static._gradients(problem, wanted)


def assert_agrees_with_reference(problem: Potentials, handed_on: int | None = 0) -> None:
    """Log Z and all gradients; `handed_on` sequences leave the range (None: any number)."""
    others = Others()
    found = short.gradients(problem, given_by(problem), others.gradients)
    if handed_on is not None:
        assert sum(p.batch_size for p in others.problems) == handed_on
    expected_log_z, expected = choose("reference", problem).gradients(problem, given_by(problem))
    assert_close(found[0], expected_log_z)
    for name, value in found[1].items():
        assert_close(value, expected[name])
    log_z = short.log_partition(problem, others.log_partition)
    assert_close(log_z, found[0])


@pytest.fixture(autouse=True, scope="module")
def single_sequences():
    """Batches of any size are taken."""
    before, short._SEQUENCES = short._SEQUENCES, 1
    yield
    short._SEQUENCES = before


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case",
    thinned([c for c in LONG_CASES if LONG_SHAPES[c.shape]["max_duration"] <= 512], 3),
    ids=str,
)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem(LONG_SHAPES))


@pytest.mark.parametrize("batch_size", [1, 7, 8, 9, 40])
def test_agrees_with_reference_on_any_number_of_sequences(batch_size):
    assert_agrees_with_reference(
        random_problem(batch_size, 24, 6, 4, boundary=True, ends=True, seed=batch_size)
    )


@given(
    batch_size=st.integers(1, 9),
    num_positions=st.integers(1, 30),
    max_duration=st.integers(1, 32),
    num_labels=st.integers(1, 10),
    boundary=st.booleans(),
    ends=st.booleans(),
    forbid=st.sampled_from([0.0, 0.02, 0.3]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_static_agrees_with_reference_whoever_takes_the_sequences(**options):
    problem = random_problem(**options)
    expected_log_z, expected = choose("reference", problem).gradients(problem, given_by(problem))
    log_z, found = static.gradients(problem, given_by(problem))
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        assert_close(value, expected[name])
    assert_close(static.log_partition(problem), expected_log_z)


@pytest.mark.kernels
def test_frames_follow_labels_that_rise_and_fall():
    # One label loses 40 nats at every position to another, and wins them back: 480 in a window.
    problem = random_problem(9, 120, 12, 3, ragged=False, boundary=True, seed=1)
    slope = 20.0 * torch.where(torch.arange(120) < 60, 1.0, -1.0)[:, None]
    assert_agrees_with_reference(
        problem.replace(scores=problem.scores + slope * torch.tensor([1.0, 0.0, -1.0]))
    )


@pytest.mark.parametrize("common", [-300.0, 300.0])
def test_scores_common_to_all_labels_are_taken_out(common):
    problem = random_problem(9, 60, 5, 3, seed=2)
    assert_agrees_with_reference(problem.replace(scores=problem.scores + common))


def test_labels_die_and_return():
    problem = random_problem(9, 100, 6, 3, ragged=False, seed=3)
    scores = problem.scores.clone()
    scores[:3, 20:50, 0] = -math.inf  # longer than the window
    scores[:3, 33:36, 1] = -math.inf
    scores[3:6, ::7, 1] = -math.inf
    scores[6:, 60:90, 1:] = -math.inf  # one label alone
    bias = problem.duration_bias.clone()
    bias[:3, 2] = -math.inf  # a minimum duration
    assert_agrees_with_reference(problem.replace(scores=scores, duration_bias=bias))


def hard_problem(name: str, value: float) -> Potentials:
    """A batch of which the sequences 2 and 5 have something extreme."""
    problem = random_problem(9, 40, 6, 3, ragged=False, boundary=True, ends=True, seed=4)
    extreme = getattr(problem, name).clone()
    extreme[[2, 5], 17, 1] = value
    return problem.replace(**{name: extreme})


@pytest.mark.parametrize(
    ("name", "value"),
    thinned_pairs(["scores", "start_scores", "end_scores"], [-1e9, -200.0, 150.0]),
)
def test_sequences_out_of_range_are_handed_on_and_change_no_other(name, value):
    problem = hard_problem(name, value)
    assert_agrees_with_reference(problem, handed_on=2)
    others = Others()
    log_z, found = short.gradients(problem, EVERYTHING, others.gradients)
    assert torch.equal(others.problems[0].scores, problem.scores[[2, 5]])
    mild = short.gradients(hard_problem(name, 0.0), EVERYTHING, others.gradients)
    rest = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(mild[0][rest], log_z[rest])
    assert all(torch.equal(mild[1][key][rest], found[key][rest]) for key in found)


@pytest.mark.parametrize(
    ("forbidden", "handed_on"), [(slice(0), 0), (slice(2, None), 0), (slice(30), 3)]
)
def test_sources_that_vanish_are_dropped_only_where_others_outweigh_them(forbidden, handed_on):
    # Of 32 positions in a label that loses 40 nats at each nothing is left. That does not matter
    # where later sources reach the same ends, as they do not with a minimum duration.
    problem = random_problem(3, 60, 32, 2, ragged=False, seed=5)
    scores = problem.scores + torch.tensor([0.0, -40.0])
    bias = problem.duration_bias.clone()
    bias[forbidden, 1] = -math.inf
    problem = problem.replace(scores=scores, duration_bias=bias)
    assert_agrees_with_reference(problem, handed_on)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.replace(transition=150.0 * p.transition),
        lambda p: p.replace(duration_bias=150.0 * p.duration_bias),
        lambda p: p.replace(initial_scores=150.0 * p.initial_scores),
        lambda p: p.replace(duration_bias=p.duration_bias.repeat(103, 1)),
        lambda p: p.replace(duration_tail=torch.zeros(3)),
    ],
    ids=["transition", "durations", "initial", "K", "tail"],
)
def test_problems_that_the_kernel_does_not_take(change):
    problem = random_problem(3, 30, 5, 3, ends=True, seed=6)
    assert short.log_partition(problem, None) is not None
    assert short.log_partition(change(problem), None) is None


def test_few_sequences_are_not_taken(monkeypatch):
    monkeypatch.setattr(short, "_SEQUENCES", 4)
    assert short.log_partition(random_problem(3, 30, 5, 3), None) is None
    assert short.log_partition(random_problem(4, 30, 5, 3), None) is not None


def test_long_sequences_of_a_batch_are_handed_on():
    problem = random_problem(4, 300, 5, 3, ragged=False, seed=7)
    lengths = torch.tensor([40, 300, 256, 257])
    assert_agrees_with_reference(problem.replace(lengths=lengths), handed_on=2)


def test_batch_threads_and_padding_change_nothing():
    problem = random_problem(30, 60, 7, 3, boundary=True, ends=True, seed=8)
    before = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(short.gradients(problem, EVERYTHING, None))
    torch.set_num_threads(before)
    log_z, found = results[0]
    for other_log_z, other in results[1:]:
        assert torch.equal(other_log_z, log_z)
        assert all(torch.equal(other[name], found[name]) for name in EVERYTHING)
    for b, length in enumerate(problem.lengths.tolist()):
        by_position = ("scores", "start_scores", "end_scores")
        alone = problem.replace(
            lengths=problem.lengths[b : b + 1],
            **{name: getattr(problem, name)[b : b + 1, :length] for name in by_position},
        )
        own_log_z, own = short.gradients(alone, EVERYTHING, None)
        assert own_log_z[0] == log_z[b]
        for name in EVERYTHING:
            row = found[name][b]
            assert torch.equal(own[name][0], row[:length] if name in by_position else row)
        assert all(bool((found[name][b, length:] == 0).all()) for name in by_position)


def test_what_is_wanted_changes_nothing():
    problem = random_problem(9, 30, 5, 3, boundary=True, seed=9)
    log_z, everything = short.gradients(problem, EVERYTHING, None)
    for name in EVERYTHING:
        own_log_z, found = short.gradients(problem, {name}, None)
        assert found.keys() == {name}
        assert_close(own_log_z, log_z)
        assert_close(found[name], everything[name])


def test_float32_is_computed_in_float64():
    narrow = random_problem(9, 40, 6, 5, boundary=True, dtype=torch.float32, seed=10)
    log_z, found = short.gradients(narrow, EVERYTHING, None)
    expected_log_z, expected = short.gradients(narrow.to(torch.float64), EVERYTHING, None)
    assert log_z.dtype == torch.float64
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        by_position = name in ("scores", "start_scores", "end_scores")
        assert value.dtype == (torch.float32 if by_position else torch.float64)
        assert_close(value, expected[name], value.dtype)


def test_infeasible_sequences_have_gradient_zero():
    problem = random_problem(9, 30, 5, 3, boundary=True, ragged=False, seed=11)
    scores = problem.scores.clone()
    scores[4, 17] = -math.inf
    assert_agrees_with_reference(problem.replace(scores=scores))
    log_z, found = short.gradients(problem.replace(scores=scores), EVERYTHING, None)
    assert log_z[4] == -math.inf
    assert all(bool((value[4] == 0).all()) for value in found.values())


def test_unwritten_memory_is_not_read(monkeypatch):
    problem = random_problem(9, 40, 6, 3, boundary=True, ends=True, forbid=0.05, seed=12)
    expected = short.gradients(problem, EVERYTHING, None)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))
    log_z, found = short.gradients(problem, EVERYTHING, None)
    assert torch.equal(log_z, expected[0])
    assert all(torch.equal(found[name], expected[1][name]) for name in EVERYTHING)

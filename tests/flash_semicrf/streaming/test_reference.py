"""The plain loop against the enumeration of every segmentation."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.problem.segments import table_to_segments
from flash_semicrf.streaming import reference
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import SMALL_CASES, Case, thinned, with_gradients

BACKEND = reference.ReferenceBackend()
EVERYTHING = Case("usual", True, True, True, True, True)


@pytest.mark.parametrize("case", thinned(SMALL_CASES, 5), ids=str)
def test_log_partition_sums_and_maximises_over_all_segmentations(case):
    problem = case.problem()
    for semiring in ("log", "max"):
        expected = []
        for b in range(problem.batch_size):
            _, scores = enumerate_scores(problem, b)
            expected.append(scores.max() if semiring == "max" else scores.logsumexp(0))
        assert_close(reference.log_partition(problem, semiring), torch.stack(expected))


def naive_marginals(problem, b):
    """(position, start, end) marginals (T, C) of sequence b, from all segmentations."""
    shape = (problem.num_positions, problem.num_labels)
    position, start, end = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    segmentations, scores = enumerate_scores(problem, b)
    if scores.max() == -math.inf:
        return position, start, end
    for segments, probability in zip(segmentations, scores.softmax(0).tolist(), strict=True):
        for begin, stop, label in segments:
            position[begin:stop, label] += probability
            start[begin, label] += probability
            end[stop - 1, label] += probability
    return position, start, end


@pytest.mark.parametrize("case", thinned(SMALL_CASES[::5], 3), ids=str)
def test_gradients_are_marginals(case):
    problem = case.problem()
    _, found = BACKEND.gradients(problem, {"scores", "start_scores", "end_scores"})
    for b in range(problem.batch_size):
        actual = [found[name][b] for name in ("scores", "start_scores", "end_scores")]
        for marginal, expected in zip(actual, naive_marginals(problem, b), strict=True):
            assert_close(marginal, expected)


@pytest.mark.parametrize("semiring", ["log", "max"])
@pytest.mark.parametrize("by_duration", [False, True])
def test_log_partition_gradcheck(by_duration, semiring):
    problem = EVERYTHING._replace(by_duration=by_duration).problem()
    problem = problem.replace(initial_scores=None)  # so that the free source is differentiated
    leaves = with_gradients(problem).parameters()

    def log_z(*values):
        given = dict(zip(leaves, values, strict=True))
        return reference.log_partition(problem.replace(**given), semiring)

    assert torch.autograd.gradcheck(log_z, tuple(leaves.values()))


def test_log_partition_gradgradcheck():
    problem = random_problem(2, 3, 2, 2)
    leaves = with_gradients(problem).parameters()

    def log_z(*values):
        return reference.log_partition(problem.replace(**dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradgradcheck(log_z, tuple(leaves.values()))


@pytest.mark.parametrize("name", ["scores", "duration_bias", "transition"])
def test_infeasible_sequences_have_minus_infinity_and_gradient_zero(name):
    problem = Case("usual").problem()
    problem = problem.replace(**{name: torch.full_like(getattr(problem, name), -math.inf)})
    problem = with_gradients(problem)
    log_z = reference.log_partition(problem)
    assert log_z.tolist() == [-math.inf] * 3
    log_z.sum().backward()
    assert all(bool((value.grad == 0).all()) for value in problem.parameters().values())


def test_gradients_of_shared_parameters_come_for_each_sequence():
    problem = EVERYTHING.problem()
    wanted = set(problem.parameters())
    log_z, found = BACKEND.gradients(problem, wanted)
    leaves = with_gradients(problem)
    for b in range(problem.batch_size):
        one = torch.autograd.grad(
            reference.log_partition(leaves)[b], list(leaves.parameters().values())
        )
        for name, expected in zip(leaves.parameters(), one, strict=True):
            own = name in ("scores", "start_scores", "end_scores")
            assert_close(found[name][b], expected[b] if own else expected)
    assert_close(log_z, reference.log_partition(problem))


def best_by_the_tie_rule(problem, b):
    """The best segmentation with the shortest, then lowest, last segment; and so on back."""
    segmentations, scores = enumerate_scores(problem, b)
    best = scores.max()
    tied = [s for s, score in zip(segmentations, scores, strict=True) if score == best]
    ranked = min(tied, key=lambda s: [(stop - start, label) for start, stop, label in s[::-1]])
    return float(best), ranked, len(tied)


def test_viterbi_ties_go_to_the_shortest_then_lowest_last_segment():
    ties = 0
    for seed in range(12):
        case = SMALL_CASES[(seed * 37) % len(SMALL_CASES)]
        problem = case.problem(integers=True, scale=1.0, seed=seed, forbid=0.0)
        scores, table = reference.viterbi(problem)
        segments = table_to_segments(table, problem.batch_size)
        for b in range(problem.batch_size):
            best, expected, tied = best_by_the_tie_rule(problem, b)
            assert float(scores[b]) == best
            assert [(s.start, s.end + 1, s.label) for s in segments[b]] == expected
            ties += tied > 1
    assert ties >= 5


@pytest.mark.parametrize("case", thinned(SMALL_CASES[::7], 3), ids=str)
def test_viterbi_finds_the_best_segmentation(case):
    problem = case.problem()
    scores, table = reference.viterbi(problem)
    segments = table_to_segments(table, problem.batch_size)
    for b in range(problem.batch_size):
        best, expected, _ = best_by_the_tie_rule(problem, b)
        if best == -math.inf:
            assert scores[b] == -math.inf and segments[b] == []
        else:
            assert_close(scores[b], torch.tensor(best, dtype=torch.float64))
            assert [(s.start, s.end + 1, s.label) for s in segments[b]] == expected


def test_max_messages_start_at_zero_and_end_at_the_best_score():
    problem = Case("usual", end=True).problem()
    messages = BACKEND.max_messages(problem)
    assert messages.shape == (3, problem.num_positions + 1, problem.num_labels)
    assert bool((messages[:, 0] == 0).all())
    final = messages[torch.arange(3), problem.lengths].amax(-1)
    assert_close(final, reference.viterbi(problem)[0])


def test_reference_does_every_problem():
    assert BACKEND.why_not(EVERYTHING.problem()) is None
    assert BACKEND.name == "reference"

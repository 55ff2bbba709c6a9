"""N best segmentations against sorted enumeration, the plain dynamic program and Viterbi."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import n_best, viterbi
from flash_semicrf.inference.nbest import n_best_table
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, LONG_SHAPES, Case, thinned
from tests.flash_semicrf.inference.test_sampling import FEASIBLE_CASES, feasible


def tuples(segments):
    return [(s.start, s.end + 1, s.label) for s in segments]


def assert_enumerated(problem, found):
    """Scores are the highest of the enumeration, and each segmentation has its score."""
    number = found.scores.shape[1]
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        score_of = dict(zip(map(tuple, segmentations), scores.tolist(), strict=True))
        best = scores[scores > -math.inf].sort(descending=True).values[:number]
        assert_close(found.scores[b, : len(best)], best)
        assert bool((found.scores[b, len(best) :] == -math.inf).all())
        paths = [tuple(tuples(segments)) for segments in found.segments[b]]
        assert len(paths) == len(set(paths)) == len(best)
        own = torch.tensor([score_of[path] for path in paths], dtype=torch.float64)
        assert_close(found.scores[b, : len(best)], own)
        sums = [math.fsum(s.score for s in segments) for segments in found.segments[b]]
        assert_close(torch.tensor(sums, dtype=torch.float64), own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(FEASIBLE_CASES[::2], 3), ids=str)
def test_n_best_are_the_first_of_all_segmentations_sorted(case, backend):
    problem = feasible(case.problem())
    assert_enumerated(problem, n_best(problem, 12, backend))


@pytest.mark.parametrize("by_duration", [False, True])
def test_n_best_can_be_all_segmentations(by_duration):
    problem = random_problem(
        2, 5, 3, 2, by_duration=by_duration, boundary=True, ends=True, forbid=0.05, seed=1
    )
    found = n_best(feasible(problem), 500)
    assert_enumerated(feasible(problem), found)
    assert max(len(segments) for segments in found.segments) > 50


@pytest.mark.kernels
@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("shape", ["one more", "two blocks", "K > T", "one label", "one position"])
def test_kernel_and_dynamic_program_agree(shape, by_duration):
    options = {**LONG_SHAPES[shape], "by_duration": by_duration}
    options["num_positions"] = min(options["num_positions"], 20)
    problem = random_problem(2, **options, boundary=True, scale=2.0)
    actual, actual_table = n_best_table(problem, 9, "numba")
    expected, expected_table = n_best_table(problem, 9, "reference")
    there = expected > -math.inf
    assert torch.equal(actual > -math.inf, there)
    assert_close(actual[there], expected[there])
    for mine, others in zip(actual_table, expected_table, strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_ties_are_broken_by_the_rule(scale, by_duration):
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    problem = random_problem(
        3, 9, 4, 3, integers=True, scale=scale, by_duration=by_duration, ends=True, boundary=True
    )
    actual, expected = (n_best(problem, 60, backend) for backend in ("numba", "reference"))
    assert torch.equal(actual.scores, expected.scores)
    assert actual.segments == expected.segments
    # Of equal scores: by (duration, label) of the segments from the last one on.
    for scores, segmentations in zip(actual.scores.tolist(), actual.segments, strict=True):
        keys = [
            (-score, [(s.duration, s.label) for s in reversed(segments)])
            for score, segments in zip(scores, segmentations, strict=False)
        ]
        assert keys == sorted(keys)


@pytest.mark.parametrize("shape", ["wraps", "wraps past 32", "many labels"])
def test_the_first_is_that_of_viterbi(shape):
    problem = Case(shape, start=True, end=True).problem(LONG_SHAPES, integers=True, scale=0.7)
    expected = viterbi(problem)
    found = n_best(problem, 3)
    assert torch.equal(found.scores[:, 0], expected.scores)
    assert [segments[0] for segments in found.segments] == expected.segments
    assert bool((found.scores[:, :-1] >= found.scores[:, 1:]).all())


def test_more_leave_the_first_as_they_are():
    problem = random_problem(2, 80, 9, 4, seed=2)
    many = n_best(problem, 120)
    few = n_best(problem, 7)
    assert torch.equal(few.scores, many.scores[:, :7])
    assert few.segments == [segments[:7] for segments in many.segments]


def with_tail(problem, price=3.0):
    """Every segment costs; of every four labels one has no tail, and the others' tails differ."""
    rates = [(0.5, -0.1, -math.inf, 0.0)[c % 4] for c in range(problem.num_labels)]
    tail = torch.tensor(rates, dtype=torch.float64)
    return problem.replace(transition=problem.transition - price, duration_tail=tail)


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("options", [{}, {"boundary": True, "ends": True}], ids=str)
@pytest.mark.parametrize("sizes", [(18, 3, 3), (16, 1, 2), (20, 4, 1), (6, 9, 4), (1, 2, 2)])
def test_segments_beyond_the_longest_duration_are_ranked(sizes, options, by_duration):
    forbid = 0.05 if options and sizes[2] > 1 else 0.0
    problem = with_tail(
        random_problem(2, *sizes, by_duration=by_duration, forbid=forbid, seed=3, **options)
    )
    actual, table = n_best_table(problem, 40, "numba")
    expected, expected_table = n_best_table(problem, 40, "reference")
    assert torch.equal(actual > -math.inf, expected > -math.inf)
    there = expected > -math.inf
    assert_close(actual[there], expected[there])
    if options:  # without them neighbouring segments of one label tie in either order
        for mine, others in zip(table, expected_table, strict=True):
            assert torch.equal(mine, others)


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("tail", [0.0, -1.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_longer_segments_come_after_shorter_ones_of_the_same_score(scale, tail, by_duration):
    problem = random_problem(
        2, 9, 2, 3, integers=True, scale=scale, by_duration=by_duration, ends=True, boundary=True
    )
    tails = torch.tensor([tail, -math.inf, tail], dtype=torch.float64)
    problem = problem.replace(duration_tail=tails)
    actual, expected = (n_best(problem, 80, backend) for backend in ("numba", "reference"))
    assert torch.equal(actual.scores, expected.scores)
    assert actual.segments == expected.segments


@pytest.mark.parametrize("by_duration", [False, True])
def test_more_leave_the_first_as_they_are_with_a_tail(by_duration):
    problem = with_tail(
        random_problem(2, 300, 4, 3, by_duration=by_duration, boundary=True, ragged=False, seed=2),
        price=15.0,
    )
    scores = problem.scores.clone()
    scores[:, 100:200, 1] += 2.0
    scores[:, 50, 0] = -math.inf
    scores[:, 220, 1] = -1e9
    problem = problem.replace(scores=scores)
    many = n_best(problem, 400)
    few = n_best(problem, 7)
    assert torch.equal(few.scores, many.scores[:, :7])
    assert few.segments == [segments[:7] for segments in many.segments]
    for segments, values in zip(many.segments, many.scores, strict=True):
        paths = {tuple(tuples(one)) for one in segments}
        assert len(paths) == 400
        sums = [math.fsum(s.score for s in one) for one in segments]
        assert_close(torch.tensor(sums, dtype=torch.float64), values)
        assert bool((values[:-1] >= values[1:]).all())
        assert max(stop - start for path in paths for start, stop, _ in path) >= 100
    assert_close(many.scores[:, 0], viterbi(problem).scores)


def test_table_holds_the_same_segments():
    problem = random_problem(3, 2, 2, 2)
    found = n_best(problem, 20)
    scores, table = n_best_table(problem, 20)
    assert torch.equal(scores, found.scores)
    empty = [[*segments, *([[]] * (20 - len(segments)))] for segments in found.segments]
    flat = [empty[b][rank] for rank in range(20) for b in range(3)]
    for actual, expected in zip(table, segments_to_table(flat), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_sequences_are_named(backend):
    problem = random_problem(3, 6, 2, 2, ragged=False)
    scores = problem.scores.clone()
    scores[2, 1] = -math.inf
    with record_backends() as ran, pytest.raises(ValueError, match=r"feasible for sequences \[2\]"):
        n_best(problem.replace(scores=scores), 2, backend)
    assert ran == [backend]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None], ids=repr)
def test_bad_numbers_are_refused(n):
    with pytest.raises(ValueError, match="`n` must be an integer >= 1; got "):
        n_best(random_problem(), n)

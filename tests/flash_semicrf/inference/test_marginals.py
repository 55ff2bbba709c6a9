"""Marginals, expected counts and probabilities of segments, against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, segment_probabilities
from flash_semicrf.inference.marginals import expected_score, expected_segments
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.testing import (
    assert_close,
    enumerate_scores,
    enumerate_segmentations,
    random_problem,
)
from tests.flash_semicrf.cases import BACKENDS, SMALL_CASES, Case, thinned

CASES = SMALL_CASES[::7]


def counted(problem, b):
    """Expected counts of sequence b, by enumeration: transition (K, C, C), duration, segments."""
    segmentations, scores = enumerate_scores(problem, b)
    k, c = problem.max_duration, problem.num_labels
    transition = torch.zeros(k, c, c, dtype=torch.float64)
    duration = torch.zeros(k, c, dtype=torch.float64)
    segments: dict[tuple[int, int, int], float] = {}
    if not bool((scores > -math.inf).any()):
        return transition, duration, segments
    for segmentation, p in zip(segmentations, torch.softmax(scores, 0).tolist(), strict=True):
        previous = None
        for start, stop, label in segmentation:
            duration[stop - start - 1, label] += p
            if previous is not None:
                transition[stop - start - 1, previous, label] += p
            segments[start, stop, label] = segments.get((start, stop, label), 0.0) + p
            previous = label
    return transition, duration, segments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_counts_and_segment_probabilities_are_those_of_the_enumeration(case, backend):
    problem = case.problem()
    found = segment_marginals(problem, backend)
    for b in range(problem.batch_size):
        transition, duration, segments = counted(problem, b)
        expected = transition if case.by_duration else transition.sum(0)
        assert_close(found.transition[b], expected)
        assert_close(found.duration[b], duration)
        assert_close(expected_segments(found)[b], duration.sum(0))
        length = int(problem.lengths[b])
        rows = {
            row
            for segmentation in enumerate_segmentations(length, problem.max_duration, 1)
            for row in segmentation
        }
        rows = sorted((s, t, c) for s, t, _ in rows for c in range(problem.num_labels))
        start, stop, label = torch.tensor(rows[::-1]).T  # in no particular order
        table = SegmentTable(torch.full_like(start, b), start, stop, label)
        probability = [segments.get(row, 0.0) for row in rows[::-1]]
        assert_close(
            segment_probabilities(problem, table, backend),
            torch.tensor(probability, dtype=torch.float64),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned([c for c in SMALL_CASES if not c.forbid][::9], 3), ids=str)
def test_expected_score_is_that_of_the_enumeration(case, backend):
    problem = case._replace(initial=case.initial or case.by_duration).problem()
    other = problem.replace(scores=problem.scores.flip(2), duration_bias=-problem.duration_bias)
    found = expected_score(other, segment_marginals(problem, backend))
    for b in range(problem.batch_size):
        weight = torch.softmax(enumerate_scores(problem, b)[1], 0)
        assert_close(found[b], (weight * enumerate_scores(other, b)[1]).sum())


def test_expected_score_needs_counts_and_initial_scores():
    problem = random_problem(by_duration=True)
    with pytest.raises(ValueError, match="must hold expected counts"):
        expected_score(problem, segment_marginals(problem, counts=False))
    with pytest.raises(ValueError, match="must have `initial_scores`"):
        expected_score(problem, segment_marginals(problem))


def test_expected_score_of_what_is_forbidden_is_minus_infinity():
    problem = random_problem(1, 4, 2, 2, ragged=False)
    transition = problem.transition.clone()
    transition[0, 1] = -math.inf
    forbidding = problem.replace(transition=transition)
    assert expected_score(forbidding, segment_marginals(problem)) == -math.inf
    assert bool(expected_score(problem, segment_marginals(forbidding)).isfinite())


@pytest.mark.parametrize("by_duration", [False, True])
def test_marginals_without_counts_are_the_same(by_duration):
    problem = random_problem(3, 40, 6, 3, by_duration=by_duration, boundary=True)
    whole, part = segment_marginals(problem), segment_marginals(problem, counts=False)
    assert part.transition is None and part.duration is None
    for name in ("position", "start", "end"):
        assert_close(getattr(part, name), getattr(whole, name))


@pytest.mark.parametrize("by_duration", [False, True])
def test_long_sequences_have_segment_probabilities(by_duration):
    case = Case("usual", by_duration, True, True, True, True)
    problem = case.problem({"usual": {"num_positions": 200, "max_duration": 12, "num_labels": 4}})
    b = int(problem.lengths.argmax())
    stop = torch.arange(1, 201).repeat_interleave(12)
    start = stop - torch.arange(1, 13).repeat(200)
    stop, start = stop[start >= 0], start[start >= 0]
    label = torch.full_like(start, 2)
    table = SegmentTable(torch.full_like(start, b), start, stop, label)
    probability = segment_probabilities(problem, table)
    ends = torch.zeros(200, dtype=torch.float64).index_add(0, stop - 1, probability)
    assert_close(ends, segment_marginals(problem).end[b, :, 2])


def test_segment_probabilities_of_an_infeasible_sequence_are_zero():
    problem = random_problem(1, 4, 2, 2, ragged=False)
    problem = problem.replace(duration_bias=torch.full((2, 2), -math.inf))
    table = SegmentTable(*(torch.tensor([x]) for x in (0, 1, 2, 0)))
    assert segment_probabilities(problem, table).tolist() == [0.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2, 0, 1, 0), r"sequences in \[0, B-1=1\]; got \[0, 1\) with label 0 in sequence 2"),
        ((0, 0, 4, 0), r"durations in \[1, K=3\]"),
        ((0, 1, 1, 0), r"durations in \[1, K=3\]"),
        ((1, 0, 1, 3), r"labels in \[0, C-1=2\]"),
        ((0, 4, 6, 0), "must lie inside their sequence"),
        ((0, -1, 1, 0), "must lie inside their sequence"),
    ],
)
def test_segments_outside_their_sequence_are_refused(row, message):
    problem = random_problem(2, 5, 3, 3, ragged=False)
    with pytest.raises(ValueError, match=message):
        segment_probabilities(problem, SegmentTable(*(torch.tensor([x]) for x in row)))


def test_segments_must_be_a_table():
    with pytest.raises(TypeError, match="`table` must be a SegmentTable; got list"):
        segment_probabilities(random_problem(), [])


def test_probabilities_survive_large_common_scores():
    problem = random_problem(1, 60, 5, 3, ragged=False)
    table = SegmentTable(*(torch.tensor([x]) for x in (0, 20, 23, 1)))
    moved = problem.replace(scores=problem.scores + 2.0**20)
    back = problem.replace(scores=moved.scores - 2.0**20)
    assert_close(segment_probabilities(moved, table), segment_probabilities(back, table))
    assert float(log_partition(moved)) > 6e7

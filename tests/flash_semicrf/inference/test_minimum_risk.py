"""Minimum-risk decoding against brute force over all segmentations."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import Potentials, minimum_risk, segment_marginals, viterbi
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.problem.validation import check_table
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, thinned
from tests.flash_semicrf.inference.test_sampling import FEASIBLE_CASES, feasible

_TIE = 1e-6  # more than what boundaries between equal labels may cost a sequence of six positions


def expected_positions(marginals, b, segmentation):
    position = marginals.position[b]
    return math.fsum(float(position[t, c]) for s, e, c in segmentation for t in range(s, e))


def expected_f1(marginals, b, segmentation):
    start = marginals.start[b]
    right = math.fsum(float(start[s, c]) for s, _, c in segmentation)
    return 2 * right / (len(segmentation) + float(start.sum()))


CRITERIA = {"position": expected_positions, "boundary": expected_f1}


def best_of_all(problem, risk):
    """Largest value of the criterion over the segmentations that the model allows."""
    marginals = segment_marginals(problem, "reference")
    best = []
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        allowed = (scores > -math.inf).tolist()
        values = [
            CRITERIA[risk](marginals, b, found)
            for found, is_allowed in zip(segmentations, allowed, strict=True)
            if is_allowed
        ]
        best.append(max(values))
    return torch.tensor(best, dtype=torch.float64)


def assert_scored(problem, result, risk):
    """Segments tile, are allowed, and have the value that the result says."""
    table = segments_to_table(result.segments)
    check_table(table, problem)
    assert bool((score_segments(problem, table) > -math.inf).all())
    marginals = segment_marginals(problem)
    for b, segments in enumerate(result.segments):
        found = [(s.start, s.end + 1, s.label) for s in segments]
        value = torch.tensor(CRITERIA[risk](marginals, b, found), dtype=torch.float64)
        assert_close(result.scores[b], value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("risk", CRITERIA)
@pytest.mark.parametrize("case", thinned(FEASIBLE_CASES[::4], 3), ids=str)
def test_no_segmentation_is_better(case, risk, backend):
    problem = feasible(case.problem(scale=2.0))
    result = minimum_risk(problem, risk, backend)
    assert_scored(problem, result, risk)
    best = best_of_all(problem, risk)
    tolerance = _TIE if risk == "position" else 1e-10
    assert bool((result.scores <= best + 1e-10).all())
    assert bool((result.scores >= best - tolerance).all())


@pytest.mark.parametrize("risk", CRITERIA)
@pytest.mark.parametrize("by_duration", [False, True])
def test_longer_sequences_are_no_worse_than_viterbi(by_duration, risk):
    problem = random_problem(3, 120, 9, 4, by_duration=by_duration, boundary=True, ends=True)
    result = minimum_risk(problem, risk)
    assert_scored(problem, result, risk)
    marginals = segment_marginals(problem)
    for b, segments in enumerate(viterbi(problem).segments):
        found = [(s.start, s.end + 1, s.label) for s in segments]
        assert float(result.scores[b]) >= CRITERIA[risk](marginals, b, found) - 1e-5


def test_constraints_hold():
    problem = random_problem(2, 60, 12, 3, ragged=False)
    bias = problem.duration_bias.clone()
    bias[:4] = -math.inf
    transition = problem.transition.masked_fill(torch.eye(3, dtype=torch.bool), -math.inf)
    problem = problem.replace(duration_bias=bias, transition=transition)
    for risk in CRITERIA:
        for segments in minimum_risk(problem, risk).segments:
            assert min(s.duration for s in segments) >= 5
            assert all(a.label != b.label for a, b in zip(segments, segments[1:], strict=False))


def test_boundaries_between_equal_labels_are_those_more_probable_than_not():
    # One label: every segmentation has all positions right. Boundaries at even positions only.
    problem = random_problem(1, 8, 2, 1, ragged=False, scale=0.0)
    problem = problem.replace(duration_bias=torch.tensor([[-5.0], [0.0]], dtype=torch.float64))
    (segments,) = minimum_risk(problem).segments
    assert [s.start for s in segments] == [0, 2, 4, 6]


def test_float32_problems_are_decoded():
    problem = random_problem(2, 50, 8, 3, dtype=torch.float32)
    for risk in CRITERIA:
        result = minimum_risk(problem, risk)
        assert result.scores.dtype == torch.float64
        wide = minimum_risk(problem.to(torch.float64), risk)
        assert_close(result.scores, wide.scores, torch.float32)


@pytest.mark.parametrize("risk", CRITERIA)
def test_infeasible_sequences_are_named(risk):
    problem = random_problem(3, 6, 2, 2, ragged=False)
    scores = problem.scores.clone()
    scores[0, 5] = -math.inf
    with pytest.raises(ValueError, match=r"No segmentation is feasible for sequences \[0\]"):
        minimum_risk(problem.replace(scores=scores), risk)


def test_other_risks_are_refused():
    with pytest.raises(ValueError, match="`risk` must be one of 'position', 'boundary'; got 'f1'"):
        minimum_risk(random_problem(), "f1")


def test_starts_within_a_tolerance_are_not_split_in_two():
    # A start of label 1 that is equally probable at eight places.
    scores = torch.zeros(1, 40, 2)
    scores[0, :16, 0], scores[0, 24:, 1] = 6.0, 6.0
    bias = torch.full((40, 2), -3.0)
    other = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
    p = Potentials(scores, other, bias, torch.tensor([40]))
    result = minimum_risk(p, "boundary", tolerance=8)
    assert [s.label for s in result.segments[0]] == [0, 1]
    assert 16 <= result.segments[0][1].start <= 24
    assert result.segments[0][1].score > 0.9
    assert [s.label for s in minimum_risk(p, "boundary").segments[0]] != [0, 1]


def test_tolerance_is_for_boundaries():
    with pytest.raises(ValueError, match="`tolerance` must be >= 0"):
        minimum_risk(random_problem(), "position", tolerance=2)

"""Decoding by agreement against the list of all segmentations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flash_semicrf import Constraints, Potentials, consensus, viterbi
from flash_semicrf.testing import enumerate_scores, random_problem
from tests.flash_semicrf.cases import message_of


def overlap(one, other):
    """Intersection over union of two segments (start, stop, label); 0 unless above a half."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    iou = max(shared, 0) / (one[1] - one[0] + other[1] - other[0] - max(shared, 0))
    return iou if one[2] == other[2] and iou > 0.5 else 0.0


def qualities(segmentations, p):
    """Expected quality of every segmentation, by the definition."""
    expected = sum(q * len(s) for q, s in zip(p, segmentations, strict=True))
    segments = sorted({segment for s in segmentations for segment in s})
    gain = {
        one: sum(
            q * overlap(one, other) for q, s in zip(p, segmentations, strict=True) for other in s
        )
        for one in segments
    }
    return [2 * sum(map(gain.get, s)) / (len(s) + expected) for s in segmentations]


@pytest.mark.parametrize(
    "options",
    [{}, {"boundary": True, "ends": True}, {"by_duration": True}, {"tail": True}, {"forbid": 0.1}],
    ids=str,
)
def test_no_segmentation_is_expected_to_be_much_better(options):
    for seed in range(4):
        problem = random_problem(1, 5, 3, 2, ragged=False, seed=seed, **options)
        segmentations, scores = enumerate_scores(problem, 0)
        if scores.max() == -torch.inf:
            continue
        quality = qualities(segmentations, scores.softmax(0).tolist())
        result = consensus(problem, 3000, seed=seed)
        found = [(s.start, s.end + 1, s.label) for s in result.segments[0]]
        allowed = [q for q, score in zip(quality, scores, strict=True) if score > -torch.inf]
        assert quality[segmentations.index(found)] > max(allowed) - 0.03
        assert float(result.scores) == pytest.approx(quality[segmentations.index(found)], abs=0.03)


def diffuse():
    """A short segment of label 1 in 60 positions, whose ends may each lie at ten places."""
    scores = torch.zeros(1, 60, 2)
    scores[0, :20, 1] = scores[0, 40:, 1] = -3.0
    scores[0, 28:32, 1] = 1.9
    bias = torch.full((60, 2), -4.0)
    return Potentials(scores, torch.zeros(2, 2), bias, torch.tensor([60])).replace(
        transition=torch.tensor([[-100.0, 0.0], [0.0, -100.0]])
    )


def test_a_segment_with_diffuse_ends_is_found_where_the_most_probable_segmentation_misses_it():
    problem = diffuse()
    assert [s.label for s in viterbi(problem).segments[0]] == [0]
    result = consensus(problem, 200)
    assert [s.label for s in result.segments[0]] == [0, 1, 0]
    middle = result.segments[0][1]
    assert middle.start <= 29 and middle.end >= 30 and 0.3 < middle.score <= 1.0


def test_batches_lengths_and_seeds():
    problem = random_problem(4, 30, 6, 3, seed=2)
    result = consensus(problem, 50, seed=5)
    for segments, length in zip(result.segments, problem.lengths.tolist(), strict=True):
        covered = [t for s in segments for t in range(s.start, s.end + 1)]
        assert covered == list(range(length))
    again = consensus(problem, 50, seed=5)
    assert again.segments == result.segments
    alone = consensus(
        problem.replace(
            scores=problem.scores[:1, : int(problem.lengths[0])], lengths=problem.lengths[:1]
        ),
        50,
        seed=5,
    )
    assert alone.segments[0] == result.segments[0]


def test_forbidden_transitions_are_not_taken_between_samples():
    generator = np.random.default_rng(0)
    for seed in range(10):
        problem = random_problem(1, 20, 5, 4, ragged=False, seed=seed, scale=0.3)
        pairs = torch.from_numpy(generator.random((4, 4)) < 0.5) | torch.eye(4).roll(1, 1).bool()
        problem = problem.replace(transition=problem.transition.masked_fill(~pairs, -torch.inf))
        labels = [s.label for s in consensus(problem, 40).segments[0]]
        assert all(pairs[a, b] for a, b in zip(labels, labels[1:], strict=False))


def test_constraints_hold():
    problem = diffuse()
    known = Constraints(boundaries=[[10]])
    segments = consensus(problem, 20, constraints=known).segments[0]
    assert 10 in [s.start for s in segments]


def test_bad_arguments_are_named():
    problem = random_problem()
    assert "`num_samples`" in message_of(ValueError, consensus, problem, 0)
    assert "`min_iou` must be in [0.5, 1)" in message_of(
        ValueError, consensus, problem, min_iou=0.2
    )

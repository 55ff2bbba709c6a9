"""Durations beyond K in the static kernels' samples and tangents, against the problem unrolled."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.sampling import sample_table
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.tail import unrolled
from flash_semicrf.testing import random_problem

NUMBA = BACKENDS["numba"]
SHAPES = {
    "usual": (60, 5, 3),
    "one label": (50, 4, 1),
    "one duration": (50, 1, 5),
    "K > T": (20, 25, 3),
    "one position": (1, 2, 2),
    "several blocks": (150, 17, 9),
}
"""(T, K, C); T of several blocks where a segment may be longer than one."""

OPTIONS = {
    "plain": {},
    "boundary": {"boundary": True},
    "ends": {"ends": True},
    "all": {"boundary": True, "ends": True, "forbid": 0.03},
}
TAILS = (-0.1, 0.0, 0.5, -math.inf)


def tailed(shape, options, **changes):
    """Short segments cost, so that long ones happen; label by label another tail."""
    num_positions, max_duration, num_labels = SHAPES[shape]
    problem = random_problem(
        2, num_positions, max_duration, num_labels, **{"seed": 1, **OPTIONS[options], **changes}
    )
    tail = torch.tensor([TAILS[c % 4] for c in range(num_labels)], dtype=torch.float64)
    return problem.replace(transition=problem.transition - 6.0, duration_tail=tail)


def masked(problem, value):
    """Some scores of label 0, and one whole position, at `value`."""
    scores = problem.scores.clone()
    scores[:, 20:23, 0] = value
    scores[:, 35] += max(value, -1e9)
    return problem.replace(scores=scores)


# Samples


def assert_unrolled_samples(problem, num_samples=6):
    actual = NUMBA.sample(problem, num_samples, 3)
    expected = NUMBA.sample(unrolled(problem), num_samples, 3)
    for mine, others in zip(actual, expected, strict=True):
        assert torch.equal(mine, others)
    return actual


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_those_of_the_unrolled_problem(shape, options):
    problem = tailed(shape, options)
    table = assert_unrolled_samples(problem)
    durations = table.stop - table.start
    if shape in ("usual", "one label", "one duration", "several blocks") and len(durations):
        assert int(durations.max()) > problem.max_duration


@pytest.mark.parametrize("value", [-1e9, -math.inf])
def test_samples_pass_masks_inside_long_segments(value):
    assert_unrolled_samples(masked(tailed("usual", "boundary", ragged=False), value))


def test_samples_with_a_tail_are_those_of_the_reference():
    problem = tailed("usual", "all", ragged=False, forbid=0.0)
    actual, expected = (sample_table(problem, 3, 7, name) for name in ("numba", "reference"))
    for mine, others in zip(actual, expected, strict=True):
        assert torch.equal(mine, others)

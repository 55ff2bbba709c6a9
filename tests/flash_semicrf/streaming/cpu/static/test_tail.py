"""Durations beyond K in the static kernels' samples and tangents, against the problem unrolled."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.inference.expectations import _direction, centered
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.potentials import explicit_start
from flash_semicrf.problem.unroll import fold_durations, unrolled
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import assert_close, random_problem

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


@pytest.mark.kernels
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


# Tangents


def tangents_of(problem, along, unroll=False):
    """Tangents of a problem with a tail, by all its parameters; by way of the unrolled one."""
    wanted = set(problem.parameters())
    if not unroll:
        return NUMBA.tangents(problem, along, wanted)
    log_z, mean, found = NUMBA.tangents(
        unrolled(problem), _direction(unrolled(along)), wanted - {"duration_tail"}
    )
    beyond, by_row = fold_durations(found["duration_bias"], problem.max_duration)
    found["duration_tail"] = torch.where(problem.unlimited, beyond, 0.0)
    return log_z, mean, {**found, "duration_bias": by_row}


def assert_same_tangents(problem, expected, found, scale=1.0):
    assert_close(found[0], expected[0])
    assert_close(found[1] / scale, expected[1] / scale)
    assert found[2].keys() == expected[2].keys() == set(problem.parameters())
    for name, value in found[2].items():
        assert value.shape == expected[2][name].shape
        assert_close(value / scale, expected[2][name] / scale)


def direction_of(problem, seed=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in problem.parameters().items()
    }
    return _direction(problem.replace(**drawn))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_are_those_of_the_unrolled_problem(shape, options):
    problem = explicit_start(tailed(shape, options))
    along = direction_of(problem)
    expected = tangents_of(problem, along, unroll=True)
    scale = max(1.0, problem.num_positions / 16)  # the counts add up rounding of as many terms
    assert_same_tangents(problem, expected, tangents_of(problem, along), scale)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", ["usual", "one label", "K > T"])
def test_tangents_with_a_tail_are_those_of_the_reference(shape):
    problem = explicit_start(tailed(shape, "all", forbid=0.0))
    along = direction_of(problem)
    expected = BACKENDS["reference"].tangents(problem, along, set(problem.parameters()))
    assert_same_tangents(problem, expected, tangents_of(problem, along), scale=4.0)


@pytest.mark.parametrize("kind", ["confident", "masks", "forbidden", "minimum durations", "long"])
@pytest.mark.parametrize("itself", [False, True])
def test_tangents_of_extreme_scores_are_those_of_the_unrolled_problem(kind, itself):
    scale = {"confident": 100.0, "masks": 10.0}.get(kind, 1.0)
    problem = explicit_start(tailed("several blocks", "boundary", ragged=False, scale=scale))
    problem = problem.replace(transition=problem.transition - 6.0 * (scale - 1.0))
    if kind in ("masks", "forbidden"):
        problem = masked(problem, -1e9 if kind == "masks" else -math.inf)
    if kind == "minimum durations":
        bias = problem.duration_bias.clone()
        bias[:4, :3] = -math.inf
        bias[:9, 3:5] = -1e9
        problem = problem.replace(duration_bias=bias)
    if kind == "long":  # segments of more than a block, of labels with a tail
        scores = problem.scores.clone()
        scores[:, 30:140, 0] += 3.0
        problem = problem.replace(scores=scores, transition=problem.transition - 20.0)
    along = _direction(centered(problem)) if itself else direction_of(problem)
    expected = tangents_of(problem, along, unroll=True)
    # Rounding is relative to logarithms in the hundreds, `scale` times that; in `duration_tail` it
    # counts for every position of a long segment.
    tolerated = 100.0 if kind == "long" else scale
    assert_same_tangents(problem, expected, tangents_of(problem, along), tolerated)


@pytest.mark.parametrize("name", ["duration_tail", "duration_bias", "scores"])
def test_tangents_with_a_tail_are_finite_differences(name):
    problem = explicit_start(tailed("usual", "boundary", ragged=False))
    zeros = {key: torch.zeros_like(v) for key, v in problem.parameters().items()}
    slope = getattr(direction_of(problem), name)
    step = 1e-5
    wanted = {"scores", "duration_bias", "duration_tail"}
    _, mean, found = NUMBA.tangents(problem, problem.replace(**{**zeros, name: slope}), wanted)
    ahead, behind = (
        NUMBA.gradients(problem.replace(**{name: getattr(problem, name) + h * slope}), wanted)
        for h in (step, -step)
    )
    assert float(((ahead[0] - behind[0]) / (2 * step) - mean).abs().max()) < 1e-7
    for key, product in found.items():
        difference = (ahead[1][key] - behind[1][key]) / (2 * step)
        assert float((difference - product).abs().max()) < 1e-6


def test_tangents_of_an_infeasible_sequence_with_a_tail_are_zero():
    problem = explicit_start(tailed("usual", "plain", ragged=False))
    scores = problem.scores.clone()
    scores[0, 1] = -math.inf
    problem = problem.replace(scores=scores)
    wanted = {"duration_tail", "duration_bias"}
    log_z, mean, found = NUMBA.tangents(problem, _direction(problem), wanted)
    assert log_z[0] == -math.inf and mean[0] == 0
    for value in found.values():
        assert bool((value[0] == 0).all()) and bool((value[1] != 0).any())

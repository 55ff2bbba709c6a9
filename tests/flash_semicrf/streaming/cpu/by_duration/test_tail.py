"""The kernels for transitions by duration with a duration tail.

Against the plain loop, and against the same kernels on the problem with all durations written out.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition
from flash_semicrf.inference.expectations import _direction
from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.unroll import fold_durations, unrolled
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import Case, gradients_of, thinned, with_gradients

NUMBA, REFERENCE = BACKENDS["numba"], BACKENDS["reference"]

SHAPES = {
    "usual": {"num_positions": 20, "max_duration": 3, "num_labels": 3},
    "one duration": {"num_positions": 140, "max_duration": 1, "num_labels": 2},
    "two durations": {"num_positions": 70, "max_duration": 2, "num_labels": 9},
    "as long as the window slides": {"num_positions": 150, "max_duration": 64, "num_labels": 2},
    "wraps": {"num_positions": 150, "max_duration": 13, "num_labels": 3},
    "two chunks": {"num_positions": 300, "max_duration": 6, "num_labels": 2, "batch_size": 2},
    "three chunks": {"num_positions": 600, "max_duration": 1, "num_labels": 1, "batch_size": 1},
    "K = T": {"num_positions": 17, "max_duration": 17, "num_labels": 3},
    "K > T": {"num_positions": 12, "max_duration": 20, "num_labels": 2},
    "one position": {"num_positions": 1, "max_duration": 2, "num_labels": 2},
    "one label": {"num_positions": 90, "max_duration": 7, "num_labels": 1},
}

CASES = [
    Case(shape, True, boundary, boundary, ends, ends, forbid, tail=True)
    for i, shape in enumerate(SHAPES)
    for j, (boundary, ends, forbid) in enumerate(
        ((False, False, 0.0), (False, True, 0.1), (True, False, 0.1), (True, True, 0.0))
    )
    if (i + j) % 2 == 0
]

SHORT_CASES = [case for case in CASES if SHAPES[case.shape]["num_positions"] <= 100]


def problems(case: Case, **options) -> list[Potentials]:
    """One with a tail of any sign, and one whose segments are long in some labels only."""
    p = case.problem(SHAPES, **options)
    slow = torch.tensor([0.5, -0.1, -math.inf, 0.0], dtype=torch.float64)
    return [p, p.replace(duration_tail=slow.repeat(3)[: p.num_labels])]


def assert_tables_equal(table: SegmentTable, expected: SegmentTable) -> None:
    for column, other in zip(table, expected, strict=True):
        assert column.tolist() == other.tolist()


def assert_gradients_match(p: Potentials) -> None:
    boundary = {"start_scores", "end_scores"}
    wanted = boundary | p.parameters().keys()
    log_z, found = NUMBA.gradients(p, wanted)
    expected_log_z, expected = REFERENCE.gradients(p, wanted)
    assert_close(log_z, expected_log_z)
    assert_close(log_z, NUMBA.log_partition(p))
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert_close(found[name], value)


def assert_gradients_are_those_unrolled(p: Potentials) -> None:
    found, wanted = with_gradients(p), with_gradients(p)
    log_z, expected_log_z = log_partition(found, "numba"), log_partition(unrolled(wanted), "numba")
    assert_close(log_z.detach(), expected_log_z.detach())
    feasible = log_z > -math.inf
    expected = gradients_of(expected_log_z[feasible].sum(), wanted)
    for name, value in gradients_of(log_z[feasible].sum(), found).items():
        assert_close(value, expected[name])


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_gradients_are_those_of_the_unrolled_problem(case: Case) -> None:
    for problem in problems(case):
        assert_gradients_are_those_unrolled(problem)


@pytest.mark.parametrize("case", SHORT_CASES[::2], ids=str)
def test_gradients_match_reference(case: Case) -> None:
    for problem in problems(case):
        assert_gradients_match(problem)


@pytest.mark.parametrize("case", thinned(CASES[::2], 3), ids=str)
def test_messages_are_those_of_the_unrolled_problem(case: Case) -> None:
    for problem in problems(case):
        for found, expected in zip(
            NUMBA.messages(problem), NUMBA.messages(unrolled(problem)), strict=True
        ):
            assert_close(found, expected)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_initial_scores_by_duration(case: Case) -> None:
    drawn = explicit_start(case.problem(SHAPES).replace(initial_scores=None))
    noise = torch.randn(drawn.initial_scores.shape, dtype=torch.float64)
    problem = drawn.replace(initial_scores=drawn.initial_scores + noise)
    assert problem.initial_scores.dim() == 2
    assert_gradients_are_those_unrolled(problem)


@pytest.mark.parametrize("seed", range(4))
def test_confident_scores_match_reference(seed: int) -> None:
    p = random_problem(
        2, 50, 4, 4, by_duration=True, tail=True, boundary=seed % 2 == 0, ends=seed % 3 == 0,
        forbid=0.1 * (seed % 2), scale=100.0, seed=seed,
    )  # fmt: skip
    assert_gradients_match(p)
    # Peaks of exp(A) and of exp(alpha) are then at different labels, e^-1000 apart.
    q = random_problem(2, 30, 3, 4, by_duration=True, tail=True, ends=seed % 2 == 0, seed=seed)
    assert_gradients_match(q.replace(transition=1000.0 * q.transition))


@pytest.mark.parametrize("large", [-1e9, -1e35])
def test_masks_inside_long_segments_forbid(large: float) -> None:
    p = random_problem(2, 150, 4, 3, by_duration=True, tail=True, ragged=False, seed=1)
    p = p.replace(duration_tail=torch.tensor([0.3, 0.0, -0.1], dtype=torch.float64))
    dead = torch.rand(p.scores.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    dead[..., 0] = False
    masked = p.replace(scores=p.scores.masked_fill(dead, large))
    forbidden = p.replace(scores=p.scores.masked_fill(dead, -math.inf))
    log_z, found = NUMBA.gradients(masked, set(p.parameters()))
    expected_log_z, expected = NUMBA.gradients(forbidden, set(p.parameters()))
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        assert_close(found[name], value)
    assert_gradients_are_those_unrolled(forbidden)
    assert_close(NUMBA.viterbi(masked)[0], NUMBA.viterbi(forbidden)[0])
    assert_tables_equal(NUMBA.viterbi(masked)[1], NUMBA.viterbi(unrolled(forbidden))[1])
    assert_tables_equal(NUMBA.sample(masked, 4, 0), NUMBA.sample(unrolled(forbidden), 4, 0))


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_viterbi_breaks_ties_as_without_a_tail(case: Case) -> None:
    drawn = case.problem(SHAPES, integers=True, scale=0.7)
    tail = torch.tensor([0.0, 1.0, -1.0, -math.inf], dtype=torch.float64)
    for tails in (tail, tail.flip(0), drawn.duration_tail.repeat(3)):
        p = drawn.replace(duration_tail=tails.repeat(3)[: drawn.num_labels])
        scores, table = NUMBA.viterbi(p)
        expected_scores, expected = NUMBA.viterbi(unrolled(p))
        assert_close(scores, expected_scores)
        assert_tables_equal(table, expected)
        if p.num_positions < 100:
            assert_tables_equal(table, REFERENCE.viterbi(p)[1])


@pytest.mark.parametrize("case", thinned(CASES[::2], 3), ids=str)
def test_max_messages_are_those_of_the_unrolled_problem(case: Case) -> None:
    for p in problems(case):
        found, expected = NUMBA.max_messages(p), NUMBA.max_messages(unrolled(p))
        for b, length in enumerate(p.lengths.tolist()):
            assert_close(found[b, : length + 1], expected[b, : length + 1])


def direction_like(case: Case, problem: Potentials) -> Potentials:
    """Another problem of the same kind: what to differentiate along."""
    drawn = explicit_start(case._replace(forbid=0.0).problem(SHAPES, seed=99))
    return _direction(drawn.replace(lengths=problem.lengths))


@pytest.mark.parametrize("case", SHORT_CASES[1::2], ids=str)
def test_tangents_match_reference(case: Case) -> None:
    scale = max(1.0, SHAPES[case.shape]["num_positions"] / 16)
    for problem in map(explicit_start, problems(case)):
        direction, wanted = direction_like(case, problem), set(problem.parameters())
        log_z, mean, found = NUMBA.tangents(problem, direction, wanted)
        expected_log_z, expected_mean, expected = REFERENCE.tangents(problem, direction, wanted)
        assert_close(log_z, expected_log_z)
        assert_close(mean / scale, expected_mean / scale)
        for name, value in found.items():
            assert value.shape == expected[name].shape
            assert_close(value / scale, expected[name] / scale)


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_tangents_are_those_of_the_unrolled_problem(case: Case) -> None:
    scale = max(1.0, SHAPES[case.shape]["num_positions"] / 16)
    for problem in map(explicit_start, problems(case)):
        direction, longest = direction_like(case, problem), problem.max_duration
        wanted = {"scores", "start_scores", "end_scores", "transition", "duration_bias"}
        _, mean, found = NUMBA.tangents(problem, direction, wanted | {"duration_tail"})
        _, wanted_mean, expected = NUMBA.tangents(unrolled(problem), unrolled(direction), wanted)
        assert_close(mean / scale, wanted_mean / scale)
        bias = fold_durations(expected["duration_bias"], longest)
        expected["duration_tail"], expected["duration_bias"] = bias
        _, expected["transition"] = fold_durations(expected["transition"], longest)
        for name, value in found.items():
            assert_close(value / scale, expected[name] / scale)


def test_tangents_of_extreme_scores_match_reference() -> None:
    for forbid, seed in ((0.0, 1), (0.05, 2)):
        options = {"by_duration": True, "tail": True, "boundary": True, "ends": True}
        p = random_problem(2, 60, 5, 4, scale=100.0, forbid=forbid, seed=seed, **options)
        direction = _direction(random_problem(2, 60, 5, 4, **options).replace(lengths=p.lengths))
        wanted = set(p.parameters())
        expected = REFERENCE.tangents(p, direction, wanted)[2]
        for name, value in NUMBA.tangents(p, direction, wanted)[2].items():
            # The reference sums scores of 1e4: its probabilities are good to 1e-12 of that.
            assert_close(value / 1e3, expected[name] / 1e3)


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_samples_are_those_of_the_unrolled_problem(case: Case) -> None:
    for p in problems(case):
        assert_tables_equal(NUMBA.sample(p, 5, 3), NUMBA.sample(unrolled(p), 5, 3))
        initial = torch.randn(p.max_duration, p.num_labels, dtype=torch.float64)
        p = p.replace(initial_scores=initial)
        assert_tables_equal(NUMBA.sample(p, 3, 0), NUMBA.sample(unrolled(p), 3, 0))


def test_one_segment_of_thousands_of_positions() -> None:
    p = random_problem(1, 3000, 5, 2, by_duration=True, tail=True, ragged=False)
    p = p.replace(transition=p.transition - 1000.0, duration_tail=torch.zeros(2).double())
    log_z, found = NUMBA.gradients(p, set(p.parameters()))
    # Nothing but the two segmentations into one segment counts.
    first = torch.logsumexp(p.transition[-1], 0) + p.duration_bias[-1] + p.scores[0].sum(0)
    assert_close(log_z, torch.logsumexp(first, 0, keepdim=True))
    best = NUMBA.viterbi(p)[1]
    assert (best.start.tolist(), best.stop.tolist()) == ([0], [3000])
    assert NUMBA.sample(p, 3, 0).stop.tolist() == [3000] * 3
    share = torch.softmax(first, 0)
    torch.testing.assert_close(found["duration_tail"][0], 2995 * share, rtol=1e-10, atol=0)
    torch.testing.assert_close(found["duration_bias"][0, -1], share, rtol=1e-10, atol=0)
    assert_close(found["scores"], share.expand(1, 3000, 2))

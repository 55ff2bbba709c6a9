"""Finite masks in any parameter: as -inf where a path goes round them, bounded where none does."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.problem.potentials import BY_POSITION, Potentials
from flash_semicrf.streaming.assembly import without_masks
from flash_semicrf.streaming.dispatch import BACKENDS, choose
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem

NUMBA = BACKENDS["numba"]
WANTED = {*BY_POSITION, "transition", "duration_bias", "initial_scores", "final_scores"}


def _shorter_masked(problem: Potentials, shortest: int, mask: float) -> Potentials:
    """Minimum duration `shortest`, by a mask."""
    bias = problem.duration_bias.clone()
    bias[: shortest - 1] = mask
    return problem.replace(duration_bias=bias)


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
@pytest.mark.parametrize(("positions", "longest", "shortest"), [(60, 40, 20), (100, 20, 18)])
def test_masked_durations_are_forbidden_ones(by_duration, tail, positions, longest, shortest):
    problem = random_problem(
        2, positions, longest, 3, by_duration=by_duration, tail=tail, ragged=False, seed=3,
        dtype=torch.float64,
    )  # fmt: skip
    forbidden = _shorter_masked(problem, shortest, -math.inf)
    expected, gradients = NUMBA.gradients(forbidden, WANTED)
    for mask in (-1e9, -1e12, -1e30):
        masked = _shorter_masked(problem, shortest, mask)
        log_z, found = NUMBA.gradients(masked, WANTED)
        assert_close(log_z, expected)
        assert_close(NUMBA.log_partition(masked), expected)
        assert_close(NUMBA.viterbi(masked)[0], NUMBA.viterbi(forbidden)[0])
        for name, value in found.items():
            assert_close(value, gradients[name])


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
@pytest.mark.parametrize("name", ["transition", "duration_bias", *BY_POSITION, "initial_scores"])
@pytest.mark.parametrize("mask", [-1e12, -1e30, 1e30])
def test_masks_on_every_path_keep_log_z_and_bounds(by_duration, name, mask):
    problem = random_problem(
        2, 6, 4, 2, by_duration=by_duration, boundary=True, ends=True, ragged=False, seed=4,
        dtype=torch.float64,
    )  # fmt: skip
    masked = problem.replace(**{name: torch.full_like(getattr(problem, name), mask)})
    expected = torch.stack([enumerate_scores(masked, b)[1].logsumexp(0) for b in range(2)])
    log_z, found = NUMBA.gradients(masked, WANTED)
    torch.testing.assert_close(log_z, expected, rtol=1e-15, atol=1e-9)
    torch.testing.assert_close(NUMBA.log_partition(masked), log_z, rtol=1e-12, atol=0.0)
    k = torch.arange(1, 5.0)[:, None]
    for key, value in found.items():
        most = 6 / k if key == "duration_bias" else 6.0 if key == "transition" else 1.0
        assert (value >= 0).all(), key
        assert (value <= most + 1e-12).all(), key


def test_one_sequence_of_masks_leaves_the_others_alone():
    problem = random_problem(3, 6, 4, 2, seed=5, dtype=torch.float64)
    scores = problem.scores.clone()
    scores[1] = 1e30
    mixed = problem.replace(scores=scores, transition=problem.transition.clone())
    for value in mixed.parameters().values():
        value.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    (log_partition(mixed) * weights).sum().backward()
    others = torch.tensor([0, 2])
    alone = problem.replace(scores=problem.scores[others], lengths=problem.lengths[others])
    log_z, gradients = NUMBA.gradients(alone, {"scores", "transition", "duration_bias"})
    assert_close(log_partition(mixed)[others], log_z)
    assert_close(mixed.scores.grad[others], gradients["scores"])
    assert not mixed.scores.grad[1].any()
    for name in ("transition", "duration_bias"):
        assert_close(getattr(mixed, name).grad, gradients[name].sum(0))


@pytest.mark.parametrize("function", [log_partition, viterbi, segment_marginals])
@pytest.mark.parametrize("size", [1.0, 1e5], ids=["usual", "huge"])
def test_no_function_writes_to_its_arguments(function, size):
    problem = random_problem(2, 6, 4, 2, boundary=True, ends=True, scale=size, dtype=torch.float64)
    before = {name: value.clone() for name, value in problem.parameters().items()}
    function(problem)
    for name, value in problem.parameters().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["transition", "duration_bias", *BY_POSITION, "final_scores"])
@pytest.mark.parametrize(
    ("value", "dtype"), [(1e38, "float32"), (1e38, "float64"), (1e308, "float64")]
)
def test_scores_that_overflow_are_refused(name, value, dtype):
    problem = random_problem(
        2, 6, 4, 2, boundary=True, ends=True, ragged=False, dtype=getattr(torch, dtype)
    )
    entries = getattr(problem, name).clone()
    entries.view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"`{name}` must be below 1e\+38; got .* at index"):
        log_partition(problem.replace(**{name: entries}))
    entries.view(-1)[1] = 9e37
    choose("auto", problem)  # and the largest that is allowed
    assert math.isfinite(log_partition(problem.replace(**{name: entries}))[0])


@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
@pytest.mark.parametrize("seed", range(4))
def test_bound_of_what_passes_a_mask(monkeypatch, tail, by_duration, seed):
    monkeypatch.setattr("flash_semicrf.streaming.assembly.HUGE", 20.0)
    options = {"by_duration": by_duration, "tail": tail, "boundary": True, "ends": seed % 2 == 0}
    problem = random_problem(3, 6, 3, 2, seed=seed, scale=1.0 + 2 * seed, **options)
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(problem.scores.shape, generator=generator) < 0.3
    hit[2] = False
    problem = problem.replace(scores=torch.where(hit, -20.0 - 9 * seed, problem.scores))
    assert (found := without_masks(problem)) is not None
    allowed, least = found
    for b in range(3):
        _, everything = enumerate_scores(problem, b)
        _, kept = enumerate_scores(allowed, b)
        left_out = everything[kept == -math.inf]
        if len(left_out) == 0:
            assert least[b] == -math.inf
        else:
            assert left_out.logsumexp(0) <= least[b] - 50.0


def test_nothing_is_certified_beside_padding_that_is_not_a_number():
    problem = random_problem(2, 6, 3, 2, boundary=True)
    assert without_masks(problem) is None
    problem.scores[0, 1, 1] = -1e9
    problem.start_scores[1, -1] = math.nan
    _, least = without_masks(problem)
    assert least[0].isnan()


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30])
@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
def test_masked_scores_are_forbidden_ones(mask, by_duration):
    problem = random_problem(4, 60, 7, 3, by_duration=by_duration, boundary=True, ragged=False)
    hit = torch.rand(problem.scores.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    hit[:, :, 1] = False  # something avoids every mask
    hit[3, 20] = True  # but here
    masked = problem.replace(scores=torch.where(hit, mask, problem.scores))
    forbidden = problem.replace(scores=torch.where(hit, -math.inf, problem.scores))
    expected, gradients = NUMBA.gradients(forbidden, WANTED)
    log_z, found = NUMBA.gradients(masked, WANTED)
    assert_close(log_z[:3], expected[:3])
    assert_close(NUMBA.log_partition(masked), log_z)
    for name, value in found.items():
        assert_close(value[:3], gradients[name][:3])
    assert expected[3] == -math.inf and log_z[3] == pytest.approx(mask, rel=0.1)
    assert_close(found["scores"][3].sum(-1), torch.ones(60, dtype=torch.float64))

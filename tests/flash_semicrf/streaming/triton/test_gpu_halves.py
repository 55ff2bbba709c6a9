"""Log Z from two halves of a sequence on a CUDA device, against the whole pass there."""

from __future__ import annotations

import functools

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.dispatch import BACKENDS
from tests.flash_semicrf.streaming.triton.gpu_cases import (
    BY_POSITION,
    CONDITIONS,
    assert_near,
    draw,
    marked,
)

pytestmark = [pytest.mark.gpu, *CONDITIONS]

KINDS = marked(
    "usual, full", "many short, full", "three labels, full", "long segments, full",
    "long segments", "usual", "many short", "many labels",
)  # fmt: skip
THREE_LABELS = pytest.mark.gpu(group="three labels, full")


def by_halves(problem: Potentials, always_log: bool = False) -> torch.Tensor:
    from flash_semicrf.streaming.triton.jit import launched_together
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static.launch import run_halves
    from flash_semicrf.streaming.triton.static.plan import plan_of

    p = problem
    call = functools.partial(run_halves, p, problem_of(p), plan_of(p), always_log)
    return launched_together(call)[1]


def by_whole_pass(problem: Potentials) -> torch.Tensor:
    from flash_semicrf.streaming.triton.jit import launched_together
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static.launch import run_passes
    from flash_semicrf.streaming.triton.static.plan import plan_of

    p = problem
    call = functools.partial(run_passes, p, problem_of(p), plan_of(p), False)
    return launched_together(call)[1].log_z[1]


@pytest.mark.parametrize("setting", KINDS)
def test_halves_make_the_log_partition_of_the_whole(setting):
    problem = draw(setting).to("cuda")
    expected = by_whole_pass(problem)
    assert bool(expected.isfinite().any())
    assert_near(by_halves(problem), expected, 1e-10)


@pytest.mark.parametrize("setting", KINDS)
def test_results_repeat_bit_by_bit_and_read_no_unwritten_memory(setting):
    problem = draw(setting).to("cuda")
    first = by_halves(problem)
    assert all(torch.equal(by_halves(problem), first) for _ in range(3))
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert torch.equal(by_halves(problem), first)


@pytest.mark.parametrize("setting", marked("many short, full", "three labels, full"))
def test_lengths_around_the_blocks(setting):
    problem = draw(setting, forbid=0.0)
    lengths = torch.tensor([1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 48, 150])
    rows = {name: getattr(problem, name)[:1].expand(16, -1, -1) for name in BY_POSITION}
    problem = problem.replace(lengths=lengths, **rows)
    expected = BACKENDS["reference"].log_partition(problem.to(torch.float64))
    assert_near(by_halves(problem.to("cuda")), expected, 1e-9)


@pytest.mark.parametrize("setting", marked("usual, full", "three labels, full"))
def test_log_blocks_make_the_same(setting):
    problem = draw(setting).to("cuda")
    assert_near(by_halves(problem, always_log=True), by_whole_pass(problem), 1e-10)


@THREE_LABELS
@pytest.mark.parametrize("mask", [-1e9, -1e30, -torch.inf])
def test_masks_near_the_middle(mask):
    problem = draw("three labels, full", forbid=0.0, ragged=False)
    scores = problem.scores.clone()
    scores[0, 190, 0] = scores[0, 195:198, 1] = scores[0, 203, 1] = scores[0, 205:207, 2] = mask
    problem = problem.replace(scores=scores)
    expected = BACKENDS["reference"].log_partition(problem)
    assert_near(by_halves(problem.to("cuda")), expected, 1e-9)


@THREE_LABELS
def test_infeasible_sequences_are_minus_infinity():
    problem = draw("three labels, full", forbid=0.0, ragged=False).to("cuda")
    for position in (3, 192, 399):
        scores = problem.scores.clone()
        scores[1, position] = -torch.inf
        found = by_halves(problem.replace(scores=scores))
        assert found.isneginf().tolist() == [False, True]

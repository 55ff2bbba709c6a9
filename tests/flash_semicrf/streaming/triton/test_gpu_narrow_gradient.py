"""Gradients without float64 arithmetic on a CUDA device, forced whatever the device is."""

from __future__ import annotations

import functools

import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.streaming.triton.gpu_cases import (
    BY_POSITION,
    CONDITIONS,
    assert_near,
    draw,
    marked,
)

pytestmark = [pytest.mark.gpu, *CONDITIONS]

KINDS = marked(
    "usual", "usual, full", "many short", "three labels, full", "long segments", "many labels",
    "most labels",
)  # fmt: skip
USUAL = pytest.mark.gpu(group="usual")


def gradients(problem: Potentials, narrow: bool) -> dict[str, torch.Tensor]:
    from flash_semicrf.streaming.triton import static
    from flash_semicrf.streaming.triton.jit import launched_together

    wanted = set(problem.parameters())
    call = functools.partial(static.gradients, problem, wanted, narrow=narrow)
    with torch.no_grad():
        return launched_together(call)[1]


@pytest.mark.parametrize("setting", KINDS)
def test_gradients_are_those_of_the_reference(setting):
    problem = draw(setting).to(torch.float32)
    wanted = set(problem.parameters())
    expected = BACKENDS["reference"].gradients(problem.to(torch.float64), wanted)[1]
    found = gradients(problem.to("cuda"), narrow=True)
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name in BY_POSITION else torch.float64)
        assert_near(value, expected[name], 1e-5)


@pytest.mark.parametrize("setting", marked("usual", "usual, full"))
def test_results_repeat_bit_by_bit(setting):
    problem = draw(setting).to(torch.float32).to("cuda")
    first = gradients(problem, narrow=True)
    for _ in range(3):
        found = gradients(problem, narrow=True)
        assert all(torch.equal(found[name], first[name]) for name in first)


@USUAL
@pytest.mark.parametrize("mask", [-1e9, -1e30])
def test_sequences_with_deep_scores_are_done_in_float64(mask):
    problem = draw("usual").to("cuda")
    scores = problem.scores.clone()
    scores[1, 20:30, 3] = mask
    problem = problem.replace(scores=scores)
    found, expected = gradients(problem, True), gradients(problem, False)
    for name in found:
        assert_near(found[name], expected[name], 1e-5)


@USUAL
def test_marginals_of_ten_thousand_positions():
    problem = random_problem(1, 10_000, 20, 24, dtype=torch.float32, ragged=False).to("cuda")
    found, expected = gradients(problem, True), gradients(problem.to(torch.float64), False)
    error = (found["scores"].double() - expected["scores"]).abs().max()
    assert float(error) <= 1e-5
    for name in ("transition", "duration_bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)

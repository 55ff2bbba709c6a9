"""Steep duration scores as scores of the positions: `flash_semicrf.streaming.tilt`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf import entropy, log_partition, sample, segment_marginals
from flash_semicrf.streaming.tilt import STEEP, slopes_of, tilted
from flash_semicrf.testing import random_problem

K = np.arange(1, 401)[:, None]


def test_steady_growth_is_found_by_label():
    bias = np.hstack([3.0 * K, -2.0 * K + 7, np.sin(K)])
    np.testing.assert_allclose(slopes_of(bias), [3.0, -2.0, 0.0], atol=1e-12)


def test_durations_that_are_not_allowed_do_not_count():
    bias = 5.0 * np.hstack([K, K])
    bias[1::2, 0] = -np.inf
    bias[:, 1] = -np.inf
    np.testing.assert_allclose(slopes_of(bias), [5.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    "bias",
    [
        np.zeros((400, 2)),
        0.5 * STEEP * K / len(K),
        np.where(K % 2, 0.0, -1e9),  # masks, not a slope
        np.where(K < 200, 0.0, -1e6),
        np.full((400, 2), -np.inf),
        np.where(K == 400, 1e6, -np.inf),
        np.full((400, 1), np.nan),
    ],
)
def test_anything_else_stays(bias):
    assert slopes_of(bias) is None


def _steep(rate: float, tail: bool, by_duration: bool = False):
    """A problem whose duration scores range over 30 times the rate."""
    options = {"tail": tail, "by_duration": by_duration, "boundary": True, "ends": True}
    p = random_problem(2, 70, 30, 3, seed=4, **options)
    growth = rate * torch.arange(1, 31, dtype=torch.float64)[:, None]
    return p.replace(duration_bias=p.duration_bias + growth * torch.tensor([1.0, -0.7, 0.9]))


@pytest.mark.parametrize("rate", [50.0, -50.0, 3000.0])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("by_duration", [False, True])
def test_results_are_those_of_the_loop(rate, tail, by_duration):
    p = _steep(rate, tail, by_duration)
    assert tilted(p) is not p
    answers = []
    for backend in ("numba", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in p.parameters().items()}
        log_z = log_partition(p.replace(**leaves), backend=backend)
        log_z.sum().backward()
        answers.append([log_z.detach(), *(leaf.grad for leaf in leaves.values())])
    for ours, exact in zip(*answers, strict=True):
        scale = max(1.0, exact.abs().max().item())
        assert (ours - exact).abs().max().item() <= 1e-9 * scale


@pytest.mark.parametrize("tail", [False, True])
def test_marginals_samples_and_entropy(tail):
    p = _steep(40.0, tail)
    ours, exact = (segment_marginals(p, backend=b) for b in ("numba", "reference"))
    torch.testing.assert_close(ours.position, exact.position, rtol=0, atol=1e-9)
    ours, exact = (entropy(p, backend=b) for b in ("numba", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)
    draws = [sample(p, 5, seed=2, backend=b) for b in ("numba", "reference")]
    assert draws[0] == draws[1]


def test_gradients_keep_the_dtype_of_the_scores():
    p = _steep(50.0, False).to(torch.float32)
    scores = p.scores.clone().requires_grad_()
    log_partition(p.replace(scores=scores)).sum().backward()
    assert scores.grad.dtype == torch.float32
    assert math.isclose(scores.grad.sum().item(), p.lengths.sum().item(), rel_tol=1e-5)

"""Gradients weighed by one kernel, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition
from flash_semicrf.inference.autograd import scaled_by_torch
from flash_semicrf.problem.flags import poisoned_gradient
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import with_gradients
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    BY_POSITION,
    INTERPRETED,
    TRITON,
    Case,
)

pytestmark = INTERPRETED


def gradients_of(batch: int, positions: int) -> dict[str, torch.Tensor]:
    """Gradients of each sequence, in the dtypes of the backend."""
    shapes = {"transition": (batch, 3, 3), "duration_bias": (batch, 70, 3)}
    shapes["final_scores"] = (batch, 3)
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return found | {name: torch.randn(batch, positions, 3) for name in ("scores", "end_scores")}


@pytest.mark.parametrize("batch", [1, 3, 37])
@pytest.mark.parametrize("chosen", ["all", "by position", "shared"])
def test_agrees_with_pytorch(batch, chosen):
    gradients = gradients_of(batch, 400)
    if chosen != "all":
        wanted = chosen == "by position"
        gradients = {n: x for n, x in gradients.items() if (n in BY_POSITION) == wanted}
    weight = torch.randn(2 * batch, dtype=torch.float64)[::2]
    weight[-1] = 0.0
    for gradient in gradients.values():
        gradient[-1] = math.nan  # excluded by the weight
    dtypes = dict.fromkeys(gradients, torch.float32)
    for bad in (None, torch.arange(batch) % 2 == 1):
        found = TRITON.scaled(gradients, weight, bad, dtypes)
        upstream = poisoned_gradient(weight, bad)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            each = upstream.to(gradient.dtype)
            expected = scaled_by_torch(gradient, each, name in BY_POSITION).float()
            assert torch.equal(found[name].isnan(), expected.isnan())
            assert_close(found[name].nan_to_num(), expected.nan_to_num(), torch.float32)


def test_an_expanded_weight_of_one_number():
    gradients = gradients_of(3, 5)
    dtypes = {name: value.dtype for name, value in gradients.items()}
    found = TRITON.scaled(gradients, torch.tensor(2.0).double().expand(3), None, dtypes)
    assert torch.equal(found["scores"], 2 * gradients["scores"])
    assert_close(found["transition"], 2 * gradients["transition"].sum(0))


def test_backward_pass_of_a_batch_weighs_every_sequence():
    problem = with_gradients(Case(9, 4, 3, True, True, batch=3).problem())
    given = list(problem.parameters().values())
    weight = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(log_partition(problem, backend), given, weight)
        for backend in ("triton", "reference")
    )
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted)


def test_second_derivatives_are_refused():
    problem = with_gradients(Case(5, 3, 2).problem())
    log_z = log_partition(problem, "triton")
    (gradient,) = torch.autograd.grad(log_z.sum(), problem.scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()

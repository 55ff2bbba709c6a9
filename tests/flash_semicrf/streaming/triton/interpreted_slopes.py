"""Steep duration scores as scores of positions, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.tilt import slopes_of
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    INTERPRETED,
    REFERENCE,
    TRITON,
    with_poisoned_padding,
)

pytestmark = INTERPRETED

DURATIONS = np.arange(1, 151)


def tables_of(p: Potentials, maximum: bool = False):
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static import launch, plan

    plan = plan.plan_of(p)
    tables = launch.tables_of(p, problem_of(p).sizes, plan, maximum)
    return plan, tables.first.view(4, -1)[2:, : p.num_labels], tables.log_window


@pytest.mark.parametrize("tail", [False, True])
def test_tables_hold_the_slopes_and_what_is_left(tail):
    k = DURATIONS
    columns = [
        30.0 * k + np.sin(k),
        -7.5 * k,
        np.where(k < 20, -np.inf, 1e5 * k),
        np.where(k % 2, 0.0, -1e9),
        np.where(k < 70, 0.0, -1e6),
        np.where(k == 120, 1e6, -np.inf),
        np.full(len(k), -np.inf),
        0.1 * k,
        np.where(k == 5, -1e9, 3.0 * k),
    ]
    bias = torch.from_numpy(np.stack(columns, 1))
    p = random_problem(1, 4, len(k), len(columns), tail=tail).replace(duration_bias=bias)
    plan, (slopes, growth), window = tables_of(p)
    expected = torch.from_numpy(slopes_of(bias.numpy()))
    expected[-1] = 0.0  # what is left of it has the mask
    assert_close(slopes, expected, torch.float32)
    assert slopes.nonzero().flatten().tolist() == [0, 1, 2]
    best = (bias / torch.from_numpy(k)[:, None]).max()
    assert_close(growth, torch.full_like(growth, best))
    left = bias - torch.from_numpy(k)[:, None] * slopes
    assert_close(window.view(-1, plan.labels)[1 : len(k) + 1, : len(columns)], left)
    _, (slopes, _), window = tables_of(p, maximum=True)
    assert not slopes.any()
    assert torch.equal(window.view(-1, plan.labels)[1 : len(k) + 1, : len(columns)], bias)


def steep(rates: list[float], **options) -> Potentials:
    """A problem whose duration scores range over 19 times the rates."""
    arguments = {"boundary": True, "ends": True, "seed": 4, **options}
    p = random_problem(2, 37, 20, 3, **arguments)
    growth = torch.arange(1, 21, dtype=torch.float64)[:, None] * torch.tensor(rates).double()
    return p.replace(duration_bias=p.duration_bias + growth)


def assert_agrees_with_reference(p: Potentials) -> None:
    wanted = set(p.parameters())
    expected_log_z, expected = REFERENCE.gradients(p.to(torch.float64), wanted)
    with torch.no_grad():
        log_z, found = TRITON.gradients(with_poisoned_padding(p), wanted)
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        assert_close(value, expected[name], p.dtype)


@pytest.mark.parametrize(
    ("rates", "options"),
    [
        ([50.0, 50.0, 50.0], {"tail": True}),
        ([-50.0, -35.0, -40.0], {"forbid": 0.05}),
        ([3000.0, -2000.0, 20.0], {"boundary": False, "ragged": True}),
        ([20.0, 0.0, -20.0], {"tail": True, "dtype": torch.float32}),
    ],
)
def test_agrees_with_reference(rates, options):
    assert_agrees_with_reference(steep(rates, **options))


@pytest.mark.parametrize("mask", [-math.inf, -1e9])
@pytest.mark.parametrize("tail", [False, True])
def test_masks_in_the_scores_beside_slopes(mask, tail):
    p = steep([40.0, -40.0, 30.0], tail=tail)
    p.scores[:, 9:12, 1] = p.scores[0, 14, 0] = p.scores[1, 20:29, 2] = mask
    p.scores[0, 31] = -1e9 + p.scores[0, 31]
    assert_agrees_with_reference(p)


def test_long_windows_in_parts(monkeypatch):
    from flash_semicrf.streaming.triton.static import plan

    # Parts of two blocks, where 128 steps are too long for the interpreter.
    monkeypatch.setattr(plan, "PART", 16)
    monkeypatch.setattr(plan, "_LONG_WINDOW", 2)
    assert_agrees_with_reference(steep([50.0, 45.0, 55.0]))


def test_messages_and_samples():
    p = steep([50.0, -45.0, 20.0], tail=True)
    p = p.replace(lengths=torch.tensor([37, 37]))  # rows after the end are arbitrary
    for found, expected in zip(TRITON.messages(p), REFERENCE.messages(p), strict=True):
        assert_close(found, expected)
    found, expected = TRITON.sample(p, 3, 7), REFERENCE.sample(p, 3, 7)
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]


@pytest.mark.parametrize("rate", [1.0, 10.0, 50.0, -50.0])
def test_no_block_needs_the_log_domain(rate):
    from flash_semicrf.streaming.triton.records import problem_of
    from flash_semicrf.streaming.triton.static import launch, plan

    p = random_problem(1, 40, 400, 2, seed=1)
    p = p.replace(duration_bias=p.duration_bias + rate * torch.arange(400.0)[:, None])
    problem = problem_of(p)
    _, messages = launch.run_passes(p, problem, plan.plan_of(p)._replace(in_parts=False), keep=True)
    # Rows of such blocks are logarithms, with the sign of one.
    assert bool((messages.forward > 0).all()) and bool((messages.backward > 0).all())

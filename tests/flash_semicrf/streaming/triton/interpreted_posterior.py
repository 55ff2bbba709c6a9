"""Samples, messages and Hessian-vector products in Triton's interpreter, against the reference.

Run by `test_interpreter.py`, as `interpreted.py` is, in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import segment_probabilities
from flash_semicrf.inference.expectations import _direction
from flash_semicrf.inference.information import entropy, position_entropy
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import gradients_of, with_gradients
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    INTERPRETED,
    REFERENCE,
    TRITON,
    Case,
    with_poisoned_padding,
)

pytestmark = INTERPRETED

CASES = [
    Case(1, 3, 3, True, True),
    Case(5, 6, 1, False, True),
    Case(6, 5, 5, True, True, 0.05, batch=2),
    Case(4, 1, 3, True, False, 0.05, 10.0, dtype=torch.float32),
    Case(2, 4, 17, scale=100.0),
    Case(1, 3, 3, True, True, by_duration=True),
    Case(4, 3, 5, True, True, 0.05, batch=2, by_duration=True),
    Case(4, 6, 3, scale=10.0, dtype=torch.float32, by_duration=True),
    Case(8, 2, 3, True, True, 0.05, tail=True),
    Case(5, 1, 1, scale=10.0, tail=True),
    Case(4, 1, 3, forbid=0.05, batch=2, by_duration=True, tail=True),
    Case(4, 2, 3, True, True, by_duration=True, tail=True),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that short problems fill: parts of durations, labels and samples, one by one."""
    from flash_semicrf.streaming.triton import sampling
    from flash_semicrf.streaming.triton.static import tangent

    monkeypatch.setattr(sampling, "_DURATIONS", 4)
    monkeypatch.setattr(sampling, "_BUFFER", 20)
    monkeypatch.setattr(tangent, "_TILE", 16)


def masked(by_duration: bool) -> tuple[Potentials, Potentials]:
    """A problem with finite masks, on some labels and on all, and the same without."""
    exact = Case(5, 4, 3, True, True, by_duration=by_duration).problem()
    exact.scores[0, 3] = torch.tensor([1.0, 3.0, 2.0])  # beside 1e9 whole numbers keep their digits
    scores = exact.scores.clone()
    scores[0, 0, 0] = -1e9
    scores[0, 1, :2] = -1e9
    scores[0, 3] -= 1e9
    exact.scores[scores == -1e9] = -math.inf
    return exact.replace(scores=scores), exact


def infeasible(by_duration: bool) -> Potentials:
    """Two sequences, of which the first has no segmentation."""
    problem = Case(3, 3, 3, True, True, batch=2, by_duration=by_duration).problem()
    scores = problem.scores.clone()
    scores[0, 0] = -math.inf
    return problem.replace(scores=scores)


def assert_same_samples(problem: Potentials, num_samples: int = 2) -> None:
    expected = REFERENCE.sample(unrolled(problem).to(torch.float64), num_samples, 11)
    found = TRITON.sample(with_poisoned_padding(problem), num_samples, 11)
    for column, values in zip(found, expected, strict=True):
        assert torch.equal(column, values)


def assert_same_messages(problem: Potentials) -> None:
    expected_log_z, *expected = REFERENCE.messages(problem.to(torch.float64))
    log_z, *found = TRITON.messages(with_poisoned_padding(problem))
    assert_close(log_z, expected_log_z)
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    inside[:, 0] = False
    for messages, values in zip(found, expected, strict=True):
        assert messages.shape == values.shape
        assert_close(messages[inside], values[inside])


def assert_same_tangents(
    problem: Potentials, direction: Potentials, scale: float = 1.0, exact: Potentials | None = None
) -> None:
    """`exact` is the problem of the reference, if another."""
    wanted = set(problem.parameters())
    _, expected_mean, expected = REFERENCE.tangents(exact or problem, direction, wanted)
    log_z, mean, found = TRITON.tangents(with_poisoned_padding(problem), direction, wanted)
    assert_close(log_z, REFERENCE.log_partition(problem.to(torch.float64)))
    assert_close(mean / scale, expected_mean / scale)
    assert found.keys() == wanted
    for name, value in found.items():
        assert value.shape == expected[name].shape and value.dtype == torch.float64
        assert_close(value / scale, expected[name] / scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples_are_those_of_the_reference(case):
    assert_same_samples(case.problem())


@pytest.mark.parametrize("by_duration", [False, True])
def test_samples_have_durations_beyond_the_longest(by_duration):
    problem = Case(7, 2, 2, True, by_duration=by_duration, tail=True).problem()
    tail = torch.tensor([0.4, -math.inf], dtype=torch.float64)
    bias = problem.duration_bias + torch.tensor([[-9.0], [-1.0]], dtype=torch.float64)
    problem = problem.replace(duration_bias=bias, duration_tail=tail)
    assert_same_samples(problem)
    table = TRITON.sample(problem, 2, 11)
    longer = table.stop - table.start > 2
    assert 0 < int(longer.sum()) and set(table.label[longer].tolist()) == {0}


@pytest.mark.parametrize("case", CASES[2::4], ids=str)
def test_messages_are_those_of_the_reference(case):
    assert_same_messages(case.problem())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents_are_those_of_the_reference(case):
    problem = explicit_start(case.problem())
    drawn = explicit_start(case._replace(forbid=0.0, scale=1.0).problem(seed=99))
    direction = _direction(drawn.replace(lengths=problem.lengths))
    # As in test_tangents.py: confident scores cost the reference digits of its probabilities.
    assert_same_tangents(problem, direction, scale=max(1.0, case.scale))


@pytest.mark.parametrize("by_duration", [False, True])
def test_finite_masks_cost_no_digits(by_duration):
    problem, exact = map(explicit_start, masked(by_duration))
    assert_same_samples(problem)
    assert_same_messages(problem)
    drawn = Case(5, 4, 3, True, True, by_duration=by_duration).problem(seed=99)
    assert_same_tangents(problem, _direction(explicit_start(drawn)), exact=exact)


@pytest.mark.parametrize("by_duration", [False, True])
def test_tangents_where_segments_beyond_the_longest_cannot_end_at_once(by_duration):
    # The messages that a term of duration K goes into say nothing of it: -inf, or far above.
    case = Case(5, 2, 2, True, True, by_duration=by_duration, tail=True)
    problem = explicit_start(case.problem())
    problem.end_scores[0, 1:3] = -math.inf
    problem.end_scores[0, 3, 0] = 900.0
    problem.end_scores[0, 4] = -900.0
    problem.duration_bias[0] -= 5.0
    direction = _direction(explicit_start(case.problem(seed=99)))
    assert_same_tangents(problem, direction, scale=100.0)


@pytest.mark.parametrize("by_duration", [False, True])
def test_infeasible_sequences_have_no_rows_and_no_derivatives(by_duration):
    problem = explicit_start(infeasible(by_duration))
    assert set(TRITON.sample(problem, 2, 0).sequence.tolist()) == {1, 3}
    assert_same_tangents(problem, _direction(problem))


@pytest.mark.parametrize(
    ("quantity", "by_duration"), [(entropy, False), (entropy, True), (position_entropy, False)]
)
def test_entropies_and_their_gradients_run_on_triton(quantity, by_duration):
    problem = Case(3, 3, 3, True, by_duration=by_duration).problem()
    found = {}
    for backend in ("triton", "reference"):
        leaves = with_gradients(problem)
        with record_backends() as ran:
            value = quantity(leaves, backend)
            gradients = gradients_of(value.sum(), leaves)
        assert set(ran) == {backend}
        found[backend] = value.detach(), gradients
    assert_close(found["triton"][0], found["reference"][0])
    for name, gradient in found["triton"][1].items():
        assert_close(gradient, found["reference"][1][name])


def test_samples_and_probabilities_of_segments_run_on_triton():
    problem = Case(3, 3, 3, True, True, batch=2).problem()
    with record_backends() as ran:
        table = sample_table(problem, 2, 0, "triton")
        segments = table._replace(sequence=table.sequence % 2)
        found = segment_probabilities(problem, segments, "triton")
    assert ran == ["triton"] * 2
    assert_close(found, segment_probabilities(problem, segments, "reference"))

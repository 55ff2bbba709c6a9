"""Passes in float32, in Triton's interpreter, against the reference; see `interpreted.py`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_semicrf import log_partition, segment_marginals
from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Cut
from flash_semicrf.streaming.triton.backend import TritonBackend
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import long
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    BY_POSITION,
    INTERPRETED,
    REFERENCE,
    TRITON,
    Case,
    with_poisoned_padding,
)
from tests.flash_semicrf.streaming.triton.only_pieces import OnlyPieces

pytestmark = INTERPRETED

F32 = torch.float32

ORDINARY = [
    Case(1, 3, 3, True, True, dtype=F32),
    Case(15, 1, 1, dtype=F32),
    Case(24, 17, 5, True, True, 0.02, batch=3, dtype=F32),
    Case(33, 9, 3, True, False, scale=5.0, batch=2, dtype=F32),
    long(Case(17, 40, 17, False, True, dtype=F32)),
    Case(16, 27, 40, True, True, 0.02, dtype=F32),
    long(Case(18, 8, 64, False, True, dtype=F32)),
    Case(70, 20, 3, dtype=F32),
    long(Case(16, 1, 8, False, True, 0.1, 10.0, dtype=F32)),
]


@pytest.fixture
def certain(monkeypatch) -> list[Tensor]:
    """Flags of the passes in float32 that ran, (directions, B) each."""
    from flash_semicrf.streaming.triton.static import launch

    flags: list[Tensor] = []
    run = launch.run_narrow_passes

    def recorded(*arguments):
        flags.append(run(*arguments))
        return flags[-1]

    monkeypatch.setattr(launch, "run_narrow_passes", recorded)
    return flags


def wanted_of(problem: Potentials) -> set[str]:
    return {*problem.parameters(), "start_scores", "end_scores"}


def gradients_of(problem: Potentials, backend=None) -> tuple[Tensor, dict[str, Tensor]]:
    backend = backend or TritonBackend("float32")
    with torch.no_grad():
        return backend.gradients(with_poisoned_padding(problem), wanted_of(problem))


def assert_agrees_with_reference(problem: Potentials) -> None:
    """Log Z and all gradients, to what the design asks for of float32."""
    log_z, found = gradients_of(problem)
    expected_log_z, expected = REFERENCE.gradients(problem.to(torch.float64), wanted_of(problem))
    assert log_z.dtype == torch.float64
    torch.testing.assert_close(log_z, expected_log_z, rtol=1e-6, atol=1e-6)
    for name, value in found.items():
        assert value.dtype == (F32 if name in BY_POSITION else torch.float64)
        assert_close(value, expected[name], F32)
    outside = torch.arange(problem.num_positions) >= problem.lengths[:, None]
    assert all(bool((found[name][outside] == 0).all()) for name in BY_POSITION)


@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_ordinary_models_are_certain_and_agree_with_reference(case, certain):
    problem = case.problem()
    assert_agrees_with_reference(problem)
    (flags,) = certain
    assert flags.shape == (2, problem.batch_size) and bool((flags == 1).all())


@pytest.mark.parametrize("durations", [1, 8, long(9), 30])
def test_lengths_around_the_blocks(durations, certain):
    lengths = torch.tensor([1, 2, 7, 8, 9, 15, 16, 17, 25])
    p = random_problem(len(lengths), 25, durations, 2, boundary=True, ends=True, dtype=F32)
    p = p.replace(lengths=lengths)
    with torch.no_grad():
        log_z = TritonBackend("float32").log_partition(with_poisoned_padding(p))
    expected = REFERENCE.log_partition(p.to(torch.float64))
    torch.testing.assert_close(log_z, expected, rtol=1e-6, atol=1e-6)
    assert certain[0].tolist() == [[1] * len(lengths)]


def mixed() -> Potentials:
    """Four sequences of which the second and the last have masks that are not -inf."""
    p = random_problem(4, 26, 12, 3, boundary=True, ends=True, dtype=F32)
    scores = p.scores.clone()
    scores[1, 5:9, 1] = -1e9
    scores[3, 20, 0] = -6e3
    return p.replace(scores=scores, lengths=torch.tensor([26, 26, 11, 22]))


def test_what_is_not_certain_is_done_in_float64(certain):
    problem = mixed()
    assert_agrees_with_reference(problem)
    assert certain[0].tolist() == [[1, 0, 1, 0]] * 2
    log_z, found = gradients_of(problem)
    expected_log_z, expected = gradients_of(problem, TritonBackend("float64"))
    for b in (1, 3):
        assert_close(log_z[b], expected_log_z[b], torch.float64)
        for name, value in found.items():
            assert_close(value[b], expected[name][b], torch.float64)
    assert not torch.equal(log_z[0], expected_log_z[0])  # it was done in float32


def test_both_directions_of_a_sequence_are_done_in_the_same_arithmetic(monkeypatch):
    from flash_semicrf.streaming.triton.static import launch

    run = launch.run_narrow_passes

    def uncertain_backwards(*arguments):
        flags = run(*arguments)
        flags[1, 0] = 0
        return flags

    problem = Case(20, 9, 3, True, batch=2, dtype=F32).problem()
    monkeypatch.setattr(launch, "run_narrow_passes", uncertain_backwards)
    log_z, found = gradients_of(problem)
    expected_log_z, expected = gradients_of(problem, TritonBackend("float64"))
    assert_close(log_z[0], expected_log_z[0], torch.float64)
    assert not torch.equal(log_z[1], expected_log_z[1])
    for name, value in found.items():
        assert_close(value[0], expected[name][0], torch.float64)


def test_a_batch_of_which_nothing_is_certain(certain):
    problem = Case(21, 9, 3, batch=2, dtype=F32).problem()
    scores = problem.scores.clone()
    scores[:, 0, 1] = -1e30
    problem = problem.replace(scores=scores)
    log_z, found = gradients_of(problem)
    assert certain[0].tolist() == [[0, 0]] * 2
    expected_log_z, expected = gradients_of(problem, TritonBackend("float64"))
    assert_close(log_z, expected_log_z, torch.float64)
    for name, value in found.items():
        assert_close(value, expected[name], torch.float64)


def extreme(kind: str) -> tuple[Potentials, int]:
    """A problem of one kind, and whether float32 is certain of it."""
    p = Case(42, 20, 3, dtype=F32).problem()
    k = torch.arange(1.0, 21.0)[:, None]
    signs = torch.where(torch.rand(p.scores.shape) < 0.5, -1.0, 1.0)
    bias = p.duration_bias.clone()
    cycle = torch.full((3, 3), -math.inf)
    cycle[0, 1] = cycle[1, 2] = cycle[2, 0] = 0.3
    if kind == "peaked durations":
        mean = torch.tensor([15.0, 12.0, 18.0])
        return p.replace(duration_bias=k * mean.log() - mean - torch.lgamma(k + 1)), 1
    if kind == "steep durations":
        return p.replace(duration_bias=bias + 6.0 * k), 1
    if kind == "strong emissions":
        return p.replace(scores=50.0 * signs), 1
    if kind == "flat":
        return p.replace(scores=0 * p.scores, duration_bias=0 * bias), 1
    if kind == "minimum durations":
        bias[:9] = -math.inf
        return p.replace(duration_bias=bias), 1
    if kind == "every second duration":
        bias[::2] = NEG_INF
        return p.replace(duration_bias=bias), 1
    if kind == "one duration":
        bias[:20] = -math.inf
        bias[6] = 0.5
        return p.replace(duration_bias=bias), 1
    if kind == "masked durations":
        bias[3:11] = -1e9
        return p.replace(duration_bias=bias), 1
    if kind == "cycle":
        return p.replace(transition=cycle), 1
    if kind == "confident cycle":
        return p.replace(transition=cycle, scores=60.0 * signs), 0
    if kind == "left to right":
        a = torch.where(torch.ones(3, 3).triu() > 0, p.transition, NEG_INF)
        first = torch.tensor([0.0, -math.inf, -math.inf])
        return p.replace(transition=a, initial_scores=first), 1
    if kind == "unlikely transition":
        a = p.transition.clone()
        a[0, 1], a[1, 0] = -1e4, -200.0
        return p.replace(transition=a), 1
    if kind == "forbidden positions":
        scores = p.scores.clone()
        scores[0, 4:9, 0] = scores[0, 17, 2] = scores[0, 23:25, 1] = -math.inf
        scores[0, 30:34, 1:] = NEG_INF
        return p.replace(scores=scores), 1
    assert kind == "confident scores under minimum durations"
    bias[:9] = -math.inf
    return p.replace(scores=50.0 * signs, duration_bias=bias), 0


@pytest.mark.parametrize(
    "kind",
    [
        "peaked durations",
        "steep durations",
        "strong emissions",
        "flat",
        "minimum durations",
        "every second duration",
        "one duration",
        "masked durations",
        "cycle",
        "confident cycle",
        "left to right",
        "unlikely transition",
        "forbidden positions",
        "confident scores under minimum durations",
    ],
)
def test_extreme_models(kind, certain):
    problem, expected = extreme(kind)
    assert_agrees_with_reference(problem)
    assert certain[0].tolist() == [[expected]] * 2


def test_infeasible_sequences_are_minus_infinity_and_leave_the_others_alone(certain):
    problem = Case(20, 5, 3, True, True, batch=3, dtype=F32).problem()
    problem = problem.replace(lengths=torch.tensor([20, 20, 17]))
    scores = problem.scores.clone()
    scores[0, 3] = scores[2, 16] = -math.inf
    log_z, found = gradients_of(problem.replace(scores=scores))
    expected, _ = gradients_of(problem)
    assert log_z[[0, 2]].tolist() == [-math.inf] * 2 and log_z[1] == expected[1]
    assert all(bool((value[[0, 2]] == 0).all()) for value in found.values())
    assert certain[0].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, certain):
    p = Case(19, 9, 3, dtype=F32).problem()
    p = p.replace(scores=p.scores.to(dtype))
    with torch.no_grad():
        log_z = TritonBackend("float32").log_partition(p)
    expected = REFERENCE.log_partition(p.to(torch.float64))
    torch.testing.assert_close(log_z, expected, rtol=1e-6, atol=1e-6)
    assert certain[0].tolist() == [[1]]


def test_long_windows_in_parts(monkeypatch, certain):
    from flash_semicrf.streaming.triton.static import plan

    # Parts of two blocks, where 128 steps are too long for the interpreter.
    monkeypatch.setattr(plan, "PART", 16)
    monkeypatch.setattr(plan, "_LONG_WINDOW", 3)
    problem = Case(43, 27, 2, True, True, 0.02, batch=2, dtype=F32).problem()
    scores = problem.scores.clone()
    scores[1, 20:22] -= torch.tensor([6e3, 0.0])  # found out in the second part
    problem = problem.replace(scores=scores, lengths=torch.tensor([43, 40]))
    assert_agrees_with_reference(problem)
    assert certain[0].tolist() == [[1, 0]] * 2


def test_roundings_do_not_add_up_where_scores_repeat(certain):
    problem = Case(200, 3, 2, dtype=F32).problem()
    problem = problem.replace(scores=0 * problem.scores)
    with torch.no_grad():
        log_z = TritonBackend("float32").log_partition(problem)
    wide = problem.to(torch.float64)
    first = torch.logsumexp(wide.transition, 0)
    # Tables in float32 are another problem, a little: with it, only what the steps round is left.
    rounded = {
        name: getattr(wide, name).exp().float().double().log()
        for name in ("transition", "duration_bias")
    }
    expected = REFERENCE.log_partition(wide.replace(initial_scores=first, **rounded))
    torch.testing.assert_close(log_z, expected, rtol=0, atol=1.2e-6)
    assert certain[0].tolist() == [[1]]


class InShortPieces(InPieces):
    """Pieces shorter than would pay anywhere: the interpreter takes a millisecond a step."""

    def cuts(self, potentials, directions, sums=True):
        return (Cut(length=64, warm=32, span=32),)


def test_pieces_are_certified_to_the_rounding_of_float32(certain):
    p = random_problem(2, 170, 2, 2, boundary=True, ends=True, dtype=F32)
    p = p.replace(lengths=torch.tensor([170, 40]))
    wanted = set(p.parameters())
    expected_log_z, expected = REFERENCE.gradients(p.to(torch.float64), wanted)
    backend = InShortPieces(OnlyPieces("float32"))
    log_z, found = backend.gradients(p, wanted)
    torch.testing.assert_close(log_z, expected_log_z, rtol=1e-6, atol=1e-6)
    for name in wanted:
        assert_close(found[name], expected[name], F32)
    torch.testing.assert_close(backend.log_partition(p), expected_log_z, rtol=1e-6, atol=1e-6)
    assert len(certain) == 2 and all(bool((flags == 1).all()) for flags in certain)


def test_precision_is_asked_for(certain):
    p = Case(9, 4, 3, dtype=F32).problem()
    plain = log_partition(p, "triton")
    assert torch.equal(log_partition(p, "triton", precision="float64"), plain) and not certain
    narrow = log_partition(p, "triton", precision="float32")
    assert len(certain) == 1 and not torch.equal(narrow, plain)
    torch.testing.assert_close(narrow, plain, rtol=1e-6, atol=1e-6)
    segment_marginals(p, "triton", precision="float32")
    assert len(certain) == 2 and len(certain[1]) == 2
    leaf = p.scores.clone().requires_grad_()
    log_partition(p.replace(scores=leaf), "triton", precision="float32").sum().backward()
    assert len(certain) == 3
    assert_close(leaf.grad, REFERENCE.gradients(p.to(torch.float64), {"scores"})[1]["scores"], F32)


@pytest.mark.parametrize("case", [Case(9, 4, 3, by_duration=True), Case(9, 4, 3, tail=True)])
def test_problems_without_a_form_in_float32(case, certain):
    p = case._replace(dtype=F32).problem()
    assert torch.equal(log_partition(p, "triton", precision="float32"), TRITON.log_partition(p))
    assert not certain

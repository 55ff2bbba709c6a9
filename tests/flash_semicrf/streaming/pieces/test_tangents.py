"""Derivatives of gradients in pieces, against the sequential kernels and the reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import FORGETFUL, MODELS, draw
from flash_semicrf import entropy
from flash_semicrf.inference.expectations import position_marginals
from flash_semicrf.problem.potentials import Potentials, explicit_start
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.streaming.reference import ReferenceBackend
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import random_direction

MANY = Slots(64, 0, patient=False)


class Counting(NumbaBackend):
    """The CPU backend, which notes how many sequences it got whole and how many pieces."""

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.pieces: list[int] = []

    def tangents(self, potentials, direction, wanted):
        self.whole.append(potentials.batch_size)
        return super().tangents(potentials, direction, wanted)

    def tangents_of_pieces(self, potentials, direction, wanted, core):
        self.pieces.append(potentials.batch_size)
        return super().tangents_of_pieces(potentials, direction, wanted, core)


def assert_same(p: Potentials, direction: Potentials | None = None, expected=None) -> Counting:
    """Compare with the sequential kernels, or with another backend, in every parameter."""
    p = explicit_start(p)
    direction = random_direction(p) if direction is None else direction
    wanted, counting = set(p.parameters()), Counting()
    log_z, mean, products = (expected or NumbaBackend()).tangents(p, direction, wanted)
    found_z, found_mean, found = InPieces(counting, MANY).tangents(p, direction, wanted)
    torch.testing.assert_close(found_z, log_z, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found_mean, mean, rtol=1e-11, atol=1e-9)
    # The derivative of log Z, and the messages' that it is the difference of, are as large as this:
    # its rounding, times a probability, is an error of each derivative of the whole.
    noise = 1e-15 * max(float(mean.abs().max()), float(log_z[log_z.isfinite()].abs().max()))
    for name, product in products.items():
        atol = 1e-9 * float(product.abs().max()) + 20 * noise
        torch.testing.assert_close(found[name], product, rtol=1e-7, atol=atol)
    return counting


@pytest.mark.kernels
@pytest.mark.parametrize("model", FORGETFUL)
def test_models_that_forget_need_no_second_attempt(model):
    counting = assert_same(draw(model, [4000, 200, 3000], 8, 4))
    assert counting.whole == [] and len(counting.pieces) == 1


@pytest.mark.parametrize("model", sorted(MODELS.keys() - set(FORGETFUL)))
def test_models_that_forget_slowly_or_never(model):
    counting = assert_same(draw(model, [24_000, 20_000], 8, 4))
    if model == "counter":
        assert counting.whole == [2] and len(counting.pieces) == 2
    if model == "weak":
        assert counting.whole == [] and len(counting.pieces) == 2


@pytest.mark.kernels
@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
def test_every_part_of_a_problem(by_duration):
    p = random_problem(
        3, 2500, 6, 3, by_duration=by_duration, boundary=True, ends=True, forbid=0.01
    ).replace(lengths=torch.tensor([2500, 40, 1999]))
    assert assert_same(p).whole == []


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
def test_the_reference_gives_the_same(by_duration):
    p = random_problem(1, 1800, 5, 3, by_duration=by_duration, boundary=True, ends=True)
    assert assert_same(p, expected=ReferenceBackend()).whole == []


def test_cuts_that_fall_anywhere():
    for length in range(2000, 2400, 37):
        assert assert_same(draw("random", [length], 7, 3, seed=length)).whole == []


@pytest.mark.parametrize("name", ["scores", "transition", "duration_bias", "initial_scores"])
def test_a_direction_in_one_entry(name):
    # Pieces on one side of a position get no derivative but what all of their messages share.
    p = explicit_start(draw("random", [4000], 8, 4))
    nothing = {n: torch.zeros_like(value) for n, value in p.parameters().items()}
    entry = nothing[name][0, 1777] if name == "scores" else nothing[name]
    entry.view(-1)[1] = 3.0
    assert assert_same(p, p.replace(**nothing)).whole == []


def test_a_direction_that_changes_nothing():
    p = explicit_start(draw("random", [4000], 8, 4))
    nothing = {n: torch.zeros_like(value) for n, value in p.parameters().items()}
    counting = Counting()
    _, mean, found = InPieces(counting, MANY).tangents(p, p.replace(**nothing), {"scores"})
    assert counting.whole == [] and mean.item() == 0.0 and not found["scores"].any()
    # The same for all labels: log Z changes, and no probability.
    changes = torch.linspace(-3, 5, 4000, dtype=torch.float64)[:, None]
    nothing["scores"] = changes.expand(1, -1, 4)
    _, mean, found = InPieces(counting, MANY).tangents(p, p.replace(**nothing), {"scores"})
    torch.testing.assert_close(mean, changes.sum()[None], rtol=1e-13, atol=0.0)
    # What is left is rounding of the derivative of log Z, summed up from position to position.
    assert counting.whole == [] and found["scores"].abs().max() < 1e-14 * mean.item()


def test_masks_in_the_direction():
    p = explicit_start(draw("random", [4000], 8, 4))
    p.scores[:, 900:2900:7, 2] = -1e9
    direction = random_direction(p)
    direction.scores[:, 900:2900:7, 2] = -1e9
    assert assert_same(p, direction).whole == []


def test_derivatives_that_remember_are_done_as_a_whole():
    # Label 3 is never left, and has no posterior: the other messages forget, and so do its own,
    # which are sums over all boundaries at which it may have been entered. What changes at the
    # beginning changes them by its share, e^-0.001 a position.
    p = explicit_start(draw("random", [3000], 8, 4))
    p.transition[:3, 3] = -30.0
    p.transition[3, :3] = -torch.inf
    counting = assert_same(p)
    assert counting.whole == [1]


def test_a_sequence_that_fails_is_done_alone():
    p = draw("no evidence", [12_000] * 3, 8, 4)
    p.scores[[0, 2]] = 6 * draw("random", [12_000] * 2, 8, 4).scores
    assert assert_same(p).whole == [1]


@pytest.mark.parametrize("bad", [1, 0])
def test_sequences_without_a_segmentation(bad):
    p = draw("random", [3000, 3000], 8, 4)
    p.scores[bad, 1500] = -torch.inf
    assert assert_same(p).whole == [1]


def test_the_same_call_gives_the_same_bits():
    p = explicit_start(draw("random", [4000, 2500], 8, 4))
    backend, direction = InPieces(NumbaBackend(), MANY), random_direction(p)
    (_, mean, first), (_, again, second) = (
        backend.tangents(p, direction, {"scores", "duration_bias"}) for _ in range(2)
    )
    assert torch.equal(mean, again)
    for name, value in first.items():
        assert torch.equal(value, second[name])


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
def test_public_functions(monkeypatch, by_duration):
    p = explicit_start(random_problem(1, 20_000, 4, 3, by_duration=by_duration))
    counts = []
    original = NumbaBackend.tangents_of_pieces

    def counted(self, *arguments):
        counts.append(arguments[0].batch_size)
        return original(self, *arguments)

    def products():
        leaves = [p.scores.clone().requires_grad_() for _ in range(2)]
        entropy(p.replace(scores=leaves[0])).sum().backward()
        position_marginals(p.replace(scores=leaves[1])).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    monkeypatch.setattr(NumbaBackend, "tangents_of_pieces", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = products()
    assert counts == [4, 4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    # The whole sums up differences of starts and ends along 20,000 positions, each off by the
    # rounding of the derivative of log Z, which is as large.
    for x, y in zip(found, products(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)
    assert counts == [4, 4]

"""Pieces of sequences in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf.problem.potentials import explicit_start
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Cut, cuts_of
from flash_semicrf.streaming.triton.backend import TritonBackend
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import random_direction
from tests.flash_semicrf.streaming.triton.interpreter_cases import INTERPRETED
from tests.flash_semicrf.streaming.triton.only_pieces import OnlyPieces

pytestmark = INTERPRETED

WANTED = {"scores", "start_scores", "end_scores", "transition", "duration_bias"}
WANTED |= {"initial_scores", "final_scores"}


class InShortPieces(InPieces):
    """Pieces shorter than would pay anywhere: the interpreter takes a millisecond a step."""

    def cuts(self, potentials, directions, sums=True):
        return (Cut(length=64, warm=32, span=32),)


def problem(by_duration: bool = False):
    p = random_problem(2, 170, 2, 2, by_duration=by_duration, boundary=True, ends=True)
    if by_duration:
        p = p.replace(initial_scores=torch.tensor([[0.3, -1.2], [0.8, 0.1]], dtype=torch.float64))
    return p.replace(lengths=torch.tensor([170, 40]))


BOTH = pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])


@BOTH
def test_results_are_those_of_the_whole(by_duration):
    p = problem(by_duration)
    plain, backend = NumbaBackend(), InShortPieces(OnlyPieces())
    log_z, gradients = plain.gradients(p, WANTED)
    torch.testing.assert_close(backend.log_partition(p), log_z, rtol=1e-12, atol=1e-9)
    found, others = backend.gradients(p, WANTED)
    torch.testing.assert_close(found, log_z, rtol=1e-12, atol=1e-9)
    for name in WANTED:
        torch.testing.assert_close(others[name], gradients[name], rtol=1e-7, atol=1e-9)
    best, table = backend.viterbi(p)
    scores, expected = plain.viterbi(p)
    torch.testing.assert_close(best, scores, rtol=1e-12, atol=1e-9)
    for x, y in zip(table, expected, strict=True):
        assert torch.equal(x, y)


@BOTH
@pytest.mark.parametrize("rate", [-0.5, 0.5], ids=["short", "long"])
def test_results_with_a_tail_are_those_of_the_whole(by_duration, rate):
    p = random_problem(
        2, 170, 2, 2, by_duration=by_duration, boundary=True, ends=True, tail=True, forbid=0.03
    ).replace(lengths=torch.tensor([170, 40]))
    p.duration_tail.add_(rate - p.duration_tail.mean())
    p.scores[0, 60:66, 1] -= 40_000.0  # a mask inside segments longer than K
    plain, backend = NumbaBackend(), InShortPieces(OnlyPieces())
    wanted = WANTED - {"initial_scores"} | {"duration_tail"}
    log_z, gradients = plain.gradients(p, wanted)
    torch.testing.assert_close(backend.log_partition(p), log_z, rtol=1e-12, atol=1e-9)
    found, others = backend.gradients(p, wanted)
    torch.testing.assert_close(found, log_z, rtol=1e-12, atol=1e-9)
    for name in wanted:
        torch.testing.assert_close(others[name], gradients[name], rtol=1e-7, atol=1e-9)


@BOTH
def test_tangents_are_those_of_the_whole(by_duration):
    p = explicit_start(problem(by_duration))
    direction = random_direction(p)
    direction.scores[0, 90:100] += 20_000.0  # what the passes leave out of the direction, too
    plain, backend = NumbaBackend(), InShortPieces(OnlyPieces())
    log_z, mean, expected = plain.tangents(p, direction, WANTED)
    found_z, found_mean, found = backend.tangents(p, direction, WANTED)
    torch.testing.assert_close(found_z, log_z, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found_mean, mean, rtol=1e-12, atol=1e-9)
    for name in WANTED:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-7)


@BOTH
def test_messages_and_samples_are_those_of_the_whole(by_duration):
    p = problem(by_duration)
    if not by_duration:  # what the passes leave out
        p.scores[0, 90:120] -= 30_000.0
    plain, backend = NumbaBackend(), InShortPieces(OnlyPieces())
    found, expected = backend.messages(p), plain.messages(p)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=1e-9)
    best, expected_best = backend.max_messages(p), plain.max_messages(p)
    for x, y in [*zip(found[1:], expected[1:], strict=True), (best, expected_best)]:
        for b, length in enumerate(p.lengths.tolist()):
            x_b, y_b = x[b, 1 : length + 1], y[b, 1 : length + 1]
            torch.testing.assert_close(x_b, y_b, rtol=1e-13, atol=1e-9)
    for x, y in zip(backend.sample(p, 2, 3), plain.sample(p, 2, 3), strict=True):
        assert torch.equal(x, y)


def test_the_interpreter_is_no_device_to_fill():
    p = random_problem(1, 9000, 4, 3)
    slots = TritonBackend().slots(p, sums=True)
    assert slots is not None and cuts_of(1, 9000, 4, 1, slots) == ()

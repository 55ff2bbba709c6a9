"""Pieces of sequences in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import torch

from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Cut, cuts_of
from flash_semicrf.streaming.triton.backend import TritonBackend
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.streaming.triton.interpreter_cases import INTERPRETED
from tests.flash_semicrf.streaming.triton.only_pieces import OnlyPieces

pytestmark = INTERPRETED

WANTED = {"scores", "start_scores", "end_scores", "transition", "duration_bias"}


class InShortPieces(InPieces):
    """Pieces shorter than would pay anywhere: the interpreter takes a millisecond a step."""

    def cuts(self, potentials, directions, sums=True):
        return (Cut(length=64, warm=32, span=32),)


def test_results_are_those_of_the_whole():
    p = random_problem(2, 300, 4, 3, boundary=True, ends=True)
    p = p.replace(lengths=torch.tensor([300, 40]))
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


def test_the_interpreter_is_no_device_to_fill():
    p = random_problem(1, 9000, 4, 3)
    slots = TritonBackend().slots(p, sums=True)
    assert slots is not None and cuts_of(1, 9000, 4, 1, slots) == ()

"""Problems with a duration tail in pieces, against the sequential kernels and the reference."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.forgetting import draw
from flash_semicrf import log_partition
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.streaming.reference import ReferenceBackend
from flash_semicrf.testing import random_problem

MANY = Slots(64, 0, patient=False)


class Counting(NumbaBackend):
    """The CPU backend, which notes how many sequences it got whole and how many pieces."""

    def __init__(self) -> None:
        self.whole: list[int] = []
        self.pieces: list[int] = []

    def log_partition(self, potentials):
        self.whole.append(potentials.batch_size)
        return super().log_partition(potentials)

    def gradients(self, potentials, wanted):
        self.whole.append(potentials.batch_size)
        return super().gradients(potentials, wanted)

    def log_partition_of_pieces(self, potentials, core):
        self.pieces.append(potentials.batch_size)
        return super().log_partition_of_pieces(potentials, core)

    def gradients_of_pieces(self, potentials, wanted, core, span):
        self.pieces.append(potentials.batch_size)
        return super().gradients_of_pieces(potentials, wanted, core, span)


def assert_same(p: Potentials, expected=None) -> Counting:
    """Compare log Z and all gradients with the sequential kernels, or with another backend."""
    counting, wanted = Counting(), set(p.parameters()) | {"start_scores", "end_scores"}
    backend = InPieces(counting, MANY)
    log_z, gradients = (expected or NumbaBackend()).gradients(p, wanted)
    torch.testing.assert_close(backend.log_partition(p), log_z, rtol=1e-12, atol=1e-9)
    found, others = backend.gradients(p, wanted)
    torch.testing.assert_close(found, log_z, rtol=1e-12, atol=1e-9)
    noise = 1e-15 * float(log_z[log_z.isfinite()].abs().max())
    for name in wanted:
        torch.testing.assert_close(others[name], gradients[name], rtol=1e-7, atol=1e-9 + 20 * noise)
    return counting


def with_rate(p: Potentials, rate: float) -> Potentials:
    """The problem with a tail whose mean rate is given."""
    tail = p.duration_tail
    if tail is None:
        tail = torch.linspace(-0.3, 0.3, p.num_labels, dtype=torch.float64)
    return p.replace(duration_tail=tail + (rate - tail.mean()))


@pytest.mark.kernels
@pytest.mark.parametrize("rate", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all options"])
def test_every_part_of_a_problem(rate, plain):
    options = {} if plain else {"boundary": True, "ends": True, "forbid": 0.01}
    p = with_rate(random_problem(3, 2500, 6, 3, tail=True, **options), rate)
    assert assert_same(p.replace(lengths=torch.tensor([2500, 40, 1999]))).whole == []


def test_the_reference_gives_the_same():
    p = with_rate(random_problem(1, 1800, 5, 3, tail=True, boundary=True, ends=True), 0.2)
    assert assert_same(p, ReferenceBackend()).whole == []


def test_cuts_that_fall_anywhere():
    for length in range(2000, 2400, 37):
        assert assert_same(with_rate(draw("random", [length], 7, 3, seed=length), 0.0)).whole == []


def test_segments_across_many_cuts():
    # One label that holds for 1,500 positions at a time, longer than a piece with its warm-ups;
    # what it has there is counted by positions.
    p = with_rate(draw("random", [6000], 8, 3), 0.0)
    p.transition.sub_(8.0)
    p.scores[:, 1000:2500, 1] += 4.0
    p.scores[:, 3300:4800, 2] += 4.0
    assert InPieces(NumbaBackend(), MANY).cuts(p, 2)[0].length < 1000
    assert_same(p)
    _, found = InPieces(NumbaBackend(), MANY).gradients(p, {"duration_tail"})
    assert found["duration_tail"].sum() > 2000


def test_a_tail_that_remembers_is_done_as_a_whole():
    # A label that nothing leaves: the others' messages forget, and what differs are its own older
    # segments alone, whose share falls by half a per cent a position.
    p = draw("random", [3000], 8, 4)
    p.scores.zero_()
    p.transition[:, 3] = -30.0
    p.transition[3, :] = -math.inf
    tail = torch.full((4,), -1.0, dtype=torch.float64)
    tail[3] = NumbaBackend().log_partition(p.replace(duration_tail=tail)).item() / 3000 - 0.005
    assert assert_same(p.replace(duration_tail=tail)).whole == [1, 1]


def test_forbidden_and_masked_positions_inside_segments():
    p = with_rate(draw("random", [3000], 8, 4), 0.3)
    p.scores[:, 500:2500:97, 1] = -math.inf
    p.scores[:, 700:2500:131, 2] = -1e9
    p.scores[:, 1200:1400] -= 1e6
    plain, counting = NumbaBackend(), Counting()
    backend, wanted = InPieces(counting, MANY), {"scores", "duration_tail"}
    log_z, gradients = plain.gradients(p, wanted)
    torch.testing.assert_close(backend.log_partition(p), log_z, rtol=1e-14, atol=0.0)
    found = backend.gradients(p, wanted)[1]
    for name in wanted:
        torch.testing.assert_close(found[name], gradients[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [1, 0])
def test_sequences_without_a_segmentation(bad):
    p = with_rate(draw("random", [3000, 3000], 8, 4), 0.0)
    p.scores[bad, 1500] = -math.inf
    assert assert_same(p).whole == [1, 1]


def test_what_is_left_to_the_sequential_kernels():
    p = random_problem(1, 3000, 6, 3, tail=True)
    backend = InPieces(NumbaBackend(), MANY)
    assert backend.cuts(p, 1) and not backend.cuts(p, 1, sums=False)
    by_duration = random_problem(1, 3000, 6, 3, tail=True, by_duration=True)
    assert not backend.cuts(by_duration, 1)


def test_public_functions(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    counts = []
    original = NumbaBackend.gradients_of_pieces

    def counted(self, potentials, wanted, core, span):
        counts.append(potentials.batch_size)
        return original(self, potentials, wanted, core, span)

    monkeypatch.setattr(NumbaBackend, "gradients_of_pieces", counted)
    p = with_rate(draw("random", [20_000], 8, 4), -0.2)
    tail = p.duration_tail.clone().requires_grad_()
    log_z = log_partition(p.replace(duration_tail=tail))
    log_z.sum().backward()
    assert counts == [4]
    expected, gradients = NumbaBackend().gradients(p, {"duration_tail"})
    torch.testing.assert_close(log_z.detach(), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(tail.grad, gradients["duration_tail"][0], rtol=1e-7, atol=1e-9)
    best, table = viterbi_table(p)
    torch.testing.assert_close(best, score_segments(p, table), rtol=1e-12, atol=1e-9)
    for x, y in zip(sample_table(p, 2, seed=3), NumbaBackend().sample(p, 2, 3), strict=True):
        assert torch.equal(x, y)

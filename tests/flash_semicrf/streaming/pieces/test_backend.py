"""What is computed in pieces, against the sequential kernels."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import FORGETFUL, MODELS, draw
from flash_semicrf import log_partition
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.testing import random_problem

EVERYTHING = {
    "scores", "start_scores", "end_scores", "transition", "duration_bias", "initial_scores",
    "final_scores",
}  # fmt: skip

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

    def viterbi(self, potentials):
        self.whole.append(potentials.batch_size)
        return super().viterbi(potentials)

    def log_partition_of_pieces(self, potentials, core):
        self.pieces.append(potentials.batch_size)
        return super().log_partition_of_pieces(potentials, core)

    def gradients_of_pieces(self, potentials, wanted, core, span):
        self.pieces.append(potentials.batch_size)
        return super().gradients_of_pieces(potentials, wanted, core, span)

    def viterbi_of_pieces(self, potentials, core):
        self.pieces.append(potentials.batch_size)
        return super().viterbi_of_pieces(potentials, core)


def assert_same(p: Potentials, wanted: set[str] = EVERYTHING, slots: Slots = MANY) -> Counting:
    """Compare everything that is done in pieces with the sequential kernels."""
    plain, counting = NumbaBackend(), Counting()
    backend = InPieces(counting, slots)
    log_z, gradients = plain.gradients(p, wanted)
    torch.testing.assert_close(backend.log_partition(p), log_z, rtol=1e-12, atol=1e-9)
    found, others = backend.gradients(p, wanted)
    torch.testing.assert_close(found, log_z, rtol=1e-12, atol=1e-9)
    # Rounding of logarithms as large as log Z is an error of each probability of the whole.
    noise = 1e-15 * float(log_z[log_z.isfinite()].abs().max()) if log_z.isfinite().any() else 0.0
    for name in wanted:
        bound = {"rtol": 1e-7, "atol": 20 * noise + 1e-10}
        if p.dtype == torch.float32 and name in {"scores", "start_scores", "end_scores"}:
            bound = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(others[name], gradients[name], **bound)
    scores, table = plain.viterbi(p)
    best, segments = backend.viterbi(p)
    torch.testing.assert_close(best, scores, rtol=1e-12, atol=1e-9)
    feasible = best > -torch.inf
    torch.testing.assert_close(
        score_segments(p, segments)[feasible], scores[feasible], rtol=1e-12, atol=1e-9
    )
    if p.start_scores is not None:  # without them, segments of one label may change places
        for x, y in zip(segments, table, strict=True):
            assert torch.equal(x, y)
    return counting


@pytest.mark.kernels
@pytest.mark.parametrize("model", FORGETFUL)
def test_models_that_forget_need_no_second_attempt(model):
    counting = assert_same(draw(model, [4000, 200, 3000], 8, 4))
    assert counting.whole == [] and len(counting.pieces) == 3


@pytest.mark.parametrize("model", sorted(MODELS.keys() - set(FORGETFUL)))
def test_models_that_forget_slowly_or_never(model):
    assert_same(draw(model, [5000, 4000], 8, 4))


def test_a_counter_is_done_as_a_whole():
    # Its first segment decides all boundaries; every cut would decide them on its own.
    counting = Counting()
    p = draw("counter", [12_000], 8, 4)
    log_z = InPieces(counting, MANY).log_partition(p)
    assert counting.whole == [1] and len(counting.pieces) == 2
    torch.testing.assert_close(log_z, NumbaBackend().log_partition(p))


def test_phases_that_agree_by_chance_are_noticed():
    # The pieces begin at multiples of the period, so that all but the first have the same phase.
    p = draw("counter", [8 * 800], 8, 4)
    counting = Counting()
    backend = InPieces(counting, MANY)
    assert backend.cuts(p, 1)[0].length % 8 == 0
    torch.testing.assert_close(backend.log_partition(p), NumbaBackend().log_partition(p))
    assert counting.whole == [1]


def test_padding_is_ignored():
    p = draw("random", [4000, 100, 2500], 8, 4)
    spoilt = p.scores.clone()
    for b, length in enumerate(p.lengths.tolist()):
        spoilt[b, length:] = torch.nan
    assert assert_same(p.replace(scores=spoilt), {"scores", "transition"}).whole == []


@pytest.mark.kernels
@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_part_of_a_problem(by_duration, dtype):
    p = random_problem(
        3, 2500, 6, 3, by_duration=by_duration, boundary=True, ends=True, forbid=0.01, dtype=dtype
    ).replace(lengths=torch.tensor([2500, 40, 1999]))
    counting = assert_same(p)
    assert counting.whole == []


def test_initial_scores_by_duration():
    p = random_problem(1, 2500, 6, 3, by_duration=True)
    p = p.replace(initial_scores=torch.randn(6, 3, dtype=torch.float64))
    assert assert_same(p, {"initial_scores", "scores"}).whole == []


def test_huge_common_scores_and_masks():
    p = draw("random", [3000], 8, 4)
    p.scores[:, 700:1300] -= 1e9
    p.scores[:, 1900:1920, 1] = -1e9
    plain, backend = NumbaBackend(), InPieces(Counting(), MANY)
    torch.testing.assert_close(
        backend.log_partition(p), plain.log_partition(p), rtol=1e-14, atol=0.0
    )
    (_, found), (_, expected) = (b.gradients(p, {"scores"}) for b in (backend, plain))
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0.0, atol=1e-6)


def test_only_the_sequences_that_fail_are_done_again():
    p = draw("no evidence", [12_000] * 4, 8, 4)
    p.scores[[0, 2, 3]] = 6 * draw("random", [12_000] * 3, 8, 4).scores
    counting = assert_same(p)
    assert set(counting.whole) == {1}
    # What the second attempt is given is the one sequence that failed.
    assert min(counting.pieces) < 12_000 / 512 < max(counting.pieces)


@pytest.mark.parametrize("bad", [1, 0])
def test_sequences_without_a_segmentation(bad):
    p = draw("random", [3000, 3000], 8, 4)
    p.scores[bad, 1500] = -torch.inf
    assert_same(p)
    p.scores[1 - bad, 1500] = -torch.inf
    assert_same(p)


def test_the_same_call_gives_the_same_bits():
    p = draw("weak", [4000, 2500], 8, 4)
    backend = InPieces(NumbaBackend(), MANY)
    first, second = (backend.gradients(p, EVERYTHING) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for name in EVERYTHING:
        assert torch.equal(first[1][name], second[1][name])


def test_two_threads_and_public_functions(monkeypatch):
    # As users call it: log Z without gradients, and decoding.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    counts = []
    original = NumbaBackend.log_partition_of_pieces

    def counted(self, potentials, core):
        counts.append(potentials.batch_size)
        return original(self, potentials, core)

    monkeypatch.setattr(NumbaBackend, "log_partition_of_pieces", counted)
    p = draw("random", [20_000], 8, 4)
    log_z = log_partition(p)
    assert counts == [16]  # eight in the lanes of vectors, for each of two threads
    torch.testing.assert_close(log_z, NumbaBackend().log_partition(p), rtol=1e-12, atol=1e-9)
    best, table = viterbi_table(p)
    torch.testing.assert_close(best, score_segments(p, table), rtol=1e-12, atol=1e-9)
    assert torch.equal(table.start[1:], table.stop[:-1])


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_many_random_problems(model):
    for seed in range(60):
        assert_same(draw(model, [2500], 3 + seed % 9, 2 + seed % 4, seed))

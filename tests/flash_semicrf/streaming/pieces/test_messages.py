"""Messages and samples in pieces, against the sequential kernels and the reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import FORGETFUL, MODELS, draw
from flash_semicrf.inference.nbest import n_best_table
from flash_semicrf.inference.posterior import segment_probabilities
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.streaming.reference import ReferenceBackend
from flash_semicrf.testing import random_problem

MANY = Slots(64, 0, patient=False)

SLOW = sorted(MODELS.keys() - set(FORGETFUL))


class Counting(NumbaBackend):
    """The CPU backend, which notes the longest problem that each operation got, and most sequences
    of one of more than 9,000 positions."""

    def __init__(self) -> None:
        self.longest: dict[str, int] = {}
        self.whole = 0

    def _note(self, name: str, potentials: Potentials) -> None:
        self.longest[name] = max(self.longest.get(name, 0), potentials.num_positions)
        if potentials.num_positions > 9000:
            self.whole = max(self.whole, potentials.batch_size)

    def messages(self, potentials):
        self._note("messages", potentials)
        return super().messages(potentials)

    def max_messages(self, potentials):
        self._note("max_messages", potentials)
        return super().max_messages(potentials)

    def forward(self, potentials):
        self._note("sample", potentials)
        return super().forward(potentials)

    def sample(self, potentials, num_samples, seed):
        self._note("sample", potentials)
        return super().sample(potentials, num_samples, seed)


def assert_rows_same(found: torch.Tensor, expected: torch.Tensor, p: Potentials) -> None:
    """Messages of boundaries 1 to the end of each sequence: also those without any posterior."""
    for b, length in enumerate(p.lengths.tolist()):
        x, y = found[b, 1 : length + 1], expected[b, 1 : length + 1]
        assert torch.equal(x == -torch.inf, y == -torch.inf)
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-9)


def assert_same(p: Potentials, expected=None) -> Counting:
    """Compare messages and samples in pieces with the sequential kernels or another backend."""
    plain, counting = NumbaBackend(), Counting()
    backend, expected = InPieces(counting, MANY), expected or plain
    log_z, alpha, beta = expected.messages(p)
    found = backend.messages(p)
    torch.testing.assert_close(found[0], log_z, rtol=1e-13, atol=1e-9)
    assert_rows_same(found[1], alpha, p)
    assert_rows_same(found[2], beta, p)
    assert torch.equal(found[1][:, 0], torch.zeros_like(alpha[:, 0]))
    assert_rows_same(backend.max_messages(p), expected.max_messages(p), p)
    for x, y in zip(backend.sample(p, 3, 11), plain.sample(p, 3, 11), strict=True):
        assert torch.equal(x, y)
    return counting


@pytest.mark.kernels
@pytest.mark.parametrize("model", FORGETFUL)
def test_models_that_forget_are_cut(model):
    longest = assert_same(draw(model, [4000, 200, 3000], 8, 4)).longest
    assert longest.keys() == {"messages", "max_messages", "sample"}
    assert max(longest.values()) < 2000


@pytest.mark.parametrize("model", SLOW)
def test_models_that_forget_slowly_or_never(model):
    longest = assert_same(draw(model, [5000, 4000], 8, 4)).longest
    if model == "counter":
        assert set(longest.values()) == {5000}


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
def test_the_reference_gives_the_same(by_duration):
    p = random_problem(
        2, 2000, 5, 3, by_duration=by_duration, boundary=True, ends=True, forbid=0.02
    ).replace(lengths=torch.tensor([2000, 1900]))
    assert max(assert_same(p, ReferenceBackend()).longest.values()) < 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_part_of_a_problem(dtype):
    for by_duration in (False, True):
        p = random_problem(
            3, 2500, 6, 3, by_duration=by_duration, boundary=True, ends=True, dtype=dtype
        ).replace(lengths=torch.tensor([2500, 40, 1999]))
        assert max(assert_same(p).longest.values()) < 1999


def test_messages_without_posterior():
    # Nothing comes from label 3, and scores keep its segments out: its messages have no weight.
    p = draw("random", [3000], 8, 4)
    p.transition[3] = -torch.inf
    p.scores[..., 3] -= 20.0
    assert max(assert_same(p).longest.values()) < 3000
    # Not to be reached at all, and with no way on.
    p.transition[:, 3] = -torch.inf
    p.initial_scores[3] = -torch.inf
    assert max(assert_same(p).longest.values()) < 3000


def test_a_label_that_remembers_is_done_as_a_whole():
    # Label 3 is never left and only the first segment gets there: its messages forget nothing,
    # though those that have any posterior do.
    p = draw("random", [6000], 8, 4)
    p.transition[:3, 3] = -torch.inf
    p.transition[3, :3] = -torch.inf
    p.scores[..., 3] -= 5.0
    longest = assert_same(p).longest
    assert set(longest.values()) == {6000}


def test_huge_common_scores():
    p = draw("random", [3000], 8, 4)
    p.scores[:, 700:1300] -= 1e9
    plain, counting = NumbaBackend(), Counting()
    backend = InPieces(counting, MANY)
    _, alpha, beta = backend.messages(p)
    _, expected_alpha, expected_beta = plain.messages(p)
    assert_rows_same(alpha, expected_alpha, p)
    assert_rows_same(beta, expected_beta, p)
    for x, y in zip(backend.sample(p, 4, 2), plain.sample(p, 4, 2), strict=True):
        assert torch.equal(x, y)
    assert counting.longest["sample"] < 3000


def test_only_the_sequences_that_fail_are_done_again():
    p = draw("no evidence", [12_000] * 3, 8, 4)
    p.scores[[0, 2]] = 6 * draw("random", [12_000] * 2, 8, 4).scores
    counting = assert_same(p)
    assert counting.whole == 1


@pytest.mark.parametrize("bad", [1, 0])
def test_sequences_without_a_segmentation(bad):
    p = draw("random", [3000, 3000], 8, 4)
    p.scores[bad, 1500] = -torch.inf
    assert_same(p)
    p.scores[1 - bad, 1500] = -torch.inf
    assert_same(p)
    q = draw("random", [3000, 2500], 8, 4)
    assert_same(q.replace(final_scores=torch.full((4,), -torch.inf, dtype=torch.float64)))


def test_the_same_call_gives_the_same_bits():
    p = draw("weak", [4000, 2500], 8, 4)
    backend = InPieces(NumbaBackend(), MANY)
    for x, y in zip(backend.messages(p), backend.messages(p), strict=True):
        assert torch.equal(x, y)


def test_public_functions(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    p = draw("random", [30_000], 8, 4)
    forwards = []
    original = NumbaBackend.forward

    def counted(self, potentials):
        forwards.append(potentials.batch_size)
        return original(self, potentials)

    monkeypatch.setattr(NumbaBackend, "forward", counted)
    table = sample_table(p, 2, seed=5)
    assert forwards == [8]
    plain = NumbaBackend().sample(p, 2, 5)
    for x, y in zip(table, plain, strict=True):
        assert torch.equal(x, y)
    some = type(table)(*(column[:500] for column in table))
    found = segment_probabilities(p, some)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.testing.assert_close(found, segment_probabilities(p, some), rtol=1e-8, atol=1e-10)


def test_n_best_from_max_messages_in_pieces(monkeypatch):
    p = draw("random", [24_000], 8, 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    lengths = []
    original = NumbaBackend.max_messages

    def counted(self, potentials):
        lengths.append(potentials.num_positions)
        return original(self, potentials)

    monkeypatch.setattr(NumbaBackend, "max_messages", counted)
    scores, table = n_best_table(p, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    _, whole = n_best_table(p, 4)
    assert len(lengths) == 2 and lengths[0] < 24_000 == lengths[1]

    def scores_of(found):
        ranks = [SegmentTable(*(x[found.sequence == rank] for x in found)) for rank in range(4)]
        zero = [rank._replace(sequence=torch.zeros_like(rank.sequence)) for rank in ranks]
        return torch.cat([score_segments(p, rank) for rank in zero])

    # The search adds up 20,000 segments, one rounding after the other.
    torch.testing.assert_close(scores[0], scores_of(table), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scores_of(table), scores_of(whole), rtol=1e-13, atol=0.0)

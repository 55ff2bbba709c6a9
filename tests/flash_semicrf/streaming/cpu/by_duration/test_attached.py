"""Segment scores and transition scores in the kernels, against the plain loop."""

from __future__ import annotations

import itertools
import math
import time
from typing import NamedTuple

import pytest
import torch

from flash_semicrf import entropy, log_partition, viterbi
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.problem.potentials import BY_POSITION, Potentials, explicit_start, score_segments
from flash_semicrf.streaming.cpu import batches
from flash_semicrf.streaming.dispatch import BACKENDS, record_backends
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import long

NUMBA, REFERENCE = BACKENDS["numba"], BACKENDS["reference"]

SIZES = [
    (1, 1, 1), (1, 5, 3), (9, 20, 4), (40, 40, 2), (64, 7, 1), (65, 3, 8), (130, 17, 5),
    (200, 40, 3), (70, 12, 20), (33, 2, 17), (100, 1, 6),
]  # fmt: skip
"""T, K and C: about the slides of a window, tiles of labels, K > T."""

KINDS = [
    {"spans": True, "moves": True},
    {"spans": True, "boundary": True, "ends": True, "forbid": 0.1},
    {"moves": True, "tail": True, "boundary": True},
    {"spans": True, "moves": True, "tail": True, "ends": True, "forbid": 0.05},
    {"spans": True, "by_duration": True, "tail": True, "forbid": 0.05},
    {"moves": True, "spans": True, "by_duration": True, "boundary": True, "ends": True},
    {"moves": True, "by_duration": True},
]


class Case(NamedTuple):
    """Sizes, options of `random_problem` by their index, and whether all is in float32."""

    sizes: tuple[int, int, int]
    kind: int
    narrow: bool

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        return f"{sizes}, {', '.join(KINDS[self.kind])}{', float32' if self.narrow else ''}"

    def problem(self, **options) -> Potentials:
        dtype = torch.float32 if self.narrow else torch.float64
        given = {"dtype": dtype, "seed": sum(self.sizes), **KINDS[self.kind], **options}
        return random_problem(2, *self.sizes, **given)


CASES = [
    (Case if (i + j) % 7 == 0 else lambda *case: long(Case(*case)))(sizes, j, (i + j // 2) % 2 == 0)
    for i, sizes in enumerate(SIZES)
    for j in range(len(KINDS))
]
"""Each size with one of the kinds always."""

parametrize_cases = pytest.mark.parametrize("case", CASES, ids=str)


def wanted_of(p: Potentials) -> set[str]:
    return set(BY_POSITION) | p.parameters().keys()


def assert_gradients_match(p: Potentials) -> None:
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    expected_log_z, expected = REFERENCE.gradients(p, wanted_of(p))
    assert_close(log_z, expected_log_z)
    assert_close(log_z, NUMBA.log_partition(p))
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if name in ("segment_scores", "transition_scores"):
            assert found[name].dtype == p.parameters()[name].dtype
        assert_close(found[name], value.to(found[name].dtype), value.dtype)


@pytest.mark.kernels
@parametrize_cases
def test_gradients_match_reference(case):
    assert_gradients_match(case.problem())


@pytest.mark.kernels
@parametrize_cases
def test_best_segmentations_match_reference(case):
    p = case.problem(integers=True)
    scores, table = NUMBA.viterbi(p)
    expected_scores, expected_table = REFERENCE.viterbi(p)
    assert_close(scores, expected_scores)
    for column, expected in zip(table, expected_table, strict=True):
        assert column.tolist() == expected.tolist()
    found, expected = NUMBA.max_messages(p), REFERENCE.max_messages(p)
    for b, length in enumerate(p.lengths.tolist()):
        assert_close(found[b, 1 : length + 1], expected[b, 1 : length + 1])


@pytest.mark.kernels
@parametrize_cases
def test_messages_and_samples_are_those_of_the_reference(case):
    p = case.problem()
    if case.narrow:
        p = p.replace(scores=p.scores.double())
    found, expected = NUMBA.messages(p), REFERENCE.messages(p)
    assert_close(found[0], expected[0])
    for b, length in enumerate(p.lengths.tolist()):
        if math.isfinite(expected[0][b]):
            for mine, others in zip(found[1:], expected[1:], strict=True):
                assert_close(mine[b, 1 : length + 1], others[b, 1 : length + 1])
    for mine, others in zip(NUMBA.sample(p, 3, 5), REFERENCE.sample(p, 3, 5), strict=True):
        assert mine.tolist() == others.tolist()


@pytest.mark.kernels
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("sizes", [(9, 4, 3), long((40, 17, 4)), long((17, 20, 2))])
def test_derivatives_along_a_direction_match_reference(sizes, kind):
    p = explicit_start(Case(sizes, kind, False).problem(ragged=False))
    p = p.replace(lengths=torch.tensor([sizes[0], max(1, sizes[0] - 3)]))
    direction = explicit_start(Case(sizes, kind, False).problem(forbid=0.0, seed=1, ragged=False))
    padding = torch.arange(sizes[0]) >= p.lengths[:, None]
    clean = {name: direction.parameters()[name].clone() for name in direction.parameters()}
    for name in clean.keys() - {"transition", "duration_bias", "initial_scores"}:
        if clean[name].dim() > 2:
            clean[name][padding] = 0.0
    direction = direction.replace(**clean, lengths=p.lengths)
    wanted = set(p.parameters())
    log_z, mean, found = NUMBA.tangents(p, direction, wanted)
    expected_log_z, expected_mean, expected = REFERENCE.tangents(p, direction, wanted)
    assert_close(log_z, expected_log_z)
    assert_close(mean, expected_mean)
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert_close(found[name], value)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_n_best_matches_reference(kind):
    p = Case((14, 5, 3), kind, False).problem()
    p = p.replace(lengths=torch.tensor([14, 6]))
    found, expected = n_best(p, 9, "numba"), n_best(p, 9, "reference")
    assert_close(found.scores, expected.scores)
    for mine, others in zip(found.segments, expected.segments, strict=True):
        ends = [[(s.start, s.end, s.label) for s in segments] for segments in mine]
        assert ends == [[(s.start, s.end, s.label) for s in segments] for segments in others]


@pytest.mark.parametrize("large", [-1e9, -1e20, -1e35])
def test_large_negative_scores_forbid_without_cost_to_others(large):
    p = random_problem(2, 150, 6, 3, spans=True, moves=True, tail=True, ragged=False, seed=1)
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name in ("segment_scores", "transition_scores"):
        value = p.parameters()[name]
        dead = torch.rand(value.shape, generator=generator) < 0.3
        dead[..., 0, 0] = False
        masks[name] = dead
    given = p.parameters()
    masked = p.replace(**{n: given[n].masked_fill(d, large) for n, d in masks.items()})
    forbidden = p.replace(**{n: given[n].masked_fill(d, -math.inf) for n, d in masks.items()})
    log_z, found = NUMBA.gradients(masked, wanted_of(p))
    expected_log_z, expected = NUMBA.gradients(forbidden, wanted_of(p))
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        assert_close(found[name], value)
    assert_close(NUMBA.viterbi(masked)[0], NUMBA.viterbi(forbidden)[0])


def test_a_mask_that_cannot_be_avoided_costs_its_score():
    p = random_problem(1, 90, 3, 2, spans=True, ragged=False)
    spans = p.segment_scores.clone()
    for s, k in itertools.product(range(48, 51), range(3)):
        if s <= 50 <= s + k:  # a segment that covers position 50, as one of each segmentation does
            spans[0, s, k] -= 1e9
    masked = p.replace(segment_scores=spans)
    # To the digits that a float64 of 1e9 has.
    assert abs(NUMBA.log_partition(masked) - NUMBA.log_partition(p) + 1e9).item() < 1e-5
    _, found = NUMBA.gradients(masked, {"segment_scores", "scores"})
    _, expected = NUMBA.gradients(p, {"segment_scores", "scores"})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=1e-5)


def test_confident_scores_match_reference():
    for seed in range(2):
        p = random_problem(2, 50, 7, 4, spans=True, moves=True, scale=100.0, forbid=0.1, seed=seed)
        assert_gradients_match(p)


def test_steep_durations_and_masked_positions():
    p = random_problem(2, 120, 30, 3, spans=True, moves=True, tail=True, boundary=True, seed=3)
    steep = -100.0 * torch.arange(1.0, 31.0, dtype=torch.float64)[:, None]
    assert_gradients_match(p.replace(duration_bias=p.duration_bias + steep))
    scores = p.scores.clone()
    scores[:, 40:43, 1:] = -1e9
    assert_gradients_match(p.replace(scores=scores))
    scores[:, 42] = -1e9
    log_z = NUMBA.log_partition(p.replace(scores=scores))
    # To the digits that a float64 of 1e9 has.
    expected = REFERENCE.log_partition(p.replace(scores=scores))
    torch.testing.assert_close(log_z, expected, rtol=0.0, atol=1e-5)


def test_infeasible_sequences_get_zeros():
    p = random_problem(3, 8, 3, 2, spans=True, moves=True, ragged=False)
    p.segment_scores[1] = -math.inf
    p.transition_scores[2] = -math.inf
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    assert log_z.isinf().tolist() == [False, True, True]
    assert all(not bool(value[1:].any()) for value in found.values())
    scores, table = NUMBA.viterbi(p)
    assert scores.isinf().tolist() == [False, True, True]
    assert set(table.sequence.tolist()) == {0}


def test_what_passes_the_end_and_the_first_transitions_are_not_read():
    p = random_problem(2, 30, 6, 3, spans=True, moves=True, tail=True, boundary=True, seed=2)
    p = p.replace(lengths=torch.tensor([30, 17]))
    spans, moves = p.segment_scores.clone(), p.transition_scores.clone()
    for b, length in enumerate(p.lengths.tolist()):
        for k in range(1, 7):
            spans[b, max(0, length - k + 1) :, k - 1] = math.nan
        moves[b, length:] = math.nan
    moves[:, 0] = math.nan
    odd = p.replace(segment_scores=spans, transition_scores=moves)
    log_z, found = NUMBA.gradients(odd, wanted_of(p))
    expected_log_z, expected = NUMBA.gradients(p, wanted_of(p))
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        assert_close(found[name], value)
    assert not bool(found["transition_scores"][:, 0].any())
    assert NUMBA.viterbi(odd)[1].start.tolist() == NUMBA.viterbi(p)[1].start.tolist()
    drawn = [NUMBA.sample(x, 2, 3).start.tolist() for x in (odd, p)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.float64], repeat=2)])
def test_each_gradient_has_the_dtype_of_its_parameter(dtypes):
    p = random_problem(2, 20, 4, 3, spans=True, moves=True)
    spans, moves = dtypes
    p = p.replace(
        segment_scores=p.segment_scores.to(spans), transition_scores=p.transition_scores.to(moves)
    )
    assert_gradients_match(p)


@pytest.mark.parametrize("wanted", [{"segment_scores"}, {"transition_scores"}, {"scores"}])
def test_gradients_are_those_wanted(wanted):
    p = random_problem(2, 20, 4, 3, spans=True, moves=True)
    _, found = NUMBA.gradients(p, wanted)
    _, expected = NUMBA.gradients(p, wanted_of(p))
    assert found.keys() == wanted
    for name in wanted:
        assert_close(found[name], expected[name])


def test_batches_that_are_mostly_padding(monkeypatch):
    p = random_problem(9, 70, 4, 3, spans=True, moves=True, boundary=True)
    p = p.replace(lengths=torch.tensor([3, 70, 2, 3, 1, 11, 2, 4, 2]))
    expected_log_z, expected = NUMBA.gradients(p, wanted_of(p))
    monkeypatch.setattr(batches, "_FEW", 0)
    assert len(batches.groups_of(p.lengths.numpy(), 70)) == 3
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        assert_close(found[name], value)


def test_long_sequences_are_done_as_a_whole():
    p = random_problem(1, 20_000, 4, 2, spans=True, moves=True, ragged=False)
    assert InPieces(NUMBA).cuts(p, 2) == ()
    with record_backends() as ran:
        log_z = log_partition(p)
        best = viterbi(p)
    assert ran == ["numba", "numba"]
    assert_close(log_z, NUMBA.log_partition(p))
    assert_close(best.scores, NUMBA.viterbi(p)[0])
    plain = p.replace(
        segment_scores=torch.zeros_like(p.segment_scores),
        transition_scores=torch.zeros_like(p.transition_scores),
    )
    without = p.replace(segment_scores=None, transition_scores=None)
    log_z, found = NUMBA.gradients(plain, set(without.parameters()))
    expected_log_z, expected = NUMBA.gradients(without, set(without.parameters()))
    # Rounding of log Z of thousands, in the exponents, and of sums over thousands of positions.
    torch.testing.assert_close(log_z, expected_log_z, rtol=1e-11, atol=0.0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)


def test_entropy_and_its_gradient_use_the_kernels():
    p = random_problem(2, 12, 4, 3, spans=True, moves=True, tail=True)
    results = []
    for backend in ("auto", "reference"):
        leaves = {name: x.clone().requires_grad_() for name, x in p.parameters().items()}
        with record_backends() as ran:
            value = entropy(p.replace(**leaves), backend)
            value.sum().backward()
        assert set(ran) == {"numba" if backend == "auto" else "reference"}
        results.append([value.detach(), *(leaf.grad for leaf in leaves.values())])
    for mine, others in zip(*results, strict=True):
        assert_close(mine, others)


def test_cost_of_static_transitions_does_not_multiply_durations_and_labels():
    def seconds(labels: int, **options) -> float:
        p = random_problem(1, 1000, 40, labels, ragged=False, dtype=torch.float32, **options)
        NUMBA.log_partition(p)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            NUMBA.log_partition(p)
            times.append(time.perf_counter() - begin)
        return min(times)

    # K·C² exponentials of 40 durations are 24 times K·C + C² of them.
    assert 4 * seconds(64, spans=True) < seconds(64, spans=True, by_duration=True)


def test_best_score_is_that_of_its_segments():
    p = random_problem(2, 3000, 20, 3, spans=True, moves=True, dtype=torch.float32, ragged=False)
    best, table = NUMBA.viterbi(p)
    assert_close(score_segments(p, table) / 3000, best / 3000)

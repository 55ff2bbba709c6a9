"""The kernels for transitions by duration against the plain loop, and at their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.problem.potentials import Potentials, explicit_start, score_segments
from flash_semicrf.streaming.dispatch import BACKENDS, record_backends
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import LONG_SHAPES, Case, gradients_of, thinned, with_gradients

NUMBA, REFERENCE = BACKENDS["numba"], BACKENDS["reference"]

SHAPES = {
    **LONG_SHAPES,
    "one window": {"num_positions": 64, "max_duration": 5, "num_labels": 3},
    "one window and one": {"num_positions": 65, "max_duration": 64, "num_labels": 2},
    "two chunks": {"num_positions": 300, "max_duration": 6, "num_labels": 2, "batch_size": 2},
}
"""Also lengths about the slide of a window, 64, and the chunks of the gradient, 256."""

CASES = [
    Case(shape, True, boundary, boundary, ends, ends, forbid)
    for shape in SHAPES
    for boundary, ends, forbid in (
        (False, False, 0.0), (False, True, 0.1), (True, False, 0.1), (True, True, 0.0),
    )
]  # fmt: skip

ALL = {"scores", "transition", "duration_bias", "start_scores", "end_scores"}
"""Gradients that may be asked for whether or not a problem has such scores."""


def wanted_of(p: Potentials) -> set[str]:
    """Every gradient of a problem, the boundary marginals included."""
    return ALL | p.parameters().keys()


def assert_gradients_match(p: Potentials) -> None:
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    expected_log_z, expected = REFERENCE.gradients(p, wanted_of(p))
    assert_close(log_z, expected_log_z)
    assert_close(log_z, NUMBA.log_partition(p))
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert_close(found[name], value)


def assert_viterbi_matches(p: Potentials) -> None:
    scores, table = NUMBA.viterbi(p)
    expected_scores, expected_table = REFERENCE.viterbi(p)
    assert_close(scores, expected_scores)
    for column, expected in zip(table, expected_table, strict=True):
        assert column.tolist() == expected.tolist()


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_gradients_match_reference(case: Case) -> None:
    assert_gradients_match(case.problem(SHAPES))


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_viterbi_breaks_ties_like_reference(case: Case) -> None:
    assert_viterbi_matches(case.problem(SHAPES, integers=True))


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_max_messages_match_reference(case: Case) -> None:
    p = case.problem(SHAPES)
    found, expected = NUMBA.max_messages(p), REFERENCE.max_messages(p)
    for b, length in enumerate(p.lengths.tolist()):
        assert_close(found[b, : length + 1], expected[b, : length + 1])


@pytest.mark.kernels
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("forbid", [0.0, 0.2])
def test_confident_scores_match_reference(seed: int, forbid: float) -> None:
    p = random_problem(
        2, 50, 7, 4, by_duration=True, boundary=seed % 2 == 0, ends=seed % 3 == 0,
        forbid=forbid, scale=100.0, seed=seed,
    )  # fmt: skip
    assert_gradients_match(p)
    assert_viterbi_matches(p)


@pytest.mark.parametrize("seed", range(4))
def test_products_out_of_range_are_redone(seed: int) -> None:
    p = random_problem(2, 30, 5, 4, by_duration=True, ends=seed % 2 == 0, forbid=0.1, seed=seed)
    # Peaks of exp(A) and of exp(alpha) are then at different labels, e^-1000 apart.
    assert_gradients_match(p.replace(transition=1000.0 * p.transition))


@pytest.mark.parametrize("large", [-1e9, -1e20, -1e35])
def test_large_negative_scores_forbid_without_cost_to_others(large: float) -> None:
    p = random_problem(2, 150, 6, 3, by_duration=True, boundary=True, ragged=False, seed=1)
    dead = torch.rand(p.scores.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    dead[..., 0] = False
    masked = p.replace(scores=p.scores.masked_fill(dead, large))
    forbidden = p.replace(scores=p.scores.masked_fill(dead, -math.inf))
    log_z, found = NUMBA.gradients(masked, wanted_of(p))
    expected_log_z, expected = NUMBA.gradients(forbidden, wanted_of(p))
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        assert_close(found[name], value)
    assert_close(NUMBA.viterbi(masked)[0], NUMBA.viterbi(forbidden)[0])


def test_equal_transitions_match_static_kernels() -> None:
    static = random_problem(2, 3000, 20, 3, boundary=True, ends=True, ragged=False)
    p = static.replace(transition=static.transition.expand(20, 3, 3))
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    expected_log_z, expected = NUMBA.gradients(static, wanted_of(p))
    found["transition"] = found["transition"].sum(1)
    assert_close(log_z, expected_log_z)
    for name, value in expected.items():
        # Rounding of log Z of thousands, in the exponents, and of sums over thousands of positions.
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)
    best, table = NUMBA.viterbi(p)
    assert_close(best / 3000, NUMBA.viterbi(static)[0] / 3000)
    assert_close(score_segments(static, table) / 3000, best / 3000)


def test_infeasible_sequences_get_zeros() -> None:
    p = random_problem(3, 8, 3, 2, by_duration=True, ragged=False)
    p.scores[1, 4] = -math.inf
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    assert log_z.isinf().tolist() == [False, True, False]
    assert all(bool((value[1] == 0).all()) for value in found.values())
    scores, table = NUMBA.viterbi(p)
    assert scores.isinf().tolist() == [False, True, False]
    assert set(table.sequence.tolist()) == {0, 2}
    p.scores[:, 4] = -math.inf
    assert not any(bool(value.any()) for value in NUMBA.gradients(p, ALL)[1].values())


def test_padding_and_batching_change_nothing() -> None:
    p = random_problem(4, 40, 6, 3, by_duration=True, boundary=True, ends=True, seed=2)
    past = torch.arange(40) >= p.lengths[:, None]
    names = ("scores", "start_scores", "end_scores")
    junk = {n: getattr(p, n).masked_fill(past[..., None], math.nan) for n in names}
    log_z, found = NUMBA.gradients(p.replace(**junk), wanted_of(p))
    _, table = NUMBA.viterbi(p.replace(**junk))
    for b, length in enumerate(p.lengths.tolist()):
        own = {n: getattr(p, n)[b : b + 1, :length] for n in names}
        alone = p.replace(lengths=p.lengths[b : b + 1], **own)
        expected_log_z, expected = NUMBA.gradients(alone, wanted_of(p))
        assert_close(log_z[b : b + 1], expected_log_z)
        for name, value in expected.items():
            row = found[name][b]
            assert_close(row[:length] if name in names else row, value[0])
            assert name not in names or not bool(row[length:].any())
        assert table.start[table.sequence == b].tolist() == NUMBA.viterbi(alone)[1].start.tolist()


def test_float32_is_computed_in_float64() -> None:
    p = random_problem(2, 60, 5, 3, by_duration=True, boundary=True, dtype=torch.float32)
    log_z, found = NUMBA.gradients(p, wanted_of(p))
    expected_log_z, expected = NUMBA.gradients(p.to(torch.float64), wanted_of(p))
    assert_close(log_z, expected_log_z)
    for name in ("scores", "start_scores", "end_scores"):
        assert found[name].dtype == torch.float32
        assert_close(found[name], expected[name], torch.float32)


def test_gradients_do_not_depend_on_threads() -> None:
    p = random_problem(1, 700, 5, 3, by_duration=True, ragged=False)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(NUMBA.gradients(p, ALL)[1])
    finally:
        torch.set_num_threads(threads)
    for name in ALL:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("wanted", [{"scores"}, {"transition"}, {"end_scores", "duration_bias"}])
def test_gradients_are_those_wanted(wanted: set[str]) -> None:
    p = random_problem(2, 20, 4, 3, by_duration=True)
    _, found = NUMBA.gradients(p, wanted)
    _, expected = NUMBA.gradients(p, ALL)
    assert found.keys() == wanted
    for name in wanted:
        assert_close(found[name], expected[name])


def _backward(p: Potentials, backend: str) -> dict[str, Tensor]:
    leaves = with_gradients(p)
    weight = torch.arange(1.0, p.batch_size + 1, dtype=torch.float64)
    (log_partition(leaves, backend) * weight).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.parameters().items()}


def test_entry_points_use_the_kernels() -> None:
    p = random_problem(3, 30, 5, 3, by_duration=True, boundary=True, ends=True, forbid=0.05)
    with record_backends() as ran:
        found = _backward(p, "auto")
        best = viterbi(p)
        marginals = segment_marginals(p)
    assert ran == ["numba"] * 3
    for name, value in _backward(p, "reference").items():
        assert_close(found[name], value)
    expected = viterbi(p, "reference")
    assert_close(best.scores, expected.scores)
    assert [list(map(str, s)) for s in best.segments] == [
        list(map(str, s)) for s in expected.segments
    ]
    for value, other in zip(marginals, segment_marginals(p, "reference"), strict=True):
        assert_close(value, other)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_initial_scores_by_duration(backend: str) -> None:
    drawn = random_problem(2, 4, 3, 2, by_duration=True, boundary=True, ragged=False)
    explicit = explicit_start(drawn)
    assert explicit.initial_scores.shape == (3, 2)
    assert_close(log_partition(explicit, backend), log_partition(drawn, backend))
    p = with_gradients(drawn.replace(initial_scores=torch.randn(3, 2, dtype=torch.float64)))
    segmentations, scores = enumerate_scores(p, 0)
    log_z = log_partition(p, backend)
    assert_close(log_z[0], scores.logsumexp(0))
    found, expected = gradients_of(log_z[0], p), gradients_of(scores.logsumexp(0), p)
    for name, value in found.items():
        assert_close(value, expected[name])
    best = viterbi(p, backend).segments[0]
    assert [(s.start, s.end + 1, s.label) for s in best] == segmentations[scores.argmax()]
    assert_close(n_best(p, 4, backend).scores[0], scores.detach().topk(4).values)


def test_initial_scores_by_duration_need_transitions_by_duration() -> None:
    p = random_problem(1, 4, 3, 2, ragged=False)
    with pytest.raises(ValueError, match=r"`initial_scores` must have shape \(2,\); got \(3, 2\)"):
        log_partition(p.replace(initial_scores=torch.zeros(3, 2)))

"""The exact engine against every path listed, and its algorithms against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash_semicrf
from flash_semicrf import SemiMarkov
from flash_semicrf.exact.banded import banded_levels
from flash_semicrf.semirings import (
    CrossEntropySemiring,
    EntropySemiring,
    KLDivergenceSemiring,
    KMaxSemiring,
    LogSemiring,
    MaxSemiring,
    StdSemiring,
)
from flash_semicrf.semirings.checkpoint import CheckpointSemiring, CheckpointShardSemiring
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.cases import long
from tests.flash_semicrf.edge_paths import path_scores, paths, random_edges

ALGORITHMS = {
    "ring": {"use_linear_scan": True},
    "vectorized": {"use_vectorized": True},
    "tree": {"use_linear_scan": False},
    "automatic": {},
}
SEMIRINGS = {
    "log": LogSemiring(),
    "max": MaxSemiring(),
    "std": StdSemiring(),
    "3 best": KMaxSemiring(3),
    "entropy": EntropySemiring(),
    "cross-entropy": CrossEntropySemiring(),
    "kl": KLDivergenceSemiring(),
}
# B, N, K, C
SHAPES = {
    "usual": (3, 5, 3, 2),
    "no durations": (2, 4, 1, 2),
    "K > N": (2, 4, 7, 2),
    "one label": (3, 6, 4, 1),
    "one node": (2, 1, 3, 2),
    "linear chain": (2, 5, 2, 2),
}


def potentials(semiring, shape, forbid=0.0, seed=0):
    """Edges (a pair of them where wanted) and ragged lengths."""
    batch, nodes, durations, labels = shape
    front = (2,) if semiring.num_potentials == 2 else ()
    edges = random_edges(*front, batch, nodes - 1, durations, labels, labels, seed=seed)
    if forbid:
        # Both of a pair forbid the same, else the divergence is infinite.
        keep = torch.rand(edges.shape[-5:], generator=torch.Generator().manual_seed(seed)) >= forbid
        edges = edges.masked_fill(~keep, -math.inf)
    edges = edges if semiring.log_domain else edges.exp()
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(1, nodes + 1, (batch,), generator=generator)
    lengths[0] = nodes
    return edges.requires_grad_(), lengths


def _x_log_y(x, y):
    return torch.where(x > 0, x * torch.where(x > 0, y, 1.0).log(), 0.0)


def listed_answer(name, edges, length):
    """What a semiring computes, from the list of all paths of one sequence."""
    if name == "std":
        listed = [
            math.prod((edges[e] for e in path), start=edges.new_ones(()))
            for path in paths(length, *edges.shape[1:3])
        ]
        return sum(listed, edges.new_zeros(()))
    if name in ("cross-entropy", "kl"):
        p, q = (path_scores(e, length).softmax(0) for e in edges)
        return _x_log_y(p, p if name == "kl" else torch.ones_like(p)).sum() - _x_log_y(p, q).sum()
    scores = path_scores(edges, length)
    if name == "3 best":
        best = torch.cat([scores, scores.new_full((3,), -math.inf)]).sort(descending=True).values
        return best[:3]
    if not (scores > -math.inf).any():
        return scores.new_tensor(0.0 if name == "entropy" else -math.inf)
    if name == "entropy":
        share = scores.softmax(0)
        return -_x_log_y(share, share).sum()
    return scores.logsumexp(0) if name == "log" else scores.max()


def answer_and_gradient(semiring, edges, lengths, **options):
    answer = SemiMarkov(semiring).sum(edges, lengths, **options)
    return answer, gradient_of(answer, edges)


def gradient_of(answer, edges):
    """Gradient of a weighted sum of everything finite."""
    weights = torch.arange(1, answer.numel() + 1, dtype=answer.dtype).view_as(answer)
    total = (torch.where(answer.isfinite(), answer, 0.0) * weights).sum()
    return torch.autograd.grad(total, edges, allow_unused=True, materialize_grads=True)[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SEMIRINGS)
def test_sum_matches_enumeration(name, shape, algorithm):
    semiring = SEMIRINGS[name]
    edges, lengths = potentials(semiring, SHAPES[shape])
    actual = SemiMarkov(semiring).sum(edges, lengths, **ALGORITHMS[algorithm])
    expected = [
        listed_answer(name, edges[..., b, :, :, :, :], int(n)) for b, n in enumerate(lengths)
    ]
    assert_close(actual, torch.stack(expected, -1))


@pytest.mark.parametrize("forbid", [0.0, 0.3])
@pytest.mark.parametrize("name", ["log", "std", "entropy", "kl"])
def test_gradient_matches_enumeration(name, forbid):
    semiring = SEMIRINGS[name]
    edges, lengths = potentials(semiring, (3, 5, 3, 2), forbid=forbid, seed=3)
    if name == "std":
        edges = edges.detach().masked_fill(edges.isinf(), 0.0).requires_grad_()
    answer, actual = answer_and_gradient(semiring, edges, lengths, use_linear_scan=True)
    listed = [listed_answer(name, edges[..., b, :, :, :, :], int(n)) for b, n in enumerate(lengths)]
    expected = gradient_of(torch.stack(listed), edges)
    assert_close(answer, torch.stack(listed))
    # Autograd of the list has NaN (0 * inf) at forbidden edges; the right gradient is 0.
    assert_close(actual, torch.where(edges == -math.inf, 0.0, expected.nan_to_num(0.0)))


@given(
    name=st.sampled_from(sorted(SEMIRINGS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3)),
    forbid=st.sampled_from([0.0, 0.3, 0.7]),
    seed=st.integers(0, 99),
)
def test_algorithms_agree(name, shape, forbid, seed):
    semiring = SEMIRINGS[name]
    edges, lengths = potentials(semiring, shape, forbid=forbid, seed=seed)
    expected, gradient = answer_and_gradient(semiring, edges, lengths, use_linear_scan=True)
    assert not gradient.isnan().any()
    others = [(semiring, {"use_vectorized": True}), (semiring, {"use_linear_scan": False})]
    others += [(CheckpointSemiring(semiring), {"use_linear_scan": True})]
    others += [(CheckpointSemiring(semiring), {"use_vectorized": True})]
    others += [(CheckpointShardSemiring(semiring, 30), {"use_linear_scan": False})]
    if semiring.size == 1:
        others.append((semiring, {"use_banded": True}))
    for other, options in others:
        actual, found = answer_and_gradient(other, edges, lengths, **options)
        assert_close(actual, expected)
        assert_close(found, gradient)


@pytest.mark.parametrize("labels, durations", [(8, 2), (9, 3)])
def test_banded_levels_run_where_labels_keep_an_order(labels, durations):
    edges = random_edges(2, 12, durations, labels, labels)
    step = torch.arange(labels)[:, None] - torch.arange(labels)
    edges = edges.masked_fill((step < 0) | (step > 1), -math.inf).requires_grad_()
    lengths = torch.tensor([13, 10])
    assert banded_levels(LogSemiring(), edges, lengths) > 0
    for semiring in (LogSemiring(), MaxSemiring()):
        expected, gradient = answer_and_gradient(semiring, edges, lengths, use_linear_scan=True)
        actual, found = answer_and_gradient(semiring, edges, lengths, use_banded=True)
        assert_close(actual, expected)
        assert_close(found, gradient)


def test_no_band_is_narrow_when_everything_is_allowed():
    edges = random_edges(1, 12, 4, 4, 4)
    assert banded_levels(LogSemiring(), edges, torch.tensor([13])) == 0


@pytest.mark.parametrize(
    "name, algorithm",
    [(name, "ring") for name in ("log", "std", "max")]
    + [long(name, "ring") for name in SEMIRINGS if name not in ("log", "std", "max")]
    + [("log", "vectorized"), ("3 best", "vectorized"), long("std", "vectorized")],
)
def test_two_thousand_nodes_scan_without_recursion(name, algorithm):
    semiring = SEMIRINGS[name]
    front = (2,) if semiring.num_potentials == 2 else ()
    edges = random_edges(*front, 1, 1999, 3, 1, 1)
    edges = (edges if semiring.log_domain else 0.3 * edges.exp()).requires_grad_()
    answer, gradient = answer_and_gradient(semiring, edges, None, **ALGORITHMS[algorithm])
    assert answer.isfinite().all()
    assert gradient.isfinite().all()


def test_marginals_are_the_probabilities_of_edges():
    edges, lengths = potentials(LogSemiring(), SHAPES["usual"], forbid=0.2, seed=5)
    actual = SemiMarkov(LogSemiring).marginals(edges, lengths)
    expected = torch.zeros_like(edges)
    for b, length in enumerate(lengths.tolist()):
        share = path_scores(edges[b], length).softmax(0).nan_to_num(0.0)
        for path, weight in zip(paths(length, 3, 2), share, strict=True):
            for edge in path:
                expected[(b, *edge)] += weight
    assert_close(actual, expected)


def test_marginals_are_differentiable_where_potentials_are():
    edges, lengths = potentials(LogSemiring(), (2, 4, 3, 2))
    twice = SemiMarkov(LogSemiring).marginals(edges, lengths).square().sum()
    actual = torch.autograd.grad(twice, edges)[0]
    by_scan = SemiMarkov(LogSemiring).marginals(edges, lengths, use_linear_scan=True)
    assert_close(actual, torch.autograd.grad(by_scan.square().sum(), edges)[0])
    assert not SemiMarkov(LogSemiring).marginals(edges.detach(), lengths).requires_grad


def test_max_marginals_are_one_best_path():
    edges = random_edges(3, 5, 4, 2, 2).round().requires_grad_()  # ties
    lengths = torch.tensor([6, 2, 4])
    best, marginals = (
        getattr(SemiMarkov(MaxSemiring), method)(edges, lengths) for method in ("sum", "marginals")
    )
    sequence, extra = SemiMarkov.from_parts(marginals)
    parts = SemiMarkov.to_parts(sequence, extra, lengths)
    assert torch.equal(parts.double(), marginals)
    assert_close(SemiMarkov(MaxSemiring).score(edges, parts), best)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_k_best_paths_are_distinct_and_have_their_scores(options):
    edges = random_edges(2, 4, 3, 2, 2, seed=1)
    lengths = torch.tensor([5, 3])
    model = SemiMarkov(KMaxSemiring(6))
    scores, marginals = model.sum(edges, lengths), model.marginals(edges, lengths, **options)
    assert marginals.shape == (6, *edges.shape)
    for b, length in enumerate(lengths.tolist()):
        expected = path_scores(edges[b], length).sort(descending=True).values[:6]
        assert_close(scores[:, b], expected)
        found = [marginals[i, b] for i in range(6)]
        assert_close(torch.stack([(m * edges[b]).sum() for m in found]), expected)
        assert not any(torch.equal(m, n) for m, n in itertools.combinations(found, 2))


def test_k_best_of_fewer_paths_are_minus_infinity_without_gradient():
    edges = torch.zeros(1, 2, 2, 1, 1, requires_grad=True)  # one path
    model = SemiMarkov(KMaxSemiring(3))
    assert model.sum(edges)[:, 0].tolist() == [0.0, -math.inf, -math.inf]
    marginals = model.marginals(edges)
    assert marginals[0].sum() == 2
    assert not marginals[1:].any()


@pytest.mark.parametrize("name", SEMIRINGS)
def test_infeasible_sequences_have_no_gradient(name):
    semiring = SEMIRINGS[name]
    edges, _ = potentials(semiring, (2, 4, 2, 2))
    edges = edges.detach().clone()
    edges[..., 1, 1, :, :, :] = -math.inf if semiring.log_domain else 0.0
    edges.requires_grad_()
    for options in ALGORITHMS.values():
        v, _, _ = SemiMarkov(semiring).logpartition(edges, **options)
        assert (v[0].exp() if semiring.log_domain else v[0])[1] == 0
        answer, gradient = answer_and_gradient(semiring, edges, None, **options)
        assert not gradient.isnan().any()
        if semiring.log_domain:
            assert not gradient[..., 1, :, :, :, :].any()
        if name in ("entropy", "kl", "cross-entropy"):
            assert answer[1] == 0


def test_divergence_is_infinite_where_q_forbids_what_p_allows():
    p, q = random_edges(2, 2, 3, 3, 2, 2)
    q[0, 0, 1] = -math.inf
    q[0, 0, 2] = -math.inf
    pair = torch.stack([p, q]).requires_grad_()
    for semiring, options in itertools.product(
        (CrossEntropySemiring, KLDivergenceSemiring), ALGORITHMS.values()
    ):
        answer, gradient = answer_and_gradient(semiring, pair, None, **options)
        assert answer.isinf().tolist() == [True, False]
        assert gradient.isfinite().all()
        assert not gradient[:, 0].any()


def test_divergences_are_consistent():
    p, q = random_edges(2, 2, 4, 3, 2, 2)
    cross = SemiMarkov(CrossEntropySemiring).sum((p, q))
    divergence = SemiMarkov(KLDivergenceSemiring).sum([p, q])
    assert_close(cross, SemiMarkov(EntropySemiring).sum(p) + divergence)
    assert_close(SemiMarkov(KLDivergenceSemiring).sum((p, p)), torch.zeros(2).double())


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("name", ["log", long("std"), long("entropy"), long("kl")])
def test_gradcheck(name, options):
    semiring = SEMIRINGS[name]
    edges, lengths = potentials(semiring, (2, 4, 3, 2))

    def total(x):
        return SemiMarkov(semiring).sum(x, lengths, **options)

    assert torch.autograd.gradcheck(total, edges)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_gradgradcheck_of_log_z(options):
    edges, lengths = potentials(LogSemiring(), (2, 4, 3, 1))
    assert torch.autograd.gradgradcheck(
        lambda x: SemiMarkov(LogSemiring).sum(x, lengths, **options), edges
    )


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_unused_entries_may_hold_anything(options):
    edges, _ = potentials(LogSemiring(), (2, 5, 3, 2))
    lengths = torch.tensor([5, 3])
    expected, gradient = answer_and_gradient(LogSemiring, edges, lengths, **options)
    dirty = edges.detach().clone()
    dirty[:, :, 0] = math.nan  # duration 0
    dirty[1, 1, 2] = math.inf  # past the end
    dirty[1, 2:] = math.nan
    actual, found = answer_and_gradient(LogSemiring, dirty.requires_grad_(), lengths, **options)
    assert_close(actual, expected)
    assert_close(found, gradient)


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_scores_of_a_hundred(scale):
    edges = scale * random_edges(2, 12, 4, 3, 3).abs()
    answers = [SemiMarkov(LogSemiring).sum(edges, **options) for options in ALGORITHMS.values()]
    for other in answers[1:]:
        assert_close(other, answers[0])
    best = SemiMarkov(MaxSemiring).sum(edges)
    assert ((answers[0] >= best) & (answers[0] < best + 30)).all()


def test_forms_of_what_logpartition_returns():
    edges = random_edges(3, 4, 3, 2, 2, dtype=torch.float32)
    v, given, charts = SemiMarkov(EntropySemiring).logpartition(edges, force_grad=True)
    assert v.shape == (2, 3) and v.dtype == torch.float32
    assert charts is None
    assert [x.requires_grad for x in given] == [True]
    assert torch.autograd.grad(v.sum(), given)[0].shape == edges.shape
    assert not edges.requires_grad
    v, given, _ = SemiMarkov(KLDivergenceSemiring()).logpartition((edges, edges))
    assert v.shape == (3, 3) and len(given) == 2
    assert SemiMarkov(LogSemiring).logpartition(edges.half())[0].dtype == torch.float32


@pytest.mark.parametrize("algorithm", ["ring", "vectorized"])
@pytest.mark.parametrize("name", ["log", "entropy"])
def test_float32_edges_lose_nothing_on_the_way(name, algorithm):
    # Messages are float64: summed in float32, log Z of 300 steps puts 1e-4 on the marginals.
    edges = random_edges(1, 300, 5, 4, 4, dtype=torch.float32)
    engine, options = SemiMarkov(SEMIRINGS[name]), ALGORITHMS[algorithm]
    assert_close(engine.sum(edges, **options), engine.sum(edges.double(), **options))
    found, expected = (engine.marginals(x, **options) for x in (edges, edges.double()))
    assert found.dtype == torch.float32
    assert_close(found, expected)


def test_neg_inf_forbids_as_minus_infinity_does():
    edges = random_edges(2, 4, 3, 2, 2, forbid=0.3)
    finite = edges.masked_fill(edges == -math.inf, flash_semicrf.streaming.NEG_INF)
    for dtype in (torch.float32, torch.float64):
        actual = SemiMarkov(LogSemiring).sum(finite.to(dtype))
        assert_close(actual, SemiMarkov(LogSemiring).sum(edges.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [*ALGORITHMS.values(), {"use_banded": True}], ids=str)
def test_unusable_nan_leaves_the_rule_of_neg_inf_on(options, dtype):
    edges = torch.full((2, 3, 3, 2, 2), -2e38, dtype=dtype)
    edges[1] = 0.0
    edges[:, :, 0] = math.nan
    found = SemiMarkov(LogSemiring).sum(edges, **options)
    assert found[0] == -math.inf and found[1].isfinite()


@pytest.mark.parametrize("semiring", [LogSemiring, MaxSemiring, StdSemiring])
@pytest.mark.parametrize("durations", [2, 3])
def test_banded_tree_without_any_entry(durations, semiring):
    zero = semiring.zero
    edges = torch.full((1, 4, durations, 2, 2), zero)
    assert SemiMarkov(semiring).sum(edges, use_banded=True).tolist() == [zero]


def test_tree_that_cannot_fit_is_refused_with_its_bytes():
    edges = torch.zeros(1, 1, 1, 1, 1).expand(8, 255, 100, 24, 24)
    with pytest.raises(ValueError) as info:
        SemiMarkov(LogSemiring).logpartition(edges, use_linear_scan=False)
    side = 99 * 24
    size = 4 * (8 * 255 * side**2 + 4 * 255 * side**2 + 4 * 255 * side**3)
    assert f"would take {size} bytes" in str(info.value)
    assert "more than memory_limit=8e+09" in str(info.value)


def test_shards_let_a_tree_fit():
    edges = random_edges(1, 20, 5, 4, 4)
    tree = {"use_linear_scan": False}
    with pytest.raises(ValueError, match="would take .* bytes"):
        SemiMarkov(LogSemiring, memory_limit=3e5).sum(edges, **tree)
    sharded = SemiMarkov(CheckpointShardSemiring(LogSemiring, 1000), memory_limit=3e5)
    assert_close(sharded.sum(edges, **tree), SemiMarkov(LogSemiring).sum(edges))


def test_automatic_choice(monkeypatch):
    ran = []
    for name in ("linear_scan", "binary_tree"):

        def spy(semiring, edges, lengths, name=name):
            ran.append(name)
            return edges.new_zeros(1, edges.shape[-5])

        monkeypatch.setattr(flash_semicrf.exact.semimarkov, name, spy)
    for batch, durations, labels in ((1, 2, 4), (1, 51, 4), (1, 20, 8), (100, 2, 8)):
        edges = torch.zeros(batch, 60, durations, labels, labels)
        SemiMarkov(LogSemiring).logpartition(edges)
    SemiMarkov(LogSemiring, memory_limit=1e3).logpartition(torch.zeros(1, 60, 2, 4, 4))
    assert ran == ["binary_tree"] + 4 * ["linear_scan"]


def test_bad_arguments_are_named():
    model, edges = SemiMarkov(LogSemiring), torch.zeros(2, 3, 2, 2, 2)
    cases = [
        (lambda: SemiMarkov(torch), TypeError, "`semiring` must be a Semiring"),
        (lambda: SemiMarkov(LogSemiring, 0), ValueError, "`memory_limit` must be > 0; got 0"),
        (lambda: model.sum(edges[0]), ValueError, r"shape \(B, N-1, K, C, C\).*got \(3, 2, 2, 2\)"),
        (lambda: model.sum(edges.long()), TypeError, "floating-point dtype; got torch.int64"),
        (lambda: model.sum(edges, torch.tensor([4, 5])), ValueError, "got 5 at index 1"),
        (lambda: model.sum((edges, edges)), ValueError, "must hold 1 edge tensors.*got 2"),
        (lambda: SemiMarkov(KLDivergenceSemiring).sum([edges]), ValueError, "must hold 2"),
        (
            lambda: SemiMarkov(StdSemiring).sum(edges.log()),
            ValueError,
            r"must be finite \(weights, not logarithms\); got -inf at index \(0, 0, 1, 0, 0\)",
        ),
        (
            lambda: model.sum(edges.index_fill(1, torch.tensor([1]), math.nan)),
            ValueError,
            r"got nan at index \(0, 1, 1, 0, 0\)",
        ),
        (
            lambda: model.sum(edges, use_vectorized=True, use_linear_scan=False),
            ValueError,
            "contradicts a tree",
        ),
        (
            lambda: model.sum(edges, use_banded=True, use_linear_scan=True),
            ValueError,
            "contradicts `use_linear_scan`=True",
        ),
        (
            lambda: SemiMarkov(EntropySemiring).sum(edges, use_banded=True),
            ValueError,
            "needs a semiring with values of size 1; EntropySemiring has 2",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_exports():
    assert flash_semicrf.exact.semimarkov.__all__ == ["SemiMarkov"]
    assert flash_semicrf.SemiMarkov is SemiMarkov
    assert "SemiMarkov" in flash_semicrf.__all__


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEMIRINGS)
def test_gpu_gives_the_same_as_the_cpu(name):
    semiring = SEMIRINGS[name]
    edges, lengths = potentials(semiring, (3, 9, 4, 2))
    on_gpu = edges.detach().cuda().requires_grad_()
    for options in [*ALGORITHMS.values(), *([{"use_banded": True}] if semiring.size == 1 else [])]:
        expected, gradient = answer_and_gradient(semiring, edges, lengths, **options)
        answer = SemiMarkov(semiring).sum(on_gpu, lengths, **options)
        weights = torch.arange(1, answer.numel() + 1, dtype=answer.dtype).view_as(answer.cpu())
        total = (torch.where(answer.isfinite(), answer, 0.0) * weights.cuda()).sum()
        assert_close(answer, expected)
        assert_close(torch.autograd.grad(total, on_gpu)[0], gradient)

"""Edge tensors of problems, and the exact engine on them against the reference loop."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import SemiMarkov, log_partition, segment_marginals
from flash_semicrf.exact import inference
from flash_semicrf.exact.edges import check_edge_memory, edge_bytes, edge_tensor
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.validation import check_potentials
from flash_semicrf.semirings import EntropySemiring, KMaxSemiring
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import SMALL_CASES, Case, gradients_of, thinned, with_gradients

LIMIT = 1e9
CASES = SMALL_CASES[::3] + [SMALL_CASES[-1]]
"""Every third: with three options in turn, all pairs of options occur."""


@pytest.mark.parametrize("case", thinned(SMALL_CASES[::2], 3), ids=str)
def test_paths_are_segmentations_with_their_scores(case):
    p = case.problem()
    edges = edge_tensor(p)
    assert edges.shape == (p.batch_size, p.num_positions, p.max_duration + 1, *2 * (p.num_labels,))
    for b in range(p.batch_size):
        segmentations, expected = enumerate_scores(p, b)
        actual = []
        for segments in segmentations:
            previous, total = 0, 0.0
            for start, stop, label in segments:
                total += float(edges[b, start, stop - start, label, previous])
                previous = label
            actual.append(total)
        assert_close(torch.tensor(actual, dtype=torch.float64), expected)


def test_nothing_else_is_a_path():
    p = random_problem(num_positions=4, max_duration=3, num_labels=3)
    edges = edge_tensor(p)
    assert (edges[:, :, 0] == -math.inf).all()
    assert (edges[:, 0, :, :, 1:] == -math.inf).all()
    for b, length in enumerate(p.lengths.tolist()):
        for s in range(4):
            for k in range(1, 4):
                if s + k > length:
                    assert (edges[b, s, k] == -math.inf).all()


def test_padding_is_ignored_and_neg_inf_forbids():
    p = random_problem(batch_size=3, num_positions=5, boundary=True, ends=True, seed=2)
    expected = edge_tensor(p)
    inside = (torch.arange(5) < p.lengths[:, None])[..., None]
    dirty = {
        name: getattr(p, name).masked_fill(~inside, math.nan)
        for name in ("scores", "start_scores", "end_scores")
    }
    assert_close(edge_tensor(p.replace(**dirty)), expected)
    forbidden = torch.rand(p.duration_bias.shape) < 0.4
    results = [
        edge_tensor(p.replace(duration_bias=p.duration_bias.masked_fill(forbidden, value)))
        for value in (-math.inf, -1e38, -2e38)
    ]
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


@pytest.mark.parametrize("backend", inference.EDGE_BACKENDS)
@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_log_partition_and_gradients_match_the_reference(case, backend):
    ours, theirs = with_gradients(case.problem()), with_gradients(case.problem())
    actual = inference.log_partition(ours, backend, LIMIT)
    expected = log_partition(theirs, "reference")
    assert_close(actual, expected)
    feasible = expected > -math.inf
    found = gradients_of(actual[feasible].sum(), ours)
    wanted = gradients_of(expected[feasible].sum(), theirs)
    for name, value in wanted.items():
        assert_close(found[name], value)


@pytest.mark.parametrize("backend", inference.EDGE_BACKENDS)
@pytest.mark.parametrize("case", thinned(CASES[::4], 3), ids=str)
def test_marginals_match_the_reference(case, backend):
    p = case.problem()
    actual = inference.segment_marginals(p, backend, LIMIT)
    for found, wanted in zip(actual, segment_marginals(p, "reference"), strict=True):
        if wanted is not None:  # a parameter that the problem does not have
            assert_close(found, wanted)


@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_decoding_matches_the_reference_ties_included(case):
    p = case.problem(integers=True)
    best = [float(enumerate_scores(p, b)[1].max()) for b in range(p.batch_size)]
    if -math.inf in best:
        infeasible = [b for b, score in enumerate(best) if score == -math.inf]
        with pytest.raises(ValueError, match="No segmentation is feasible") as info:
            inference.viterbi_table(p, "exact", LIMIT)
        assert str(infeasible) in str(info.value)
        return
    scores, table = inference.viterbi_table(p, "exact", LIMIT)
    expected_scores, expected = viterbi_table(p, "reference")
    assert_close(scores, expected_scores)
    assert isinstance(table, SegmentTable)
    assert all(torch.equal(a, b) for a, b in zip(table, expected, strict=True))


def test_float32_problems_and_large_scores():
    p = random_problem(num_positions=12, max_duration=4, scale=100.0, dtype=torch.float32)
    edges = edge_tensor(p)
    assert edges.dtype == torch.float64
    actual = inference.log_partition(p, "exact", LIMIT)
    assert_close(actual, log_partition(p, "reference"))


def test_other_semirings_see_segmentations_one_to_one():
    p = check_potentials(Case("usual", start=True, final=True).problem())
    edges, nodes = edge_tensor(p), p.lengths + 1
    entropy = SemiMarkov(EntropySemiring).sum(edges, nodes)
    best = SemiMarkov(KMaxSemiring(4)).sum(edges, nodes)
    for b in range(p.batch_size):
        _, scores = enumerate_scores(p, b)
        share = scores.softmax(0)
        assert_close(entropy[b], -(share * share.log()).sum())
        listed = torch.cat([scores, scores.new_full((4,), -math.inf)])
        assert_close(best[:, b], listed.sort(descending=True).values[:4])


def test_edges_that_cannot_fit_are_refused_before_they_are_built():
    one = torch.zeros(1, 1, 1)
    p = random_problem(1, 2, 3, 24, ragged=False).replace(
        scores=one.expand(8, 40_000, 24), lengths=torch.full((8,), 40_000)
    )
    size = 8 * 8 * 40_000 * 4 * 24 * 24
    assert edge_bytes(p) == size
    for entry in (inference.log_partition, inference.segment_marginals, inference.viterbi_table):
        with pytest.raises(ValueError, match=f"would take {size} bytes .* more than `edge_memory"):
            entry(p, "exact", 5e9)
    check_edge_memory(p, size)


def test_tree_above_the_threshold_is_refused_where_the_edges_are_not():
    p = random_problem(2, 8, 4, 3)
    threshold = 2 * edge_bytes(p)
    actual = inference.log_partition(p, "exact", threshold)
    assert_close(actual, log_partition(p, "reference"))
    for entry in (inference.log_partition, inference.segment_marginals):
        with pytest.raises(ValueError, match="A binary tree over edges .* would take .* bytes"):
            entry(p, "binary_tree_sharded", threshold)
    # Decoding grows no tree.
    inference.viterbi_table(p, "binary_tree_sharded", threshold)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", inference.EDGE_BACKENDS)
def test_gpu_gives_the_same_as_the_cpu(backend):
    p = random_problem(3, 12, 4, 3, boundary=True, ends=True)
    expected = log_partition(p, "reference")
    assert_close(inference.log_partition(p.to("cuda"), backend, LIMIT), expected)
    scores, table = inference.viterbi_table(p.to("cuda"), backend, LIMIT)
    expected_scores, expected_table = viterbi_table(p, "reference")
    assert_close(scores, expected_scores)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(table, expected_table, strict=True))

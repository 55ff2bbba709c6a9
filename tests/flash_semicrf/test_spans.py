"""Segment scores and transition scores: every function against the list of all segmentations."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_semicrf import (
    Constraints,
    SemiCRFDistribution,
    entropy,
    kl_divergence,
    log_partition,
    minimum_risk,
    n_best,
    sample,
    segment_marginals,
    segment_probabilities,
    viterbi,
)
from flash_semicrf.exact import inference as exact
from flash_semicrf.problem.dense import score_dense, table_to_dense
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import Segment, segments_to_table
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import at, gradients_of, message_of, naive_score, with_gradients

BACKENDS = ("numba", "reference")

KINDS = {
    "spans": {"spans": True},
    "moves": {"moves": True},
    "both": {"spans": True, "moves": True},
    "by duration": {"spans": True, "moves": True, "by_duration": True},
    "boundary": {"spans": True, "moves": True, "boundary": True, "ends": True},
    "tail": {"spans": True, "moves": True, "tail": True},
    "forbidden": {"spans": True, "moves": True, "forbid": 0.15},
    "forbidden, tail": {"spans": True, "tail": True, "boundary": True, "forbid": 0.1},
    "K > T": {"spans": True, "moves": True, "num_positions": 3, "max_duration": 5},
    "one label": {"spans": True, "moves": True, "num_labels": 1},
}

parametrize_kinds = pytest.mark.parametrize("kind", KINDS)
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)


def drawn(kind, **options):
    return random_problem(
        **{"num_positions": 4, "num_labels": 2, "seed": 4, **KINDS[kind]} | options
    )


def everything(problem):
    """Segmentations and probabilities of every sequence that has any."""
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        if scores.max() > -torch.inf:
            yield b, segmentations, scores


@parametrize_kinds
def test_scores_of_segmentations_are_the_sums_of_their_terms(kind):
    problem = drawn(kind)
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        expected = torch.tensor(
            [naive_score(problem, b, s) for s in segmentations], dtype=torch.float64
        )
        assert_close(scores, expected)


@parametrize_backends
@parametrize_kinds
def test_log_partition_and_its_gradient(kind, backend):
    problem = drawn(kind)
    ours, listed = with_gradients(problem), with_gradients(problem)
    expected = {b: scores.logsumexp(0) for b, _, scores in everything(listed)}
    found = log_partition(ours, backend)
    for b in range(problem.batch_size):
        assert_close(found[b], expected.get(b, torch.tensor(-torch.inf, dtype=torch.float64)))
    total = found[found > -torch.inf].sum()
    theirs = gradients_of(sum(expected.values()), listed)
    for name, gradient in gradients_of(total, ours).items():
        assert_close(gradient, theirs[name].nan_to_num(0.0))


@parametrize_backends
@parametrize_kinds
def test_marginals_of_segments_and_transitions(kind, backend):
    problem = drawn(kind)
    found = segment_marginals(problem, backend)
    segment = torch.zeros(
        problem.batch_size, *found.position.shape[1:2], *problem.duration_bias.shape
    )
    change = torch.zeros(*found.position.shape, problem.num_labels)
    for b, segmentations, scores in everything(problem):
        for segments, p in zip(segmentations, scores.softmax(0).tolist(), strict=True):
            for (start, stop, label), before in zip(segments, [None, *segments], strict=False):
                segment[b, start, min(stop - start, problem.max_duration) - 1, label] += p
                if before is not None:
                    change[b, start, before[2], label] += p
    if problem.segment_scores is not None:
        assert_close(found.segment, segment, torch.float32)
        assert_close(found.segment.sum((1, 3)), found.duration.sum(2))
    if problem.transition_scores is not None:
        assert_close(found.change, change, torch.float32)
        counts = found.transition if problem.transition.dim() == 2 else found.transition.sum(1)
        assert_close(found.change.sum(1), counts)
    assert (found.segment is None) == (problem.segment_scores is None)
    assert (found.change is None) == (problem.transition_scores is None)


@parametrize_backends
@parametrize_kinds
def test_decoding_finds_the_best_and_those_that_follow(kind, backend):
    problem = drawn(kind, batch_size=1, ragged=False)
    ((_, segmentations, scores),) = everything(problem)
    best = viterbi(problem, backend)
    assert_close(best.scores[0], scores.max())
    table = segments_to_table(best.segments)
    assert_close(score_segments(problem, table)[0], scores.max())
    assert_close(sum(s.score for s in best.segments[0]) - scores.max(), torch.zeros(()).double())
    dense = table_to_dense(table, 1, problem.num_positions)
    assert_close(score_dense(problem, *dense)[0], scores.max())
    ranked = scores.sort(descending=True).values[:5]
    ranked = ranked[ranked > -torch.inf]
    assert_close(n_best(problem, len(ranked), backend).scores[0], ranked)
    assert len(segmentations) == len(scores)


@parametrize_backends
@parametrize_kinds
def test_probabilities_of_segments(kind, backend):
    problem = drawn(kind, batch_size=1, ragged=False)
    ((_, segmentations, scores),) = everything(problem)
    expected = {}
    for segments, p in zip(segmentations, scores.softmax(0).tolist(), strict=True):
        for segment in segments if p > 0 else []:
            expected[segment] = expected.get(segment, 0.0) + p
    rows = torch.tensor([(0, *segment) for segment in expected])
    table = segments_to_table([[Segment(0, 0, 0)]])._make(rows.unbind(1))
    found = segment_probabilities(problem, table, backend)
    assert_close(found, torch.tensor(list(expected.values())).double(), torch.float32)


@parametrize_backends
@parametrize_kinds
def test_samples_occur_as_often_as_they_should(kind, backend):
    problem = drawn(kind, batch_size=1, ragged=False, scale=0.7)
    ((_, segmentations, scores),) = everything(problem)
    number = 1500
    drawn_ones = sample(problem, number, backend=backend, seed=1)
    counts = dict.fromkeys(map(tuple, segmentations), 0)
    for segments in itertools.chain.from_iterable(drawn_ones):
        counts[tuple((s.start, s.end + 1, s.label) for s in segments)] += 1
    p = scores.softmax(0)
    spread = (p * (1 - p) / number).sqrt()
    observed = torch.tensor([counts[tuple(s)] / number for s in segmentations]).double()
    assert bool(((observed - p).abs() <= 5 * spread + 2 / number).all())


@parametrize_backends
@parametrize_kinds
def test_entropy_and_divergence(kind, backend):
    problem = drawn(kind, batch_size=1, ragged=False)
    ((_, _, scores),) = everything(problem)
    p = scores.softmax(0)
    expected = -(p * p.clamp(min=1e-300).log()).sum()
    assert_close(entropy(problem, backend)[0], expected)
    ours, listed = with_gradients(problem), with_gradients(problem)
    ((_, _, scores),) = everything(listed)
    log_p = scores.log_softmax(0)
    theirs = -torch.where(p > 0, log_p.exp() * torch.where(p > 0, log_p, 0.0), 0.0).sum()
    wanted = gradients_of(theirs, listed)
    for name, gradient in gradients_of(entropy(ours, backend).sum(), ours).items():
        assert_close(gradient, wanted[name].nan_to_num(0.0))
    plain = problem.replace(segment_scores=None, transition_scores=None)
    _, scores = enumerate_scores(plain, 0)
    log_q = scores.log_softmax(0)
    expected = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum()
    assert_close(kl_divergence(problem, plain, backend)[0], expected)


@parametrize_kinds
def test_the_exact_engine_agrees(kind):
    problem = drawn(kind)
    expected = segment_marginals(problem, "reference")
    assert_close(exact.log_partition(problem, "exact", 1e9), log_partition(problem, "reference"))
    found = exact.segment_marginals(problem, "exact", 1e9)
    for name, value in expected._asdict().items():
        assert (value is None) == (getattr(found, name) is None), name
        if value is not None:
            assert_close(getattr(found, name), value)


@parametrize_backends
@pytest.mark.parametrize("kind", ["both", "by duration", "boundary", "tail"])
def test_constraints_leave_the_segmentations_that_agree(kind, backend):
    problem = drawn(kind, batch_size=1, ragged=False)
    ((_, segmentations, scores),) = everything(problem)
    constraints = Constraints(boundaries=[[2]])
    agree = [any(start == 2 for start, _, _ in segments) for segments in segmentations]
    log_z = log_partition(problem, backend, constraints=constraints)
    assert_close(log_z[0], scores[torch.tensor(agree)].logsumexp(0))
    found = segment_marginals(problem, backend, constraints=constraints)
    assert found.segment.shape == problem.segment_scores.shape
    assert_close(found.segment[:, 2].sum(), torch.ones(()).double())


def test_rows_that_no_segment_has_are_ignored():
    problem = random_problem(2, 5, 3, 2, spans=True, moves=True, seed=5)
    short = int(problem.lengths.min())
    b = int(problem.lengths.argmin())
    assert short < 5
    spans, moves = problem.segment_scores.clone(), problem.transition_scores.clone()
    for s, k in itertools.product(range(5), range(1, 4)):
        for i in range(2):
            if s + k > problem.lengths[i]:
                spans[i, s, k - 1] = torch.nan
    moves[:, 0] = torch.nan
    moves[b, short:] = torch.inf
    odd = problem.replace(segment_scores=spans, transition_scores=moves)
    assert_close(log_partition(odd), log_partition(problem))
    for name, value in segment_marginals(odd)._asdict().items():
        assert_close(value, getattr(segment_marginals(problem), name))
    assert_close(entropy(odd), entropy(problem))


def test_errors_name_the_argument_and_the_index():
    problem = random_problem(2, 5, 3, 2, spans=True, moves=True, ragged=False)
    bad = problem.replace(segment_scores=at(problem.segment_scores, (1, 2, 0, 1), torch.nan))
    text = message_of(ValueError, log_partition, bad)
    assert "`segment_scores`" in text and "(1, 2, 0, 1)" in text
    bad = problem.replace(transition_scores=problem.transition_scores[:, :4])
    assert "`transition_scores` must have shape (2, 5, 2, 2)" in message_of(
        ValueError, log_partition, bad
    )
    flagged = problem.replace(segment_scores=at(problem.segment_scores, (1, 2, 0, 1), torch.nan))
    log_z = log_partition(flagged, validate="shapes")
    assert log_z.isnan().tolist() == [False, True]


def test_distribution_and_minimum_risk():
    problem = drawn("both", batch_size=1, ragged=False)
    ((_, segmentations, scores),) = everything(problem)
    distribution = SemiCRFDistribution(problem)
    for segments, score in list(zip(segmentations, scores.tolist(), strict=True))[:10]:
        given = [[Segment(s, t - 1, c) for s, t, c in segments]]
        log_p = distribution.log_prob(given)
        assert log_p.item() == pytest.approx(score - scores.logsumexp(0).item())
    # The segmentation of most expected positions, from the list.
    p = scores.softmax(0)
    labels = torch.tensor(
        [[c for s, t, c in segments for _ in range(t - s)] for segments in segmentations]
    )
    agreement = ((labels[:, None] == labels[None]) * p[None, :, None]).sum((1, 2))
    assert_close(minimum_risk(problem, "position").scores[0], agreement.max())

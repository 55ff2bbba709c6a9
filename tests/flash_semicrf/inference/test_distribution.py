"""The distribution object: contract, oracles by enumeration, calibration on its own samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import kl_divergence

from flash_semicrf import (
    Segment,
    SegmentTable,
    SemiCRFDistribution,
    log_partition,
    segment_marginals,
    segment_probabilities,
)
from flash_semicrf.inference.information import entropy
from flash_semicrf.problem.segments import labels_to_table, segments_to_table, table_to_labels
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import SMALL_CASES, gradients_of, with_gradients

CASES = [case for case in SMALL_CASES if not case.forbid][::8]


def as_segments(segmentation):
    return [Segment(start, stop - 1, label) for start, stop, label in segmentation]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_prob_mode_and_topk_are_those_of_the_enumeration(case):
    problem = case.problem(batch_size=1, ragged=False)
    distribution = SemiCRFDistribution(problem)
    segmentations, scores = enumerate_scores(problem, 0)
    log_p = torch.log_softmax(scores, 0)
    everything = segments_to_table([as_segments(s) for s in segmentations])
    assert_close(distribution.log_prob(everything)[:, 0], log_p)
    best = int(log_p.argmax())
    assert_close(distribution.mode.scores[0], log_p[best])
    found = distribution.mode.segments[0]
    assert [(s.start, s.end + 1, s.label) for s in found] == segmentations[best]
    count = min(5, len(log_p))
    assert_close(distribution.topk(count).scores[0], log_p.topk(count).values)


def test_log_prob_takes_every_form_of_a_segmentation():
    problem = random_problem(2, 6, 3, 3, ragged=True)
    distribution = SemiCRFDistribution(problem)
    labels = torch.tensor([[0, 0, 1, 2, 2, 0], [1, 1, 2, 2, 0, 0]])
    table = labels_to_table(labels, problem.lengths)
    rows = list(zip(*(x.tolist() for x in table), strict=True))
    lists = [[Segment(s, t - 1, c) for b, s, t, c in rows if b == i] for i in range(2)]
    expected = distribution.log_prob(table)
    assert expected.shape == (2,)
    assert torch.equal(distribution.log_prob(labels), expected)
    assert torch.equal(distribution.log_prob(lists), expected)
    twice = distribution.log_prob([*lists, *lists])
    assert twice.shape == (2, 2) and torch.equal(twice, expected.expand(2, 2))


def test_log_prob_of_what_is_forbidden_is_minus_infinity():
    problem = random_problem(1, 3, 3, 2, ragged=False)
    bias = problem.duration_bias.clone()
    bias[1, 0] = -math.inf
    distribution = SemiCRFDistribution(problem.replace(duration_bias=bias))
    assert distribution.log_prob(torch.tensor([[0, 0, 1]])) == -math.inf
    assert bool(distribution.log_prob(torch.tensor([[0, 1, 1]])).isfinite())


def test_log_prob_is_differentiable():
    problem = with_gradients(random_problem(2, 6, 3, 2, boundary=True, ends=True))
    labels = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]])
    distribution = SemiCRFDistribution(problem)
    found = gradients_of(distribution.log_prob(labels).sum(), problem)
    gold = torch.nn.functional.one_hot(labels, 2).double()
    inside = (torch.arange(6) < problem.lengths[:, None])[..., None]
    expected = gold * inside - segment_marginals(problem).position
    assert_close(found["scores"], expected)


def test_bad_events_are_refused():
    distribution = SemiCRFDistribution(random_problem(2, 6, 3, 2, ragged=False))
    with pytest.raises(ValueError, match="longer than `max_duration`=3"):
        distribution.log_prob(torch.zeros(2, 6).long())
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, C-1=1\]"):
        distribution.log_prob(torch.full((2, 6), 2))
    with pytest.raises(ValueError, match="must tile each sequence"):
        distribution.log_prob([[Segment(0, 1, 0), Segment(3, 5, 0)], [Segment(0, 2, 1)]])
    with pytest.raises(ValueError, match="must hold segments of each of the 4 sequences"):
        distribution.log_prob(
            SegmentTable(*(torch.tensor(x) for x in ([0, 2], [0, 0], [1, 1], [0, 0])))
        )


def test_contract_of_a_torch_distribution():
    problem = random_problem(3, 7, 4, 2)
    distribution = SemiCRFDistribution(problem)
    assert isinstance(distribution, torch.distributions.Distribution)
    assert distribution.batch_shape == (3,) and distribution.event_shape == (7,)
    assert not distribution.has_rsample and not distribution.has_enumerate_support
    assert bool(distribution.support.check(torch.zeros(3, 7)).all())
    assert not bool(distribution.support.check(torch.full((3, 7), 2)).any())
    assert repr(distribution) == "SemiCRFDistribution(batch_shape=(3,), T=7, K=4, C=2)"
    assert_close(distribution.log_partition, log_partition(problem))
    assert_close(distribution.entropy(), entropy(problem))
    assert_close(distribution.marginals.position, segment_marginals(problem).position)
    with pytest.raises(TypeError, match="`potentials` must be a Potentials"):
        SemiCRFDistribution(problem.scores)


def test_kl_divergence_is_registered_and_trains():
    p = random_problem(1, 4, 3, 2, ragged=False)
    q = with_gradients(random_problem(1, 4, 3, 2, ragged=False, seed=1))
    log_p, log_q = (torch.log_softmax(enumerate_scores(x, 0)[1], 0) for x in (p, q))
    value = kl_divergence(SemiCRFDistribution(p), SemiCRFDistribution(q))
    assert_close(value[0], (log_p.exp() * (log_p - log_q)).sum())
    found = gradients_of(value.sum(), q)["scores"]
    assert_close(found, segment_marginals(q).position - segment_marginals(p).position)


def test_samples_are_seeded_and_shaped():
    distribution = SemiCRFDistribution(random_problem(2, 30, 5, 3))
    one, same = (distribution.sample(seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert distribution.log_prob(one).shape == (2,)
    assert distribution.log_prob(distribution.sample((4,))).shape == (4, 2)
    assert distribution.log_prob(distribution.sample((2, 3))).shape == (6, 2)
    assert distribution.log_prob(distribution.sample_n(5)).shape == (5, 2)


def assert_unbiased(drawn, expected):
    """Sums over independent sequences of what is drawn are within 5 standard errors.

    Both have a row for each sequence; what is correlated within a sequence is in one entry.
    """
    gaps = drawn - expected
    # The second is the variance of rare counts, which a sample may have none of.
    variance = torch.maximum(gaps.square().sum(0), expected.sum(0))
    assert bool((gaps.sum(0).abs() <= 5 * variance.sqrt()).all())


def every_segment(batch_size, length, longest, num_labels):
    """Table of all segments that sequences of one length may have."""
    rows = torch.cartesian_prod(
        torch.arange(batch_size), torch.arange(length), torch.arange(1, longest + 1),
        torch.arange(num_labels),
    )  # fmt: skip
    sequence, start, duration, label = rows[rows[:, 1] + rows[:, 2] <= length].T
    return SegmentTable(sequence, start, start + duration, label)


@pytest.mark.parametrize("by_duration", [False, True])
def test_calibration_on_2000_sequences_drawn_from_the_model(by_duration):
    batch_size, length, longest, num_labels = 2000, 15, 4, 3
    problem = random_problem(
        batch_size, length, longest, num_labels, by_duration=by_duration, boundary=True,
        ends=True, ragged=False,
    )  # fmt: skip
    distribution = SemiCRFDistribution(problem)
    table = distribution.sample(seed=0)

    # The mean of -log P of the samples is the entropy.
    gaps = -distribution.log_prob(table) - distribution.entropy()
    assert float(gaps.sum().abs()) < 5 * float(gaps.square().sum().sqrt())

    # Sampled statistics match the marginals.
    marginals = distribution.marginals
    one = torch.ones(len(table.start), dtype=torch.float64)
    sequence, start, stop, label = table
    drawn = torch.zeros_like(marginals.start)
    drawn.index_put_((sequence, start, label), one, accumulate=True)
    assert_unbiased(drawn, marginals.start)
    drawn = torch.zeros_like(marginals.duration)
    drawn.index_put_((sequence, stop - start - 1, label), one, accumulate=True)
    assert_unbiased(drawn, marginals.duration)
    drawn = torch.nn.functional.one_hot(table_to_labels(table, batch_size, length), num_labels)
    assert_unbiased(drawn, marginals.position)

    # Of the segments believed with probability p, a share of p is in the samples.
    segments = every_segment(batch_size, length, longest, num_labels)
    believed = segment_probabilities(problem, segments)

    def keys(rows):
        sequence, start, stop, label = rows
        return ((sequence * length + start) * (length + 1) + stop) * num_labels + label

    hit = torch.isin(keys(segments), keys(table)).double()
    assert int(hit.sum()) == len(table.start)
    bins = (believed * 10).long().clamp(max=9)
    shares = torch.zeros(2, batch_size, 10, dtype=torch.float64)
    for share, value in zip(shares, (hit, believed), strict=True):
        share.index_put_((segments.sequence, bins), value, accumulate=True)
    assert_unbiased(*shares)

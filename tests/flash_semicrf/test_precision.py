"""float32 parameters are upcast before anything is computed with them.

So a float32 problem and its float64 copy have the same log Z, scores and segmentations, and a gold
segmentation scores no more than log Z.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import (
    Constraints,
    Potentials,
    SemiCRFDistribution,
    SemiMarkovCRFHead,
    log_partition,
    n_best,
    segment_marginals,
    segment_probabilities,
)
from flash_semicrf.compat import compute_edge_block_streaming, semi_crf_streaming_forward
from flash_semicrf.inference import information
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import center_scores, initial_term, score_segments
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS

KINDS = {
    "static": {},
    "by duration": {"by_duration": True},
    "tail": {"tail": True, "boundary": True},
    "tail by duration": {"tail": True, "by_duration": True, "ends": True},
}


def assert_same(narrow, wide, scale=1e-12):
    """Equal but for the rounding of float64."""
    assert narrow.dtype == wide.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=scale, atol=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])  # of the last, kernels take parts out
@pytest.mark.parametrize("kind", KINDS)
def test_float32_problems_have_the_numbers_of_their_float64_copies(kind, scale, backend):
    p = random_problem(2, 12, 4, 3, scale=scale, dtype=torch.float32, **KINDS[kind])
    if p.duration_tail is not None:
        p = p.replace(duration_tail=-p.duration_tail.abs())
    q = p.to(torch.float64)
    known = Constraints(boundaries=[[2], [0]])
    log_z = log_partition(p, backend)
    assert_same(log_z, log_partition(q, backend))
    assert_same(
        log_partition(p, backend, constraints=known), log_partition(q, backend, constraints=known)
    )
    (best, table), (expected, same) = (viterbi_table(x, backend) for x in (p, q))
    assert_same(best, expected)
    # Neighbours of one label tie in either order: the tables may differ, their scores not.
    assert_same(score_segments(q, table), score_segments(q, same))
    gold = score_segments(p, table)
    assert_same(gold, best)
    assert bool((log_z - gold >= -1e-9 * log_z.abs()).all())
    assert_same(log_partition(unrolled(p), backend), log_z)
    assert_same(n_best(p, 3, backend).scores, n_best(q, 3, backend).scores)
    assert_same(segment_probabilities(p, table, backend), segment_probabilities(q, table, backend))
    assert_same(information.entropy(p, backend), information.entropy(q, backend), 1e-9 * scale)
    for x in segment_marginals(p, backend, counts=False)[:3]:
        assert x.dtype == torch.float32


def test_gold_score_of_a_tail_over_a_million_positions():
    # One segment is all that is allowed, so its probability is 1.
    length = 10**6
    zero, never = torch.zeros(1), torch.full((1, 1), -math.inf)
    p = Potentials(
        torch.full((1, length, 1), 0.1), never, torch.zeros(2, 1), torch.tensor([length]),
        initial_scores=zero, duration_tail=torch.tensor([-0.3]),
    )  # fmt: skip
    table = SegmentTable(*(torch.tensor([x]) for x in (0, 0, length, 0)))
    log_z = log_partition(p)
    assert abs(float(log_z - score_segments(p, table))) <= 1e-9 * abs(float(log_z))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_duration", [False, True])
def test_probabilities_sum_to_one_with_transitions_of_a_hundred(by_duration, backend):
    for seed in range(5):
        p = random_problem(1, 3, 2, 3, by_duration=by_duration, ragged=False, seed=seed)
        p = p.replace(transition=100.0 + p.transition).to(torch.float32)
        _, scores = enumerate_scores(p, 0)
        total = float((scores - log_partition(p, backend)).exp().sum())
        assert abs(total - 1.0) <= 1e-11


def test_initial_term_is_float64_with_gradients_in_the_dtype_of_transitions():
    transition = torch.tensor([[100.0, 1.0], [100.1, 2.0]], requires_grad=True)
    term = initial_term(transition)
    assert_same(term, initial_term(transition.double()))
    term.sum().backward()
    assert transition.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_boundaries_cost_no_digits_of_large_scores(backend):
    p = random_problem(1, 4, 3, 2, ragged=False, seed=1)
    p = p.replace(scores=p.scores + 1e6).to(torch.float32)
    everywhere = Constraints(boundaries=[[0, 1, 2, 3]])
    ones = p.replace(duration_bias=p.duration_bias[:1])  # segments of one position, as forced
    assert_same(log_partition(p, backend, constraints=everywhere), log_partition(ones, backend))


def test_centring_by_position_is_exact():
    scores = torch.tensor([[[2e4, 1.2345678], [-3e6, 0.1]]])
    centred, offset = center_scores(scores, torch.tensor([2]), "position")
    assert_same(centred, scores.double() - scores.double().amax(-1, keepdim=True))
    assert_same(offset, scores.double().amax(-1).sum(1))


def test_centring_by_sequence_takes_the_mean_in_float64():
    # float32 sums of so many positions are off in the fourth digit.
    scores = (torch.randn(1, 200_000, 1) + 1e3).requires_grad_()
    centred, offset = center_scores(scores, torch.tensor([200_000]), "sequence")
    expected = scores.double() - scores.double().mean(1, keepdim=True)
    assert centred.dtype == torch.float32 and offset.tolist() == [0.0]
    torch.testing.assert_close(centred, expected.float(), rtol=1e-6, atol=1e-6)


def test_a_head_has_the_partition_of_its_uncentred_scores():
    # Label 0 scores most, and is forbidden: what is left is one segmentation.
    head = SemiMarkovCRFHead(2, 1, transition_constraints=[[False, False], [False, True]])
    hidden = torch.tensor([2e4, 1.2345678]).expand(1, 64, 2).clone().requires_grad_()
    lengths = torch.tensor([64])
    start = torch.arange(64)
    gold = SegmentTable(0 * start, start, start + 1, torch.ones_like(start))
    loss = head.compute_loss(hidden, lengths, gold)
    assert abs(float(loss.detach())) <= 1e-9 * 64
    problem, offset = head.potentials(hidden, lengths, centered=False)
    assert_same(head(hidden, lengths)["partition"], log_partition(problem))
    assert_same(head.decode(hidden, lengths), log_partition(problem))
    assert_same(head.decode_with_traceback(hidden, lengths).scores, log_partition(problem).detach())
    loss.backward()
    assert hidden.grad.dtype == head.transition.grad.dtype == torch.float32
    assert head.marginals(hidden, lengths).position.dtype == torch.float32
    assert offset.tolist() == [0.0]


def test_log_probability_of_a_sure_segmentation_is_zero():
    p = random_problem(1, 1, 1, 1, dtype=torch.float32).replace(transition=torch.full((1, 1), 1e3))
    table = SegmentTable(*(torch.tensor([x]) for x in (0, 0, 1, 0)))
    assert abs(float(SemiCRFDistribution(p).log_prob(table))) <= 1e-12


def test_cumulative_scores_are_differenced_in_float64_and_stay_so():
    steps = torch.tensor([1e6, 1.2345678, -1e6, 0.7654321])
    cum_scores = torch.nn.functional.pad(steps.cumsum(0), (1, 0))[None, :, None]
    transition, bias = torch.full((1, 1), 0.1), torch.full((1, 1), 0.3)
    given = (transition, bias, torch.tensor([4]), 1)
    exact = semi_crf_streaming_forward(cum_scores.double(), *given)
    found = semi_crf_streaming_forward(cum_scores, *given)
    assert found.dtype == torch.float32
    assert_close(found, exact, torch.float32)
    block = compute_edge_block_streaming(cum_scores, transition, bias, 1, 1)
    wide = compute_edge_block_streaming(cum_scores.double(), transition, bias, 1, 1)
    assert block.dtype == torch.float32
    assert_close(block, wide, torch.float32)

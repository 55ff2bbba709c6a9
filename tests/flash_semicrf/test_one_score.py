"""One score of a segmentation: decoding maximises what log Z sums, the first segment included."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import SemiCRFDistribution, SemiMarkovCRFHead, log_partition, n_best, viterbi
from flash_semicrf.compat import (
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.exact.inference import viterbi_table as exact_viterbi_table
from flash_semicrf.problem.segments import table_to_segments
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS

OPTIONS = ({}, {"by_duration": True}, {"tail": True}, {"boundary": True})


def drawn(seed):
    """A problem without initial scores, of another kind for every seed."""
    return random_problem(1, 4, 3, 3, ragged=False, seed=seed, **OPTIONS[seed % len(OPTIONS)])


def tuples(segments):
    return tuple((s.start, s.end + 1, s.label) for s in segments)


@pytest.mark.parametrize("count", [80, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("part", range(len(OPTIONS)))
def test_best_segmentations_are_the_most_probable_ones(part, count):
    # `count` problems in all. Where two segmentations tie, as neighbours of one label do, either
    # may come first: their scores are compared.
    for seed in range(part, count, len(OPTIONS)):
        problem = drawn(seed)
        segmentations, scores = enumerate_scores(problem, 0)
        score_of = dict(zip(map(tuple, segmentations), scores.tolist(), strict=True))
        log_p = (scores - log_partition(problem)).sort(descending=True).values
        distribution = SemiCRFDistribution(problem)
        for backend in BACKENDS if seed < 40 else ["numba"]:  # the loop is slow
            result = viterbi(problem, backend)
            assert_close(result.scores[0], scores.max())
            best = tuples(result.segments[0])
            assert score_of[best] == pytest.approx(scores.max().item(), rel=1e-12)
            own = result.scores - log_partition(problem, backend)
            assert_close(own, log_p[:1])
            assert_close(own, distribution.log_prob(result.segments))
            assert_close(sum(s.score for s in result.segments[0]) - scores.max(), 0 * log_p[0])
        found = n_best(problem, 4)
        assert_close(found.scores[0] - log_partition(problem), log_p[:4])
        _, table = exact_viterbi_table(problem, "exact", 1e9)
        (segments,) = table_to_segments(table, 1)
        assert score_of[tuples(segments)] == pytest.approx(scores.max().item(), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_duration", [False, True])
def test_names_of_release_0_2_0_keep_the_maximum(by_duration, backend):
    for seed in range(10):
        p = random_problem(1, 4, 3, 3, by_duration=by_duration, ragged=False, seed=seed)
        free = p.replace(initial_scores=p.transition.amax(-2))
        best = enumerate_scores(free, 0)[1].max()
        cum_scores = torch.nn.functional.pad(p.scores.cumsum(1), (0, 0, 1, 0))
        given = (cum_scores, p.transition, p.duration_bias, p.lengths, 3)
        found = semi_crf_streaming_forward(*given, semiring="max", backend=backend)
        assert_close(found[0], best)
        assert_close(
            found, semi_crf_streaming_viterbi_with_backpointers(*given, backend=backend)[0]
        )


@pytest.mark.parametrize("backend", ["auto", "exact", "binary_tree_sharded"])
def test_decoded_score_has_the_gradient_of_the_log_sum_exp(backend):
    head = SemiMarkovCRFHead(num_classes=3, max_duration=2, init_scale=1.0).double()
    hidden, lengths = torch.randn(1, 1, 3, dtype=torch.float64), torch.tensor([1])
    problem, offset = head.potentials(hidden, lengths)
    score = head.decode(hidden, lengths, backend=backend)
    label = head.decode_with_traceback(hidden, lengths, backend=backend).segments[0][0].label
    assert_close(score - offset, enumerate_scores(problem, 0)[1].max()[None])
    score.sum().backward()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:, label] = head.transition.detach()[:, label].softmax(0)
    assert_close(head.transition.grad, expected)

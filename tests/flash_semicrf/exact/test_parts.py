"""Paths as indicators, their scores, and hidden semi-Markov models against a listed likelihood."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import SemiMarkov
from flash_semicrf.semirings import KMaxSemiring, LogSemiring, MaxSemiring, StdSemiring
from flash_semicrf.testing import assert_close, enumerate_segmentations
from tests.flash_semicrf.edge_paths import path_scores, paths, random_edges


def test_parts_and_sequences_are_inverse():
    sequence = torch.tensor([[1, -1, 0, 0, -1], [0, 2, -1, -1, 2], [2, -1, -1, -1, -1]])
    lengths = torch.tensor([4, 5, 1])
    parts = SemiMarkov.to_parts(sequence, (3, 4), lengths)
    assert parts.shape == (3, 4, 4, 3, 3)
    assert parts.sum((1, 2, 3, 4)).tolist() == [2, 2, 0]
    back, extra = SemiMarkov.from_parts(parts)
    assert extra == (3, 4)
    assert torch.equal(back[:2], sequence[:2])
    assert (back[2] == -1).all()  # no edge tells the label of a single node


def test_a_path_that_stops_early_has_no_edge_after_that():
    sequence = torch.tensor([[1, -1, 0, -1, -1], [0, -1, -1, -1, -1]])
    parts = SemiMarkov.to_parts(sequence, (2, 3))
    assert parts.nonzero().tolist() == [[0, 0, 2, 0, 1]]  # b, n, k, c_dst, c_src
    assert torch.equal(SemiMarkov.from_parts(parts)[0][0], sequence[0])


def test_every_path_has_its_score():
    edges = random_edges(1, 4, 3, 2, 2)
    for path, expected in zip(paths(5, 3, 2), path_scores(edges[0], 5), strict=True):
        parts = torch.zeros_like(edges)
        for edge in path:
            parts[(0, *edge)] = 1
        assert torch.equal(SemiMarkov.to_parts(*SemiMarkov.from_parts(parts)).double(), parts)
        assert_close(SemiMarkov(LogSemiring).score(edges, parts)[0], expected)
        assert_close(SemiMarkov(StdSemiring).score(edges.exp(), parts)[0], expected.exp())


def test_a_path_has_one_score_among_the_k_best_too():
    edges = random_edges(2, 4, 3, 2, 2)
    parts = SemiMarkov.to_parts(torch.tensor([[0, 1, -1, 0, 1], [1, -1, 0, -1, 0]]), (2, 3))
    found = SemiMarkov(KMaxSemiring(3)).score(edges, parts)
    assert_close(found, SemiMarkov(LogSemiring).score(edges, parts))


def test_scores_of_a_ragged_batch_skip_what_is_forbidden_elsewhere():
    edges = torch.full((2, 3, 3, 1, 1), -math.inf)
    edges[0, :, 1] = 1.0
    edges[1, 0, 2] = 5.0
    edges.requires_grad_()
    sequence = torch.tensor([[0, 0, 0, 0], [0, -1, 0, -1]])
    parts = SemiMarkov.to_parts(sequence, (1, 3), torch.tensor([4, 3]))
    score = SemiMarkov(MaxSemiring).score(edges, parts)
    assert score.tolist() == [3.0, 5.0]
    assert torch.equal(torch.autograd.grad(score.sum(), edges)[0], parts.float())


@pytest.mark.parametrize(
    "sequence, message",
    [
        ([[-1, 0, 0]], r"a label at the first node; got -1 at index \(0, 0\)"),
        ([[0, 2, 0]], r"in \[0, C-1=1\] or -1.*got 2 at index \(0, 1\)"),
        ([[0, 0, -1, 0]], r"at most K-1=1 apart; got 2 after index \(0, 1\)"),
    ],
)
def test_sequences_that_are_no_paths_are_refused(sequence, message):
    with pytest.raises(ValueError, match=message):
        SemiMarkov.to_parts(torch.tensor(sequence), (2, 2))


def test_parts_must_be_indicators_of_the_same_shape():
    edges = torch.zeros(1, 2, 2, 1, 1)
    with pytest.raises(ValueError, match=r"shape of `potentials`, \(1, 2, 2, 1, 1\); got"):
        SemiMarkov(LogSemiring).score(edges, edges[:, :1])
    with pytest.raises(ValueError, match="zeros and ones"):
        SemiMarkov(LogSemiring).score(edges, edges + 0.5)


def hsmm(observations, num_labels, num_durations, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    trans_l = draw(num_labels, num_durations)
    trans_l[:, 0] = -math.inf
    return (
        draw(num_labels).log_softmax(0),
        draw(num_labels, num_labels).log_softmax(1),
        trans_l.log_softmax(1),
        draw(2, observations, num_durations, num_labels),
    )


@pytest.mark.parametrize("num_labels, num_durations", [(2, 4), (3, 2), (1, 3), (2, 9)])
def test_hsmm_matches_its_listed_likelihood(num_labels, num_durations):
    count = 5
    init, trans_z, trans_l, emission = hsmm(count, num_labels, num_durations, seed=num_labels)
    edges = SemiMarkov.hsmm(init, trans_z, trans_l, emission)
    assert edges.shape == (2, count, num_durations, num_labels, num_labels)
    actual = SemiMarkov(LogSemiring).sum(edges)
    for b in range(2):
        likelihood = 0.0
        for segments in enumerate_segmentations(count, num_durations - 1, num_labels):
            probability, previous = 1.0, None
            for start, stop, label in segments:
                arrive = init[label] if previous is None else trans_z[previous, label]
                own = trans_l[label, stop - start] + emission[b, start, stop - start, label]
                probability *= math.exp(arrive + own)
                previous = label
            likelihood += probability
        assert_close(actual[b].exp(), torch.tensor(likelihood, dtype=torch.float64))


def test_hsmm_of_normalised_durations_has_probabilities_that_sum_to_one():
    # Observations that always have probability 1: log Z is that of a boundary at the end.
    init, trans_z, _, emission = hsmm(6, 2, 2, seed=0)
    certain = torch.tensor([[-math.inf, 0.0], [-math.inf, 0.0]]).double()
    edges = SemiMarkov.hsmm(init, trans_z, certain, torch.zeros_like(emission))
    assert_close(SemiMarkov(LogSemiring).sum(edges), torch.zeros(2).double())


def test_hsmm_takes_initial_probabilities_of_each_sequence():
    init, trans_z, trans_l, emission = hsmm(5, 3, 3, seed=4)
    each = torch.stack([init, torch.randn(3, dtype=torch.float64).log_softmax(0)])
    edges = SemiMarkov.hsmm(each, trans_z, trans_l, emission)
    for b in range(2):
        alone = SemiMarkov.hsmm(each[b], trans_z, trans_l, emission[b : b + 1])
        assert torch.equal(edges[b : b + 1], alone)


def test_hsmm_with_initial_probabilities_before_a_first_transition():
    # As torch-struct writes it: the first edge has a source, drawn from `init`, as all others have.
    init, trans_z, trans_l, emission = hsmm(4, 2, 3, seed=1)
    edges = (emission + trans_l.T)[..., None] + trans_z.T
    edges[:, 0] += init
    moved = torch.logsumexp(init[:, None] + trans_z, 0)
    ours = SemiMarkov.hsmm(moved, trans_z, trans_l, emission)
    total = SemiMarkov(LogSemiring).sum(ours)
    assert_close(total, SemiMarkov(LogSemiring).sum(edges))
    assert not torch.allclose(
        total, SemiMarkov(LogSemiring).sum(SemiMarkov.hsmm(init, trans_z, trans_l, emission))
    )


def test_hsmm_shapes_are_checked():
    init, trans_z, trans_l, emission = hsmm(4, 2, 3, seed=0)
    for bad in ((init[:1], trans_z), (init, trans_z[:1]), (init.expand(3, 2), trans_z)):
        with pytest.raises(ValueError, match="must fit init"):
            SemiMarkov.hsmm(*bad, trans_l, emission)
    with pytest.raises(ValueError, match="`trans_l` must fit"):
        SemiMarkov.hsmm(init, trans_z, trans_l.T, emission)

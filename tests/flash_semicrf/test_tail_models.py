"""Duration tails in the CRF head, its initial values, and gold runs longer than K."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from flash_semicrf import SemiMarkovCRFHead, UncertaintySemiMarkovCRFHead
from flash_semicrf.duration import GeometricDuration, GeometricTail, create_duration_tail
from flash_semicrf.testing import assert_close, enumerate_scores

LENGTHS = torch.tensor([7, 5])
LABELS = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
SCORES = torch.randn(2, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_head(cls=SemiMarkovCRFHead, **options):
    torch.manual_seed(0)
    options = {"duration_tail": "geometric", **options}
    return cls(num_classes=2, max_duration=2, **options).double()


@pytest.mark.parametrize("backend", ["auto", "reference", "exact", "binary_tree_sharded"])
def test_loss_is_that_of_the_enumeration(backend):
    head = make_head(initial_scores=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = head.compute_loss(SCORES, LENGTHS, LABELS, backend=backend, reduction="none")
    problem, _ = head.potentials(SCORES, LENGTHS)
    for b, gold in enumerate(([(0, 5, 0), (5, 7, 1)], [(0, 3, 1), (3, 5, 0)])):
        segmentations, scores = enumerate_scores(problem, b)
        expected = torch.logsumexp(scores, 0) - scores[segmentations.index(gold)]
        assert_close(loss[b].detach(), expected.detach())


def test_decoding_and_marginals_agree_between_engines():
    head = make_head()
    one, other = (head.decode_with_traceback(SCORES, LENGTHS, backend=b) for b in ("auto", "exact"))
    assert_close(one.scores, other.scores)
    for found, expected in zip(one.segments, other.segments, strict=True):
        assert [(s.start, s.label) for s in found] == [(s.start, s.label) for s in expected]
    one, other = (head.marginals(SCORES, LENGTHS, backend=b) for b in ("auto", "exact"))
    for found, expected in zip(one, other, strict=True):
        assert_close(found, expected)


def test_training_learns_the_rate_of_long_segments():
    head = make_head()
    labels = torch.tensor([[0] * 30 + [1] + [0] * 30 + [1]])
    scores, lengths = torch.zeros(1, 62, 2, dtype=torch.float64), torch.tensor([62])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    first = head.compute_loss(scores, lengths, labels)
    for _ in range(40):
        optimizer.zero_grad()
        loss = head.compute_loss(scores, lengths, labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.6 * first
    rates = head.duration_tail.detach()
    assert rates[0] > rates[1] + 0.5


def test_partial_labels_keep_long_runs():
    head = make_head()
    labels = LABELS.clone()
    labels[0, 6] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = head.compute_loss(SCORES, LENGTHS, labels, ignore_index=-100, reduction="none")
    full = head.compute_loss(SCORES, LENGTHS, LABELS, reduction="none")
    assert 0 < loss[0] < full[0]
    assert_close(loss[1], full[1])


def test_fixed_rates_forbid_where_infinite():
    head = make_head(duration_tail=[-0.5, -math.inf])
    assert not any("tail" in name for name, _ in head.named_parameters())
    with pytest.warns(UserWarning, match="2 gold segments are longer"):
        head.compute_loss(SCORES, torch.tensor([7, 7]), torch.tensor([[0] * 4 + [1] * 3] * 2))
    table = head.decode_with_traceback(SCORES, LENGTHS).segments
    assert all(s.duration <= 2 for segments in table for s in segments if s.label == 1)


def test_geometric_durations_go_on_at_their_own_rate():
    values = []
    for longest in (1, 3, 7):
        torch.manual_seed(0)
        head = SemiMarkovCRFHead(
            2, longest, duration_distribution="geometric", duration_tail="geometric"
        ).double()
        assert head.tail is None
        problem, _ = head.potentials(SCORES, LENGTHS)
        # The families are normalised over 1..K: compared with the score of one position at 0.
        bias = problem.duration_bias - problem.duration_bias[:1]
        assert_close(problem.duration_tail, torch.nn.functional.logsigmoid(torch.ones(2).double()))
        values.append(problem.replace(duration_bias=bias))
    first, *others = [torch.logsumexp(enumerate_scores(p, 0)[1], 0).detach() for p in values]
    for other in others:
        assert_close(other, first)
    head.compute_loss(SCORES, LENGTHS, LABELS).backward()
    assert head.duration_distribution.logit.grad.abs().sum() > 0


def test_uncertainty_head_takes_a_tail():
    head = make_head(UncertaintySemiMarkovCRFHead)
    problem, _ = head.potentials(SCORES, LENGTHS)
    log_p = torch.log_softmax(enumerate_scores(problem, 0)[1], 0)
    found = head.compute_entropy_streaming(SCORES, LENGTHS)[0]
    assert_close(found.detach(), -(log_p.exp() * log_p).sum().detach())
    loss = head.compute_loss_uncertainty_weighted(SCORES, LENGTHS, LABELS)
    assert loss > head.compute_loss(SCORES, LENGTHS, LABELS)


def test_state_dict_holds_a_learnt_rate():
    head = make_head()
    with torch.no_grad():
        head.tail.log_rate.fill_(-0.25)
    other = make_head()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.duration_tail, head.duration_tail)


def test_initial_rates():
    bias = torch.tensor([[0.0, 0.0, 0.0], [-0.7, 0.5, -math.inf]])
    assert_close(GeometricTail.from_scores(bias)().detach(), torch.tensor([-0.7, -0.5, -0.5]))
    assert_close(GeometricTail.from_scores(bias[:1])().detach(), torch.full((3,), -1.0))
    durations, labels = torch.tensor([1, 2, 12, 22, 3]), torch.tensor([0, 0, 0, 0, 1])
    fitted = GeometricTail.from_segments(durations, labels, 2, 2, learnable=False)()
    # Label 0: three of 2 or more, and one imagined; 30 + 2 positions went on.
    assert_close(fitted, torch.tensor([32 / 36, 3 / 5]).log())


def test_tail_arguments_are_checked():
    durations = GeometricDuration(3, 2)
    with pytest.raises(ValueError, match='`duration_tail` must be None, "geometric" or rates'):
        create_duration_tail("linear", durations)
    with pytest.raises(
        ValueError, match=r"`duration_tail` must be a number or have shape \(C=2,\)"
    ):
        create_duration_tail([0.0, 0.0, 0.0], durations)
    with pytest.raises(ValueError, match="`duration_tail` must be finite"):
        create_duration_tail(math.nan, durations)
    with pytest.raises(ValueError, match="must have num_classes=2; got 3"):
        create_duration_tail(GeometricTail(3), durations)

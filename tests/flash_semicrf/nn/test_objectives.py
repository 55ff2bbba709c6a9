"""Losses against their definitions, written out over the list of all segmentations."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import Constraints, SemiMarkovCRFHead, log_partition, viterbi
from flash_semicrf.nn.objectives import LOSSES, boundary_loss, marginal_loss, softmax_margin_loss
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, gradients_of, message_of, with_gradients

KINDS = {
    "usual": {},
    "boundary": {"boundary": True, "ends": True},
    "by duration": {"by_duration": True},
    "tail": {"tail": True},
    "forbidden": {"forbid": 0.1},
}

parametrize = pytest.mark.parametrize(
    "kind, backend", [(kind, backend) for kind in KINDS for backend in BACKENDS]
)


def drawn(kind):
    """A problem, segmentations with some probability, and weights of positions."""
    problem = random_problem(2, 5, 3, 3, seed=7, **KINDS[kind])
    gold = segments_to_table(viterbi(problem.replace(scores=0 * problem.scores)).segments)
    weight = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    return problem, gold, weight


def listed(problem, b):
    """Probabilities (N,), labels (N, T) and starts (N, T), -1 for none, of all segmentations."""
    segmentations, scores = enumerate_scores(problem, b)
    labels = torch.tensor([[c for s, t, c in y for _ in range(t - s)] for y in segmentations])
    starts = torch.full_like(labels, -1)
    for row, y in zip(starts, segmentations, strict=True):
        for s, _, c in y:
            row[s] = c
    return scores.softmax(0), labels, starts


def rows_of(table, b):
    """Labels and starts of a segmentation, of the lengths that they cover."""
    own = [row[1:] for row in zip(*(x.tolist() for x in table), strict=True) if row[0] == b]
    labels = torch.tensor([c for s, t, c in own for _ in range(t - s)])
    starts = torch.full_like(labels, -1)
    for s, _, c in own:
        starts[s] = c
    return labels, starts


def by_definition(problem, gold, weight, of_starts, focus):
    """The loss of each sequence, by the probabilities of what agrees with the truth."""
    losses = []
    for b in range(problem.batch_size):
        p, labels, starts = listed(problem, b)
        true_labels, true_starts = rows_of(gold, b)
        agrees = starts == true_starts if of_starts else labels == true_labels
        right = (p[:, None] * agrees).sum(0)
        terms = -right.log() * (1 - right).clamp(min=0) ** focus
        losses.append((terms * weight[b, : len(terms)]).sum())
    return torch.stack(losses)


def compare(problem, loss, wanted):
    """Losses and their gradients, both as functions of a problem."""
    ours, theirs = with_gradients(problem), with_gradients(problem)
    found, expected = loss(ours), wanted(theirs)
    assert_close(found, expected)
    expected = gradients_of(expected.sum(), theirs)
    for name, gradient in gradients_of(found.sum(), ours).items():
        torch.testing.assert_close(gradient, expected[name].nan_to_num(0.0), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("focus", [0.0, 2.0])
@parametrize
def test_marginal_loss(kind, backend, focus):
    problem, gold, weight = drawn(kind)
    compare(
        problem,
        lambda p: marginal_loss(p, gold, weight, focus=focus, backend=backend),
        lambda p: by_definition(p, gold, weight, False, focus),
    )


@parametrize
def test_boundary_loss(kind, backend):
    problem, gold, weight = drawn(kind)
    compare(
        problem,
        lambda p: boundary_loss(p, gold, weight, backend=backend),
        lambda p: by_definition(p, gold, weight, True, 0.0),
    )


@parametrize
def test_softmax_margin_loss(kind, backend):
    problem, gold, weight = drawn(kind)
    cost = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def wanted(p):
        losses = []
        for b in range(p.batch_size):
            _, labels, _ = listed(p, b)
            true, _ = rows_of(gold, b)
            costs = cost[true, labels] * (labels != true)
            augmented = enumerate_scores(p, b)[1] + (costs * weight[b, : len(true)]).sum(1)
            losses.append(augmented.logsumexp(0))
        return torch.stack(losses) - score_segments(p, gold)

    compare(problem, lambda p: softmax_margin_loss(p, gold, cost, weight, backend=backend), wanted)


def test_without_costs_it_is_the_likelihood():
    problem, gold, _ = drawn("usual")
    expected = log_partition(problem) - score_segments(problem, gold)
    assert_close(softmax_margin_loss(problem, gold, 0.0), expected)


def test_labels_of_no_probability_have_a_finite_loss_and_gradient():
    # The truth has a probability of some 1e-22, which no running sum holds.
    scores = torch.zeros(1, 6, 2)
    scores[:, :, 1] = -50.0
    scores.requires_grad_()
    problem = random_problem(1, 6, 3, 2, scale=0.1, ragged=False).replace(scores=scores)
    gold = problem.lengths.new_tensor
    table = segments_to_table([[]])._make([gold([0, 0]), gold([0, 3]), gold([3, 6]), gold([1, 1])])
    loss = marginal_loss(problem, table).sum()
    loss.backward()
    assert 6 * 20 < loss.item() < 6 * 60
    assert bool(torch.isfinite(scores.grad).all())


def head_and_batch():
    torch.manual_seed(0)
    head = SemiMarkovCRFHead(3, 4, hidden_dim=5, boundary_scores=True).double()
    hidden, lengths = torch.randn(2, 9, 5, dtype=torch.float64), torch.tensor([9, 6])
    labels = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0, 9, 9, 9]])
    return head, hidden, lengths, labels


@pytest.mark.parametrize("loss", LOSSES)
def test_the_head_computes_every_loss(loss):
    head, hidden, lengths, labels = head_and_batch()
    each = head.compute_loss(hidden, lengths, labels, reduction="none", loss=loss)
    assert each.shape == (2,) and bool((each > 0).all())
    by_default = SemiMarkovCRFHead(3, 4, hidden_dim=5, boundary_scores=True, loss=loss).double()
    by_default.load_state_dict(head.state_dict())
    assert_close(by_default.compute_loss(hidden, lengths, labels), each.mean())
    each.sum().backward()
    for name, parameter in head.named_parameters():
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_positions_without_weight_teach_nothing(loss):
    head, hidden, lengths, labels = head_and_batch()
    none = torch.zeros(labels.shape)
    found = head.compute_loss(hidden, lengths, labels, loss=loss, weight=none)
    if loss == "softmax_margin":  # costs nothing: it is the likelihood
        assert_close(found, head.compute_loss(hidden, lengths, labels))
    else:
        assert float(found) == 0.0
    one = none.index_fill(1, torch.tensor([0]), 1.0)
    assert float(head.compute_loss(hidden, lengths, labels, loss=loss, weight=one)) > 0


@pytest.mark.parametrize("loss", ["marginal", "boundary", "softmax_margin"])
def test_gradient_descent_lowers_every_loss_and_finds_the_labels(loss):
    head, hidden, lengths, labels = head_and_batch()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    first = None
    for _ in range(400):
        optimizer.zero_grad()
        value = head.compute_loss(hidden, lengths, labels, loss=loss)
        first = value if first is None else first
        value.backward()
        optimizer.step()
    assert bool(value < 0.2 * first)
    found = head.marginals(hidden, lengths).position.argmax(-1)
    assert bool((found[0] == labels[0]).all()) and bool((found[1, :6] == labels[1, :6]).all())


def test_what_losses_refuse():
    head, hidden, lengths, labels = head_and_batch()

    def message(kind, **options):
        return message_of(kind, head.compute_loss, hidden, lengths, labels, **options)

    assert "`loss` must be one of" in message(ValueError, loss="hinge")
    weight = torch.ones(labels.shape)
    assert "`weight` weighs positions" in message(ValueError, weight=weight)
    assert "`weight` must have shape (2, 9)" in message(
        ValueError, weight=weight[:1], loss="marginal"
    )
    assert "`weight` must be finite" in message(ValueError, weight=-weight, loss="boundary")
    assert "`cost` must be a number or have shape (3, 3)" in message(
        ValueError, loss="softmax_margin", cost=torch.ones(2, 3)
    )
    assert "`cost` must be finite" in message(ValueError, loss="softmax_margin", cost=-1.0)
    assert "`focus` must be finite and >= 0" in message(ValueError, loss="focal", focus=-1.0)
    facts = Constraints.from_labels(labels, lengths, 4)
    text = message_of(TypeError, head.compute_loss, hidden, lengths, facts, loss="marginal")
    assert "got Constraints" in text

"""The uncertainty head: its probabilities, entropies and weighted loss."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import SemiMarkovCRFHead, UncertaintySemiMarkovCRFHead
from flash_semicrf.inference.information import entropy
from flash_semicrf.testing import assert_close, enumerate_scores

LENGTHS = torch.tensor([6, 1, 4])
LABELS = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 0, 0, 0, 0, 0], [2, 1, 1, 0, 0, 0]])


def make_head(**options):
    torch.manual_seed(1)
    head = UncertaintySemiMarkovCRFHead(3, 3, 5, init_scale=1.0, **options).double()
    return head, torch.randn(3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"boundary_scores": True, "initial_scores": True}])
def test_boundaries_positions_and_entropy_are_those_of_the_enumeration(options):
    head, hidden = make_head(**options)
    boundary = head.compute_boundary_marginals(hidden, LENGTHS)
    log_weight = head.compute_boundary_marginals(hidden, LENGTHS, normalize=False)
    position = head.compute_position_marginals(hidden, LENGTHS)
    own_entropy = head.compute_entropy_streaming(hidden, LENGTHS)
    problem, offset = head.potentials(hidden, LENGTHS)
    for b in range(3):
        segmentations, scores = enumerate_scores(problem, b)
        probability = torch.softmax(scores, 0)
        expected = torch.zeros(6, dtype=torch.float64)
        labels = torch.zeros(6, 3, dtype=torch.float64)
        for segmentation, p in zip(segmentations, probability.tolist(), strict=True):
            for start, stop, label in segmentation:
                expected[start] += p
                labels[start:stop, label] += p
        assert_close(boundary[b], expected)
        assert_close(position[b], labels)
        entropies = -(probability * torch.log_softmax(scores, 0)).sum()
        assert_close(own_entropy[b], entropies)
        length = int(LENGTHS[b])
        log_z = torch.logsumexp(scores, 0) + offset[b]
        assert_close(log_weight[b, :length], expected[:length].log() + log_z)
        assert bool((log_weight[b, length:] == -math.inf).all())
    assert not boundary.requires_grad and not position.requires_grad
    assert_close(head.compute_entropy_exact(hidden, LENGTHS), own_entropy)


@pytest.mark.parametrize("backend", ["reference", "streaming", "exact", "binary_tree_sharded"])
def test_every_backend_gives_the_same_numbers(backend):
    head, hidden = make_head()
    own = head.compute_entropy_exact(hidden, LENGTHS, backend)
    assert_close(own, head.compute_entropy_streaming(hidden, LENGTHS))
    boundary = head.compute_boundary_marginals(hidden, LENGTHS, backend)
    assert_close(boundary, head.compute_boundary_marginals(hidden, LENGTHS))


def test_edge_tensors_that_are_too_large_are_refused():
    head, hidden = make_head(edge_memory_threshold=100.0)
    with pytest.raises(ValueError, match="edge"):
        head.compute_entropy_exact(hidden, LENGTHS, "exact")


def test_entropy_trains_the_encoder_and_the_head():
    head, hidden = make_head()
    hidden.requires_grad_()
    head.compute_entropy_streaming(hidden, LENGTHS).sum().backward()
    problem = head.potentials(hidden.detach(), LENGTHS)[0]
    expected = torch.autograd.grad(entropy(problem, "reference").sum(), list(head.parameters()))
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)
    assert bool((hidden.grad[0] != 0).any()) and bool((hidden.grad[1, 1:] == 0).all())


@pytest.mark.parametrize("focus_mode", ["high_uncertainty", "boundary_regions"])
def test_loss_is_weighted_by_the_uncertainty_of_each_sequence(focus_mode):
    head, hidden = make_head()
    position = head.compute_position_marginals(hidden, LENGTHS)
    boundary = head.compute_boundary_marginals(hidden, LENGTHS)
    uncertainty = []
    for b, length in enumerate(LENGTHS.tolist()):
        if focus_mode == "high_uncertainty":
            value = torch.special.entr(position[b, :length]).sum() / length / math.log(3)
        else:
            chance = boundary[b, 1:length]
            both = torch.special.entr(chance) + torch.special.entr(1 - chance)
            value = both.sum() / max(1, length - 1) / math.log(2)
        uncertainty.append(value)
    uncertainty = torch.stack(uncertainty)
    assert bool(((uncertainty >= 0) & (uncertainty <= 1)).all())
    plain = head.compute_loss(hidden, LENGTHS, LABELS, reduction="none")
    expected = (1 + 2.5 * uncertainty) * plain

    def loss(reduction):
        return head.compute_loss_uncertainty_weighted(
            hidden, LENGTHS, LABELS, 2.5, focus_mode, reduction=reduction
        )

    assert_close(loss("none"), expected)
    assert_close(loss("sum"), expected.sum())
    assert_close(loss("mean"), expected.mean())
    # The weights are constants: the gradient is the weighted sum of the plain ones.
    found = torch.autograd.grad(loss("sum"), list(head.parameters()))
    weights = (1 + 2.5 * uncertainty).detach()
    theirs = torch.autograd.grad((weights * plain).sum(), list(head.parameters()))
    for own, other in zip(found, theirs, strict=True):
        assert_close(own, other)


def test_without_weight_it_is_the_loss_of_the_plain_head():
    head, hidden = make_head()
    plain = SemiMarkovCRFHead(3, 3, 5).double()
    plain.load_state_dict(head.state_dict())
    found = head.compute_loss_uncertainty_weighted(hidden, LENGTHS, LABELS, 0.0)
    assert_close(found, plain.compute_loss(hidden, LENGTHS, LABELS))


def test_one_label_is_certain():
    head = UncertaintySemiMarkovCRFHead(1, 3).double()
    scores, lengths = torch.zeros(1, 5, 1, dtype=torch.float64), torch.tensor([5])
    labels = torch.zeros(1, 5).long()
    with pytest.warns(UserWarning, match="were split"):
        weighted = head.compute_loss_uncertainty_weighted(scores, lengths, labels)
    with pytest.warns(UserWarning, match="were split"):
        assert_close(weighted, head.compute_loss(scores, lengths, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertainty_weight": -1.0}, "`uncertainty_weight` must be finite and >= 0; got -1.0"),
        ({"focus_mode": "other"}, "`focus_mode` must be one of 'high_uncertainty'"),
        ({"reduction": "max"}, "`reduction` must be one of"),
    ],
)
def test_unknown_options_are_refused(options, message):
    head, hidden = make_head()
    with pytest.raises(ValueError, match=message):
        head.compute_loss_uncertainty_weighted(hidden, LENGTHS, LABELS, **options)


def test_autocast_changes_nothing():
    head, hidden = make_head()
    head, hidden = head.float(), hidden.float()
    expected = head.compute_entropy_streaming(hidden, LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.compute_entropy_streaming(hidden, LENGTHS), expected)

"""The head where nothing is read: `validate="shapes"`."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import labels_to_table

OPTIONS = {
    "plain": {},
    "projected": {"hidden_dim": 5, "boundary_scores": True, "initial_scores": True},
    "masks": {"min_duration": [1, 2, 1], "final_scores": True},
    "tail": {"duration_tail": "geometric"},
    "by sequence": {"centering": "sequence"},
}


def head_and_batch(options: dict) -> tuple:
    """A head, hidden states, lengths and labels whose runs last two positions and more."""
    head = SemiMarkovCRFHead(3, 4, validate="shapes", **options).double()
    hidden = torch.randn(3, 12, options.get("hidden_dim", 3), dtype=torch.float64)
    labels = torch.randint(1, 3, (3, 4)).cumsum(1).remainder(3).repeat_interleave(3, 1)
    return head, hidden, torch.tensor([12, 9, 6]), labels


def results(head: SemiMarkovCRFHead, validate: str, *batch: torch.Tensor) -> list[torch.Tensor]:
    """Loss of each sequence and the gradients."""
    head.validate = validate
    head.zero_grad()
    hidden = batch[0].clone().requires_grad_()
    loss = head.compute_loss(hidden, *batch[1:], reduction="none")
    loss.sum().backward()
    return [loss.detach(), hidden.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("kind", OPTIONS)
def test_results_are_those_of_checked_values(kind):
    head, *batch = head_and_batch(OPTIONS[kind])
    batch[0][1, 9:] = math.nan
    for found, expected in zip(
        results(head, "shapes", *batch), results(head, "values", *batch), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    hidden, lengths, _ = batch
    found = head(hidden, lengths)["partition"]
    best = head.decode_with_traceback(hidden, lengths)
    head.validate = "shapes"
    torch.testing.assert_close(head(hidden, lengths)["partition"], found)
    assert head.decode_with_traceback(hidden, lengths).segments == best.segments


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["plain", "projected", "by sequence"])
def test_a_bad_hidden_state_makes_its_sequence_nan(kind, value):
    head, hidden, lengths, labels = head_and_batch(OPTIONS[kind])
    good = results(head, "shapes", hidden, lengths, labels)[0]
    hidden[1, 8, 0] = value
    loss, gradient, *_ = results(head, "shapes", hidden, lengths, labels)
    assert loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(loss[[0, 2]], good[[0, 2]])
    assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()
    assert head.transition.grad.isnan().all()
    assert head(hidden, lengths)["partition"].isnan().tolist() == [False, True, False]
    assert head.decode(hidden, lengths).isnan().tolist() == [False, True, False]
    result = head.decode_with_traceback(hidden, lengths)
    assert result.scores.isnan().tolist() == [False, True, False]
    assert [len(segments) > 0 for segments in result.segments] == [True, False, True]
    assert head.marginals(hidden, lengths).start.isnan().flatten(1).all(1).tolist() == [
        False,
        True,
        False,
    ]
    head.validate = "auto"
    with pytest.raises(ValueError, match=r"`hidden_states` must be .* at index \(1, 8, 0\)"):
        head.compute_loss(hidden, lengths, labels)


def test_bad_labels_make_the_loss_nan():
    head, hidden, lengths, labels = head_and_batch({})
    labels[1, 3] = 3
    loss, gradient, *_ = results(head, "shapes", hidden, lengths, labels)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()
    head.validate = "values"
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, C-1=2\]; got 3"):
        head.compute_loss(hidden, lengths, labels)


def test_a_forbidden_segmentation_has_an_infinite_loss():
    head, hidden, lengths, labels = head_and_batch({"min_duration": 2})
    labels[1, 3] = (labels[1, 3] + 1) % 3  # a run of two, and one of one before it
    labels[1, 4] = (labels[1, 3] + 1) % 3
    loss = results(head, "shapes", hidden, lengths, labels)[0]
    assert loss.tolist()[1] == math.inf and loss[[0, 2]].isfinite().all()
    assert head.transition.grad.isnan().all()
    head.zero_grad()
    loss = head.compute_loss(hidden, lengths, labels, reduction="none")
    torch.where(loss.isfinite(), loss, 0.0).sum().backward()  # without the sequence
    assert head.transition.grad.isfinite().all()


def test_long_segments_are_split_in_silence_or_make_the_loss_nan():
    head, hidden, lengths, labels = head_and_batch({})
    labels[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = head.compute_loss(hidden, lengths, labels, reduction="none")
    assert loss.isfinite().all()
    head.long_segments = "error"
    loss = head.compute_loss(hidden, lengths, labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


def test_tables_partly_unknown_labels_and_edge_tensors_are_read():
    head, hidden, lengths, labels = head_and_batch({})
    table = labels_to_table(labels, lengths)
    expected = head.compute_loss(hidden, lengths, labels)
    torch.testing.assert_close(head.compute_loss(hidden, lengths, table), expected)
    unknown = labels.clone()
    unknown[0, 3] = -1
    assert head.compute_loss(hidden, lengths, unknown, ignore_index=-1) < expected
    exact = head.compute_loss(hidden, lengths, labels, backend="exact")
    torch.testing.assert_close(exact, expected)
    labels[0, 0] = 7
    with pytest.raises(ValueError, match="got 7"):
        head.compute_loss(hidden, lengths, labels, backend="exact")
    with pytest.raises(ValueError, match="got 7"):
        head.compute_loss(hidden, lengths, labels, ignore_index=-1)


def test_unknown_kinds_of_validation_are_refused():
    with pytest.raises(ValueError, match="`validate` must be one of"):
        SemiMarkovCRFHead(3, 4, validate="none")

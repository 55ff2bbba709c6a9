"""The loss of partly labelled sequences: a likelihood of everything that agrees."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from flash_semicrf import Constraints, SemiMarkovCRFHead, log_partition
from flash_semicrf.inference.partial import partial_score
from flash_semicrf.problem.segments import Segment, segments_to_table, table_to_labels
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, gradients_of, with_gradients

B, T, K, C, D = 4, 6, 3, 2, 4
LENGTHS = torch.tensor([6, 5, 1, 3])
RUNS = [0, 1, 1, 0, 0, 0]
NO_REPEAT = torch.tensor([[False, True], [True, False]])
OPTIONS = {
    "plain": {},
    "scores in": {"hidden_dim": None},
    "sequence centring": {"centering": "sequence"},
    "everything": {
        "initial_scores": True,
        "final_scores": True,
        "boundary_scores": True,
        "min_duration": [1, 2],
        "transition_constraints": NO_REPEAT,
    },
    "one duration": {"max_duration": 1},
    "K > T": {"max_duration": 9},
    "one label": {"num_classes": 1},
}
UNKNOWN = -100


def make_head(**options):
    """Draw every parameter of a head, those that start at zero too."""
    torch.manual_seed(1)
    head = SemiMarkovCRFHead(**{"num_classes": C, "max_duration": K, "hidden_dim": D, **options})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head.double()


def make_hidden(head, batch_size=B, num_positions=T):
    torch.manual_seed(2)
    channels = head.hidden_dim or head.num_classes
    return torch.randn(batch_size, num_positions, channels, dtype=torch.float64)


def make_labels():
    return torch.tensor(RUNS).repeat(B, 1)


def gradients(loss, head, hidden):
    found = torch.autograd.grad(
        loss, [hidden, *head.parameters()], allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("name", OPTIONS)
def test_labels_that_are_all_known_give_the_ordinary_loss(name):
    head = make_head(**OPTIONS[name])
    hidden = make_hidden(head).requires_grad_()
    labels, lengths = make_labels(), LENGTHS
    if name == "one duration":
        labels = torch.arange(T).remainder(C).repeat(B, 1)
    if name == "one label":
        labels, lengths = torch.zeros_like(labels), LENGTHS.clamp(max=K)
    expected = head.compute_loss(hidden, lengths, labels, reduction="none")
    marked = torch.where(torch.arange(T) < lengths[:, None], labels, UNKNOWN)
    actual = head.compute_loss(hidden, lengths, marked, reduction="none", ignore_index=UNKNOWN)
    assert_close(actual, expected)
    # The same through the constraints, which leave just that segmentation.
    known = Constraints.from_labels(labels, lengths, head.max_duration)
    constrained = head.compute_loss(hidden, lengths, known, reduction="none")
    assert_close(constrained, expected)
    assert_close(
        gradients(constrained.sum(), head, hidden), gradients(expected.sum(), head, hidden)
    )


def test_other_sequences_of_a_batch_change_nothing():
    head = make_head()
    hidden = make_hidden(head)
    labels = make_labels()
    lengths = LENGTHS.index_fill(0, torch.tensor([3]), 5)
    labels[3] = 0  # longer than K: split, partly known sequences beside it or not
    labels[0, 2:4] = UNKNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = head.compute_loss(
            hidden, lengths, labels, reduction="none", ignore_index=UNKNOWN
        )
        for b in range(B):
            one = slice(b, b + 1)
            alone = head.compute_loss(hidden[one], lengths[one], labels[one], ignore_index=UNKNOWN)
            assert_close(together[b], alone)
        ordinary = head.compute_loss(hidden[1:], lengths[1:], labels[1:], reduction="none")
        assert_close(together[1:], ordinary)


def test_nothing_known_costs_nothing():
    head = make_head(boundary_scores=True)
    hidden = make_hidden(head).requires_grad_()
    unknown = torch.full((B, T), UNKNOWN)
    loss = head.compute_loss(hidden, LENGTHS, unknown, reduction="none", ignore_index=UNKNOWN)
    assert (loss == 0).all()
    assert (gradients(loss.sum(), head, hidden) == 0).all()
    assert (head.compute_loss(hidden, LENGTHS, Constraints()) == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction_is_over_sequences(reduction):
    head = make_head()
    hidden, labels = make_hidden(head), make_labels()
    labels[:, 1] = UNKNOWN
    labels[2, 0] = UNKNOWN
    each = head.compute_loss(hidden, LENGTHS, labels, reduction="none", ignore_index=UNKNOWN)
    assert each.shape == (B,) and each[2] == 0 and (each[[0, 1, 3]] > 0).all()
    found = head.compute_loss(hidden, LENGTHS, labels, reduction=reduction, ignore_index=UNKNOWN)
    assert_close(found, {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction])


@pytest.mark.parametrize("name", ["plain", "everything", "one duration", "K > T"])
@pytest.mark.parametrize("known", [(0, 2), (1,), (3, 5), (0, 1, 2)])
def test_probabilities_of_disjoint_labels_sum_to_one(known, name):
    """Over all labels of the known positions, where equal neighbours must be one segment."""
    options = {**OPTIONS[name], "transition_constraints": NO_REPEAT}
    head = make_head(**options)
    hidden = make_hidden(head, 1)
    total = 0.0
    for values in itertools.product(range(C), repeat=len(known)):
        labels = torch.full((1, T), UNKNOWN)
        labels[0, list(known)] = torch.tensor(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # with K = 1, runs are longer
                loss = head.compute_loss(hidden, torch.tensor([T]), labels, ignore_index=UNKNOWN)
        except ValueError as error:
            assert "none does in sequences [0]" in str(error)
            continue
        total += math.exp(-loss.item())
    assert abs(total - 1) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_constraints_are_a_likelihood(backend):
    """Of which of the three middle positions start a segment."""
    head = make_head(boundary_scores=True, max_duration=4)
    hidden = make_hidden(head, 8)
    masks = torch.zeros(8, T, dtype=torch.bool)
    masks[:, 2:5] = torch.tensor(list(itertools.product([False, True], repeat=3)))
    others = ~masks
    others[:, :2] = others[:, 5:] = False
    known = Constraints(boundaries=masks, forbidden_boundaries=others)
    lengths = torch.full((8,), T)
    with record_backends() as ran:
        loss = head.compute_loss(
            hidden[:1].expand(8, -1, -1), lengths, known, reduction="none", backend=backend
        )
    assert set(ran) == {backend}
    assert_close(loss.neg().exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_score_matches_enumeration(backend):
    problem = random_problem(4, 5, 3, 3, by_duration=True, boundary=True, ends=True)
    problem = problem.replace(lengths=torch.tensor([5, 4, 5, 1]))
    labels = torch.tensor([[9, 0, 9, 9, 2], [1, 9, 1, 2, 0], [0, 0, 1, 1, 1], [9, 0, 0, 0, 0]])
    problem = with_gradients(problem)
    score = partial_score(problem, labels, 9, backend=backend)
    expected = []
    for b, length in enumerate(problem.lengths.tolist()):
        segmentations, scores = enumerate_scores(problem, b)
        table = segments_to_table([[Segment(s, t - 1, c) for s, t, c in y] for y in segmentations])
        shown = table_to_labels(table, len(segmentations), length)
        row = labels[b, :length]
        keep = ((shown == row) | (row == 9)).all(1)
        # Known neighbours with one label are one segment.
        for t in ((row[1:] == row[:-1]) & (row[1:] != 9)).nonzero()[:, 0].tolist():
            cut = torch.zeros(len(segmentations), dtype=torch.bool)
            cut[table.sequence[table.start == t + 1]] = True
            keep &= ~cut
        expected.append(scores[keep].logsumexp(0))
    expected = torch.stack(expected)
    assert_close(score, expected)
    wanted = gradients_of(expected.sum(), problem)
    for name, gradient in gradients_of(score.sum(), problem).items():
        assert_close(gradient, wanted[name])


@pytest.mark.parametrize("by_duration", [False, True])
def test_partial_loss_passes_gradcheck(by_duration):
    problem = random_problem(2, 4, 2, 2, by_duration=by_duration, boundary=True, ragged=False)
    names = list(problem.parameters())
    labels = torch.tensor([[0, UNKNOWN, 1, UNKNOWN], [UNKNOWN, 1, 1, 0]])
    richer = Constraints(boundaries=[[2], [1, 3]], forbidden_spans=[[(1, 2, 0)], []])

    def loss(*values):
        p = problem.replace(**dict(zip(names, values, strict=True)))
        log_z = log_partition(p)
        return 2 * log_z - partial_score(p, labels, UNKNOWN) - partial_score(p, richer)

    leaves = [value.clone().requires_grad_() for value in problem.parameters().values()]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("with_unknown", [False, True])
def test_long_runs_of_known_labels(with_unknown):
    head = make_head()
    hidden = make_hidden(head, 1)
    labels = torch.zeros(1, T, dtype=torch.long)
    if with_unknown:
        labels[0, -1] = UNKNOWN
    arguments = hidden, torch.tensor([T]), labels
    with pytest.warns(UserWarning, match="longer than max_duration=3"):
        loss = head.compute_loss(*arguments, ignore_index=UNKNOWN)
    if with_unknown:
        assert_close(loss, head.compute_loss(*arguments[:2], Constraints(labels=labels)))
    strict = make_head(long_segments="error")
    with pytest.raises(ValueError, match="longer than `max_duration`=3: sequence 0"):
        strict.compute_loss(*arguments, ignore_index=UNKNOWN)


def test_an_empty_set_names_its_sequences():
    head = make_head(transition_constraints=NO_REPEAT, min_duration={1: 3})
    hidden = make_hidden(head, 2)
    lengths = torch.tensor([6, 6])
    labels = torch.full((2, T), UNKNOWN)
    labels[1, :4] = torch.tensor([0, 1, 1, 0])
    message = r"`labels` must agree .* none does in sequences \[1\]"
    with pytest.raises(ValueError, match=message):
        head.compute_loss(hidden, lengths, labels, ignore_index=UNKNOWN)
    with pytest.raises(ValueError, match=message):
        head.compute_loss(hidden, lengths, Constraints(labels=labels))
    labels[1, 4:] = 0
    with pytest.raises(ValueError, match="in sequence 1 the segment at positions 1..2"):
        head.compute_loss(hidden, lengths, labels, ignore_index=UNKNOWN)


def test_bad_labels_are_named():
    head = make_head()
    hidden, labels = make_hidden(head), make_labels()
    labels[0, 3] = UNKNOWN
    with pytest.raises(ValueError, match=r"must be in \[0, C-1=1\]; got -100 at index \(0, 3\)"):
        head.compute_loss(hidden, LENGTHS, labels)
    with pytest.raises(ValueError, match=r"must be in \[0, C-1=1\]; got -100 at index \(0, 3\)"):
        head.compute_loss(hidden, LENGTHS, labels, ignore_index=-1)
    with pytest.raises(TypeError, match="`labels` must have an integer dtype; got torch.float64"):
        head.compute_loss(hidden, LENGTHS, labels.double(), ignore_index=UNKNOWN)


def test_a_table_of_segments_has_nothing_to_ignore():
    head = make_head()
    hidden = make_hidden(head, 1, 3)
    table = segments_to_table([[Segment(0, 0, 1), Segment(1, 2, 1)]])
    lengths = torch.tensor([3])
    expected = head.compute_loss(hidden, lengths, table)
    assert_close(head.compute_loss(hidden, lengths, table, ignore_index=UNKNOWN), expected)


# Training


def trained(hidden, lengths, labels, steps=60):
    torch.manual_seed(0)
    head = SemiMarkovCRFHead(num_classes=3, max_duration=6, hidden_dim=3).double()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = head.compute_loss(hidden, lengths, labels, ignore_index=UNKNOWN)
        (loss + 0.01 * head.parameter_penalty()).backward()
        optimizer.step()
    return head


def draw_runs(count, num_positions):
    """Labels 0, 1, 2 in turn for 2 to 6 positions each, and noisy features of them."""
    rows = []
    for _ in range(count):
        durations = torch.randint(2, 7, (num_positions,))
        rows.append((torch.arange(num_positions) % 3).repeat_interleave(durations)[:num_positions])
    labels = torch.stack(rows)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    return one_hot + 0.7 * torch.randn(one_hot.shape, dtype=torch.float64), labels


def test_partly_labelled_sequences_teach_more_than_dropping_them():
    hidden, labels = draw_runs(12, 40)
    lengths = torch.full((12,), 40)
    missing = labels.clone()
    missing[2:] = torch.where(torch.rand(10, 40) < 0.5, UNKNOWN, labels[2:])
    with_partial = trained(hidden, lengths, missing)
    dropped = trained(hidden[:2], lengths[:2], labels[:2])
    hidden, labels = draw_runs(20, 40)
    lengths = torch.full((20,), 40)
    losses = [head.compute_loss(hidden, lengths, labels) for head in (with_partial, dropped)]
    assert losses[0] < 0.9 * losses[1]

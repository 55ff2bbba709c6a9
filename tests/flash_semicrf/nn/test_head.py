"""The CRF head: a likelihood under every option, decoding, training, dtypes."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

from flash_semicrf.compat import semi_crf_streaming_forward
from flash_semicrf.duration import PoissonDuration
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import Segment, segments_to_table
from flash_semicrf.streaming.dispatch import BACKENDS, record_backends
from flash_semicrf.testing import assert_close, enumerate_scores
from tests.flash_semicrf.cases import thinned

K, C, D, T = 3, 2, 4, 4
LENGTHS = torch.tensor([4, 1, 3])
CHOICES = ("auto", "streaming", *BACKENDS, "exact", "binary_tree_sharded")
METHODS = ["forward", "decode", "decode_with_traceback", "marginals"]

NO_REPEAT = torch.tensor([[False, True], [True, False]])
OPTIONS = {
    "plain": {},
    "scores in": {"hidden_dim": None},
    "sequence centring": {"centering": "sequence"},
    "no centring": {"centering": "none"},
    "ends": {"initial_scores": True, "final_scores": True},
    "boundary": {"boundary_scores": True},
    "min duration": {"min_duration": {1: 2}},
    "constraints": {"transition_constraints": NO_REPEAT},
    "geometric": {"duration_distribution": "geometric"},
    "negative binomial": {"duration_distribution": "negative_binomial"},
    "poisson": {"duration_distribution": "poisson"},
    "uniform": {"duration_distribution": "uniform"},
    "everything": {
        "initial_scores": True,
        "final_scores": True,
        "boundary_scores": True,
        "min_duration": [1, 2],
        "transition_constraints": NO_REPEAT,
    },
    "one duration": {"max_duration": 1},
    "K > T": {"max_duration": 6},
    "one label": {"num_classes": 1},
}


def make_head(seed=1, dtype=torch.float64, **options):
    """Draw every parameter of a head, those that start at zero too."""
    torch.manual_seed(seed)
    head = SemiMarkovCRFHead(**{"num_classes": C, "max_duration": K, "hidden_dim": D, **options})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head.to(dtype)


def make_hidden(head, lengths=LENGTHS, num_positions=T, seed=2):
    torch.manual_seed(seed)
    channels = head.hidden_dim or head.num_classes
    dtype = head.transition.dtype
    return torch.randn(len(lengths), num_positions, channels, dtype=dtype), lengths


def every_segmentation(head, hidden, lengths, index):
    """Segmentations of one sequence as a table for a batch of copies of it."""
    potentials, _ = head.potentials(hidden, lengths)
    segmentations, scores = enumerate_scores(potentials, index)
    feasible = [y for y, score in zip(segmentations, scores, strict=True) if score > -torch.inf]
    table = segments_to_table([[Segment(s, t - 1, c) for s, t, c in y] for y in feasible])
    return feasible, table


def make_labels(lengths, num_positions, num_classes=C):
    return torch.arange(num_positions).remainder(num_classes).expand(len(lengths), -1)


# Likelihood


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_is_a_likelihood(options):
    head = make_head(**options)
    hidden, lengths = make_hidden(head)
    for index in range(len(lengths)):
        feasible, table = every_segmentation(head, hidden, lengths, index)
        copies = hidden[index].expand(len(feasible), -1, -1)
        repeated = lengths[index].expand(len(feasible))
        loss = head.compute_loss(copies, repeated, table, reduction="none")
        assert (loss >= -1e-12).all()
        assert abs(loss.neg().exp().sum().item() - 1) < 1e-12


@pytest.mark.parametrize("num_positions", [1, 2])
def test_labels_per_position_have_probabilities_that_sum_to_one(num_positions):
    # No label may follow itself: labellings and segmentations are then one to one, K >= T.
    head = make_head(transition_constraints=NO_REPEAT, initial_scores=True)
    labels = torch.tensor(list(itertools.product(range(C), repeat=num_positions)))
    lengths = torch.full((len(labels),), num_positions)
    hidden, _ = make_hidden(head, lengths[:1], num_positions)
    hidden = hidden.expand(len(labels), -1, -1)
    loss = head.compute_loss(hidden, lengths, labels, reduction="none")
    assert abs(loss.neg().exp().sum().item() - 1) < 1e-12


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_is_the_sum_over_segmentations(options):
    head = make_head(**options)
    hidden, lengths = make_hidden(head)
    result = head(hidden, lengths)
    potentials, offset = head.potentials(hidden, lengths)
    for index in range(len(lengths)):
        _, scores = enumerate_scores(potentials, index)
        assert_close(result["partition"][index], scores.logsumexp(0) + offset[index])


def test_position_centering_does_not_change_the_model():
    centered, plain = make_head(), make_head(centering="none")
    hidden, lengths = make_hidden(plain)
    hidden = 30 * hidden
    labels = make_labels(lengths, T)
    assert_close(centered(hidden, lengths)["partition"], plain(hidden, lengths)["partition"])
    assert_close(centered.decode(hidden, lengths), plain.decode(hidden, lengths))
    assert_close(
        centered.compute_loss(hidden, lengths, labels), plain.compute_loss(hidden, lengths, labels)
    )


@pytest.mark.parametrize("centering", ["position", "sequence", "none"])
def test_cum_scores_are_those_of_the_partition(centering):
    head = make_head(centering=centering)
    hidden, lengths = make_hidden(head)
    result = head(hidden, lengths)
    assert result["cum_scores"].shape == (len(lengths), T + 1, C)
    partition = semi_crf_streaming_forward(
        result["cum_scores"], head.constrained_transition, head.duration_bias, lengths, K
    )
    assert_close(partition, result["partition"])


def test_infeasible_sequence_has_no_partition():
    head = make_head(min_duration=3)
    hidden, lengths = make_hidden(head)
    partition = head(hidden, lengths)["partition"]
    assert torch.isinf(partition).tolist() == [True, True, False]


def test_reductions():
    head = make_head()
    hidden, lengths = make_hidden(head)
    labels = make_labels(lengths, T)
    each = head.compute_loss(hidden, lengths, labels, reduction="none")
    assert each.shape == (len(lengths),)
    assert_close(head.compute_loss(hidden, lengths, labels), each.mean())
    assert_close(head.compute_loss(hidden, lengths, labels, reduction="sum"), each.sum())


def test_labels_are_their_maximal_runs():
    head = make_head()
    hidden, lengths = make_hidden(head)
    labels = torch.tensor([[0, 0, 1, 0], [1, 9, 9, 9], [1, 1, 1, -1]])
    runs = [
        [Segment(0, 1, 0), Segment(2, 2, 1), Segment(3, 3, 0)],
        [Segment(0, 0, 1)],
        [Segment(0, 2, 1)],
    ]
    assert_close(
        head.compute_loss(hidden, lengths, labels),
        head.compute_loss(hidden, lengths, segments_to_table(runs)),
    )


def test_long_gold_segments_are_split_with_a_warning_or_refused():
    hidden, lengths = make_hidden(make_head(), torch.tensor([4]))
    labels = torch.zeros(1, 4, dtype=torch.long)
    pieces = segments_to_table([[Segment(0, 1, 0), Segment(2, 3, 0)]])
    head = make_head()
    with pytest.warns(UserWarning, match="1 gold segments are longer than max_duration=3"):
        split = head.compute_loss(hidden, lengths, labels)
    assert_close(split, head.compute_loss(hidden, lengths, pieces))
    with pytest.raises(ValueError, match="A gold segment is longer than `max_duration`=3"):
        make_head(long_segments="error").compute_loss(hidden, lengths, labels)


# Decoding and marginals


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_finds_the_best_segmentation(options):
    head = make_head(**options)
    lengths = torch.tensor([4, 2, 3])
    hidden, _ = make_hidden(head, lengths)
    result = head.decode_with_traceback(hidden, lengths)
    potentials, offset = head.potentials(hidden, lengths)
    for index in range(len(lengths)):
        segmentations, scores = enumerate_scores(potentials, index)
        found = [(s.start, s.end + 1, s.label) for s in result.segments[index]]
        assert_close(scores[segmentations.index(found)], scores.max())
        assert_close(result.scores[index], scores.max() + offset[index])
        total = sum(segment.score for segment in result.segments[index])
        assert total == pytest.approx(result.scores[index].item(), abs=1e-10)
    assert_close(head.decode(hidden, lengths), result.scores)


def test_decoded_score_is_differentiable():
    head = make_head(**OPTIONS["everything"])
    hidden, _ = make_hidden(head, torch.tensor([4, 3]))
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head.decode(x, torch.tensor([4, 3])), (hidden,))


def test_decoding_names_an_infeasible_sequence():
    head = make_head(min_duration=3)
    hidden, lengths = make_hidden(head)
    with pytest.raises(ValueError, match="0"):
        head.decode_with_traceback(hidden, lengths)


def test_traceback_has_no_limit_but_the_one_asked_for():
    head = make_head()
    hidden, lengths = make_hidden(head)
    assert len(head.decode_with_traceback(hidden, lengths, 4).segments) == len(lengths)
    with pytest.raises(ValueError) as info:
        head.decode_with_traceback(hidden, lengths, 3)
    assert str(info.value) == "`lengths` must be <= max_traceback_length=3; got 4 at index 0."


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_marginals_are_sums_over_segmentations(options):
    head = make_head(**options)
    lengths = torch.tensor([4, 2, 3])
    hidden, _ = make_hidden(head, lengths)
    actual = head.marginals(hidden, lengths)
    potentials, _ = head.potentials(hidden, lengths)
    for index in range(len(lengths)):
        segmentations, scores = enumerate_scores(potentials, index)
        expected = torch.zeros(3, T, head.num_classes, dtype=torch.float64)
        for segments, probability in zip(segmentations, scores.softmax(0), strict=True):
            for start, stop, label in segments:
                expected[0, start:stop, label] += probability
                expected[1, start, label] += probability
                expected[2, stop - 1, label] += probability
        for got, wanted in zip(actual[:3], expected, strict=True):
            assert_close(got[index], wanted)


# Gradients and training


@pytest.mark.parametrize("name", thinned(list(OPTIONS), 3))
def test_gradient_is_right(name):
    head = make_head(**OPTIONS[name])
    lengths = torch.tensor([4, 3])
    hidden, _ = make_hidden(head, lengths)
    segmentations = [every_segmentation(head, hidden, lengths, i)[0][-1] for i in range(2)]
    table = segments_to_table([[Segment(s, t - 1, c) for s, t, c in y] for y in segmentations])
    names = [name for name, _ in head.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in head.parameters()]

    def loss(hidden, *parameters):
        bound = _Loss(head)
        state = {f"head.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(bound, state, (hidden, lengths, table))

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), *values))


class _Loss(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, lengths, labels):
        return self.head.compute_loss(hidden, lengths, labels, reduction="none")


def test_training_learns_labels_and_durations():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]).expand(4, -1)
    hidden = torch.nn.functional.one_hot(labels, C).float() + 0.5 * torch.randn(4, 12, C)
    lengths = torch.tensor([12, 12, 9, 6])
    head = SemiMarkovCRFHead(C, 4, hidden_dim=C, initial_scores=True, boundary_scores=True)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = head.compute_loss(hidden, lengths, labels) + 1e-4 * head.parameter_penalty()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    decoded = head.decode_with_traceback(hidden, lengths).segments[0]
    assert [segment.duration for segment in decoded] == [3, 3, 3, 3]


def test_padding_and_batching_change_nothing():
    head = make_head(boundary_scores=True)
    hidden, lengths = make_hidden(head)
    labels = make_labels(lengths, T)
    padded = torch.cat([hidden, torch.full((len(lengths), 3, D), torch.nan)], 1)
    for index, length in enumerate(lengths):
        padded[index, length:] = torch.nan
    more_labels = torch.nn.functional.pad(labels, (0, 3), value=-100)
    loss = head.compute_loss(padded, lengths, more_labels, reduction="none")
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        alone = head.compute_loss(hidden[one, :length], lengths[one], labels[one, :length])
        assert_close(loss[index], alone)


# Parameters


def test_duration_bias_is_masked_below_the_minimum():
    head = make_head(min_duration=[1, 3])
    forbidden = torch.tensor([[False, True], [False, True], [False, False]])
    assert torch.equal(head.duration_bias == -torch.inf, forbidden)


def test_minimum_duration_forms_agree():
    forms = [2, [2, 2], (2, 2), {0: 2, 1: 2}, np.array([2, 2]), torch.tensor([2, 2]), np.int64(2)]
    for form in forms:
        assert torch.equal(
            make_head(min_duration=form).duration_bias[0], torch.full((C,), -torch.inf).double()
        )


def test_parameter_penalty_sums_powers_of_what_is_allowed():
    head = make_head(min_duration=2, transition_constraints=NO_REPEAT)
    bias = head.duration_distribution.duration_bias
    expected = head.transition[NO_REPEAT].square().sum() + bias[1:].square().sum()
    assert_close(head.parameter_penalty(), expected)
    head.parameter_penalty(p=1.0).backward()
    assert_close(head.transition.grad, torch.where(NO_REPEAT, head.transition.sign(), 0.0))


def test_duration_distribution_by_instance_is_trained():
    distribution = PoissonDuration(K, C, init_log_lambda=0.5)
    head = SemiMarkovCRFHead(C, K, duration_distribution=distribution)
    assert head.duration_distribution is distribution
    assert "duration_distribution.log_lambda" in head.state_dict()


def test_init_scale_sets_transitions_and_learned_durations():
    head = SemiMarkovCRFHead(C, K, init_scale=0.0)
    assert head.parameter_penalty() == 0


def test_state_dict_holds_exactly_the_parameters():
    head = make_head(**OPTIONS["everything"])
    assert set(head.state_dict()) == {name for name, _ in head.named_parameters()}
    fresh = make_head(seed=5, **OPTIONS["everything"])
    fresh.load_state_dict(head.state_dict())
    hidden, lengths = make_hidden(head, torch.tensor([4, 2, 3]))
    assert_close(fresh(hidden, lengths)["partition"], head(hidden, lengths)["partition"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_give_the_same_result(copier):
    head = make_head(**OPTIONS["everything"])
    hidden, lengths = make_hidden(head, torch.tensor([4, 2, 3]))
    expected = head(hidden, lengths)["partition"]
    assert_close(copier(head)(hidden, lengths)["partition"], expected)


def test_repr_shows_the_options():
    text = repr(SemiMarkovCRFHead(C, K, hidden_dim=D, final_scores=True, centering="none"))
    assert (
        "num_classes=2, max_duration=3, hidden_dim=4, centering='none', "
        "initial_scores=False, final_scores=True" in text
    )


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    head = make_head(dtype=torch.float32)
    hidden, lengths = make_hidden(head)
    labels = make_labels(lengths, T)
    narrow = hidden.to(dtype)
    loss = head.compute_loss(narrow, lengths, labels)
    assert_close(loss, head.compute_loss(narrow.float(), lengths, labels))
    half_head = copy.deepcopy(head).to(dtype)
    assert_close(
        half_head.compute_loss(narrow, lengths, labels),
        copy.deepcopy(half_head).float().compute_loss(narrow.float(), lengths, labels),
    )


def test_autocast_changes_nothing():
    head = make_head(dtype=torch.float32)
    hidden, lengths = make_hidden(head)
    labels = make_labels(lengths, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.compute_loss(hidden, lengths, labels)
        partition = head(hidden, lengths)["partition"]
    assert_close(loss, head.compute_loss(hidden, lengths, labels))
    assert_close(partition, head(hidden, lengths)["partition"])


def test_wider_input_widens_the_computation():
    head = make_head(dtype=torch.float32)
    hidden, lengths = make_hidden(head)
    potentials, _ = head.potentials(hidden.double(), lengths)
    assert potentials.dtype == torch.float64


# Backends


@pytest.mark.parametrize("backend", ["streaming", "numba", "reference"])
@pytest.mark.parametrize("use_triton", [True, False])
def test_backends_agree(backend, use_triton):
    head = make_head()
    hidden, lengths = make_hidden(head)
    expected = head(hidden, lengths)["partition"]
    actual = head(hidden, lengths, use_triton=use_triton, backend=backend)["partition"]
    assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["exact", "binary_tree_sharded"])
def test_exact_engine_agrees_with_streaming(backend):
    head = make_head()
    hidden, lengths = make_hidden(head)
    labels = torch.randint(head.num_classes, hidden.shape[:2])
    results = []
    for name in (backend, "reference"):
        head.zero_grad()
        loss = head.compute_loss(hidden, lengths, labels, backend=name)
        best = head.decode(hidden, lengths, backend=name)
        (loss + best.sum()).backward()
        decoded = head.decode_with_traceback(hidden, lengths, backend=name)
        marginals = head.marginals(hidden, lengths, backend=name)
        gradients = [x.grad for x in head.parameters() if x.grad is not None]
        results.append(([loss, best, decoded.scores, *marginals, *gradients], decoded.segments))
    (actual, actual_segments), (expected, expected_segments) = results
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted)
    keys = [[(s.start, s.end, s.label) for s in sequence] for sequence in actual_segments]
    assert keys == [[(s.start, s.end, s.label) for s in seq] for seq in expected_segments]


@pytest.mark.parametrize("backend", ["exact", "binary_tree_sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_edges_above_the_threshold_are_refused_with_their_bytes(method, backend):
    head = make_head()
    hidden, lengths = make_hidden(head)
    batch, positions = hidden.shape[:2]
    size = 8 * batch * positions * (head.max_duration + 1) * head.num_classes**2
    head.edge_memory_threshold = size - 1
    with pytest.raises(ValueError, match=f"would take {size} bytes"):
        getattr(head, method)(hidden, lengths, backend=backend)
    assert head.edge_memory_threshold < size


def test_auto_runs_the_cpu_kernels():
    head = make_head()
    hidden, lengths = make_hidden(head)
    for backend in ("auto", "streaming"):
        with record_backends() as ran:
            head.decode(hidden, lengths, backend=backend)
        assert ran == ["numba"]


@pytest.mark.gpu(group="three labels")
@pytest.mark.parametrize("use_triton", [True, False])
def test_gpu_agrees_with_cpu(use_triton):
    head = make_head(dtype=torch.float32)
    hidden, lengths = make_hidden(head)
    labels = make_labels(lengths, T)
    expected = head.compute_loss(hidden, lengths, labels)
    head.cuda()
    actual = head.compute_loss(hidden.cuda(), lengths, labels.cuda(), use_triton=use_triton)
    assert_close(actual, expected, torch.float32)

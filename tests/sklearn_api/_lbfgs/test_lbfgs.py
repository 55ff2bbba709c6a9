"""solver="lbfgs": the minimum, its gradient, sparse features, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks
from skorch.callbacks import EpochTimer

from flash_semicrf import SemiMarkovCRFHead
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api import SemiCRFSegmenter
from sklearn_api._inputs.sequences import check_X
from sklearn_api._inputs.targets import check_y, encode_labels
from sklearn_api._lbfgs.likelihood import LinearLikelihood
from sklearn_api._training.splitting import split_sequences
from tests.sklearn_api.comparisons import assert_same_segments
from tests.sklearn_api.test_estimator_checks import EXPECTED_FAILURES

LABELS = np.array(["a", "b", "c"])


def problem(num_sequences=8, num_columns=8, seed=0):
    """Sparse count-like features that say something of the label, lengths 1, 3, ..."""
    rng = np.random.default_rng(seed)
    X, y = [], []
    for i in range(num_sequences):
        runs = rng.integers(1, 6, size=24)
        labels = np.repeat(rng.integers(3, size=24), runs)[: 2 * i + 1]
        x = (rng.random((len(labels), num_columns)) < 0.2).astype(float)
        x[np.arange(len(labels)), labels] += rng.random(len(labels)) < 0.7
        X.append(x)
        y.append(LABELS[labels])
    return X, y


def segmenter(**options):
    defaults = {"solver": "lbfgs", "tol": 1e-12, "dtype": "float64", "alpha": 0.5}
    return SemiCRFSegmenter(**{**defaults, **options})


def autograd_loss(model, X, y):
    """Penalised negative log-likelihood by the head's own loss, and its gradients."""
    module = model.module_
    table = model._encode(check_y(y, check_X(model, X, dtype=np.float64).layout))
    lengths = torch.tensor([len(x) for x in X])
    hidden = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in X], batch_first=True)
    module.zero_grad()
    loss = module.head.compute_loss(hidden, lengths, table, reduction="sum")
    loss = (loss + model.alpha * module.penalty()) / int(lengths.sum())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("boundary_scores", [False, True])
@pytest.mark.parametrize("durations", ["learned", "poisson"])
def test_lbfgs_ends_where_autograd_has_no_gradient(boundary_scores, durations):
    X, y = problem()
    model = segmenter(boundary_scores=boundary_scores, duration_distribution=durations).fit(X, y)
    loss, gradients = autograd_loss(model, X, y)
    assert model.history_[-1]["train_loss"] == pytest.approx(loss, rel=1e-10)
    for name, gradient in gradients.items():
        assert float(gradient.abs().max()) < 1e-6, name
    assert model.n_iter_ == len(model.history_) > 1


@pytest.mark.parametrize(
    ("durations", "tail"), [("learned", "geometric"), ("geometric", "geometric"), ("learned", -0.1)]
)
def test_lbfgs_learns_durations_beyond_max_duration(durations, tail):
    X, y = problem()
    model = segmenter(max_duration=3, duration_distribution=durations, duration_tail=tail).fit(X, y)
    loss, gradients = autograd_loss(model, X, y)
    assert model.history_[-1]["train_loss"] == pytest.approx(loss, rel=1e-10)
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6
    assert ("head.tail.log_rate" in gradients) == (durations == "learned" and tail == "geometric")
    if tail == -0.1:
        assert bool((model.module_.head.duration_tail == np.float32(-0.1)).all())
    assert max(s.duration for p in model.predict_segments(X) for s in p) > 3


def test_lbfgs_tail_of_a_label_that_must_not_have_one():
    X, y = problem()
    with pytest.raises(ValueError, match="`duration_tail` must be above -inf .*; got label"):
        segmenter(max_duration=2, duration_tail=-np.inf).fit(X, y)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
def test_lbfgs_early_stopping_keeps_the_best_iteration(form):
    X, y = problem(24, 60)
    given = [form(np.c_[x, x[:, :5]]) for x in X]  # equal columns, merged where sparse
    options = {"alpha": 0.01, "tol": 1e-4, "n_iter_no_change": 4, "random_state": 0}
    options |= {"early_stopping": True, "validation_fraction": 0.3, "boundary_scores": True}
    model = segmenter(**options).fit(given, y)
    losses = np.array(model.history_[:, "valid_loss"])
    best = int(losses.argmin())
    assert 0 < best < len(losses) - 1  # it went on, and came back
    assert model.n_iter_ == len(losses) < 60
    train, valid = split_sequences(len(X), 0.3, model._seed)
    count = sum(len(X[i]) for i in train)
    penalty = model.alpha * float(model.module_.penalty().detach()) / count
    for part, name in ((train, "train_loss"), (valid, "valid_loss")):
        positions = sum(len(X[i]) for i in part)
        found = -model.log_likelihood([given[i] for i in part], [y[i] for i in part]).sum()
        expected = model.history_[best][name]
        assert found / positions + penalty == pytest.approx(expected, rel=1e-6)


def test_lbfgs_constraints_and_fixed_durations():
    X, y = problem()
    y[3] = np.repeat(LABELS[:1], len(y[3]))
    model = segmenter(transition_constraints="observed", single_position_labels="b", max_duration=5)
    model.set_params(long_segments="split")
    with pytest.warns(UserWarning, match="split"):
        model.fit(X, y)
    assert all(s.duration == 1 for p in model.predict_segments(X) for s in p if s.label == "b")
    with pytest.warns(UserWarning, match="split"):
        _, gradients = autograd_loss(model, X, y)
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


def test_lbfgs_beats_adam_on_the_same_objective():
    X, y = problem()
    exact = segmenter().fit(X, y)
    adam = SemiCRFSegmenter(
        alpha=0.5, dtype="float64", max_epochs=150, learning_rate=0.03, tol=0.0, random_state=0
    ).fit(X, y)
    low, near = autograd_loss(exact, X, y)[0], autograd_loss(adam, X, y)[0]
    assert low <= near + 1e-12
    assert near == pytest.approx(low, rel=2e-2)


@pytest.mark.parametrize(
    ("form", "l1_ratio"), [(sp.csr_matrix, 0.0), (sp.coo_array, 0.0), (sp.csc_array, 0.3)]
)
def test_lbfgs_sparse_is_dense(form, l1_ratio):
    X, y = problem()
    X = [np.c_[x, x[:, :2], np.zeros((len(x), 1))] for x in X]  # equal columns and an empty one
    dense = segmenter(boundary_scores=True, l1_ratio=l1_ratio).fit(X, y)
    sparse_X = [form(x) for x in X]
    sparse = segmenter(boundary_scores=True, l1_ratio=l1_ratio).fit(sparse_X, y)
    assert sparse.history_[-1]["train_loss"] == pytest.approx(
        dense.history_[-1]["train_loss"], rel=1e-9
    )
    for one, two in zip(dense.predict_proba(X), sparse.predict_proba(sparse_X), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
    # Products of sparse and of dense matrices add in other orders.
    for one, two in zip(sparse.predict(X), sparse.predict(sparse_X), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(sparse.predict_segments(X), sparse.predict_segments(sparse_X), strict=True):
        assert_same_segments(one, two)
    gold = sparse.log_likelihood(sparse_X, y)
    np.testing.assert_allclose(gold, sparse.log_likelihood(X, y), atol=1e-9)
    np.testing.assert_allclose(gold, dense.log_likelihood(X, y), atol=1e-4)


def test_lbfgs_float32_agrees():
    X, y = problem()
    wide, narrow = segmenter().fit(X, y), segmenter(dtype="float32", tol=1e-7).fit(X, y)
    assert narrow.history_[-1]["train_loss"] == pytest.approx(
        wide.history_[-1]["train_loss"], rel=1e-4
    )
    assert narrow.module_.head.transition.dtype == torch.float32


def test_lbfgs_is_deterministic():
    X, y = problem()
    X = [sp.csr_array(x) for x in X]
    one, two = (segmenter(dtype="float32", tol=1e-6).fit(X, y) for _ in range(2))
    for a, b in zip(one.module_.parameters(), two.module_.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sparse", [False, True])
def test_lbfgs_never_sees_a_dense_form(sparse):
    """2e6 columns: dense, the 78 positions would take 1.2 GB in float64; so would each batch."""
    X, y = problem(6)
    num_columns = 2_000_000 if sparse else 100
    wide = []
    for x in X:
        x = sp.coo_array(x)
        shape = (x.shape[0], num_columns)
        wide.append(sp.csr_array((x.data, (x.row, x.col * (num_columns // 10))), shape=shape))
    X = wide if sparse else [x.toarray() for x in wide]
    model = segmenter(dtype="float32", tol=1e-4).fit(X, y)
    assert model.n_features_in_ == num_columns
    assert model.score(X, y) > 0.6


def test_lbfgs_l1_has_zeros_and_satisfies_the_optimality_conditions():
    X, y = problem()
    model = segmenter(alpha=2.0, l1_ratio=1.0).fit(X, y)
    weight = model.module_.head.projection.weight.detach()
    assert 0.2 < float((weight == 0).double().mean()) < 1
    _, gradients = autograd_loss(model.set_params(alpha=0.0), X, y)
    slope = gradients["head.projection.weight"] * sum(map(len, X)) / 2.0
    assert float((slope + weight.sign())[weight != 0].abs().max()) < 1e-3
    assert float(slope[weight == 0].abs().max()) <= 1 + 1e-3


def test_lbfgs_weights_repeat_sequences():
    X, y = problem(5)
    times = np.array([1, 2, 0, 1, 3])
    options = {"boundary_scores": True, "max_duration": 8, "duration_distribution": "poisson"}
    # A flat minimum: the number of iterations, 400 to 600, depends on how sums are rounded.
    options |= {"duration_init": "default", "alpha": 1.0, "max_iter": 2000}
    weighted = segmenter(**options).fit(X, y, sample_weight=times)
    many = np.repeat(np.arange(5), times)
    repeated = segmenter(**options).fit([X[i] for i in many], [y[i] for i in many])
    for one, two in zip(weighted.predict_proba(X), repeated.predict_proba(X), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_lbfgs_warm_start_along_a_path_of_alpha():
    X, y = problem()
    model = segmenter(warm_start=True, alpha=2.0).fit(X, y)
    cold = segmenter(alpha=1.0).fit(X, y)
    before = model.n_iter_
    model.set_params(alpha=1.0).fit(X, y)
    assert model.history_[-1]["train_loss"] == pytest.approx(cold.history_[-1]["train_loss"])
    again = model.n_iter_
    model.set_params(tol=1e-6).fit(X, y)  # at the minimum already
    assert again > before and model.n_iter_ - again <= model.n_iter_no_change


def test_lbfgs_warns_before_convergence_and_reports(capsys):
    X, y = problem()
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        model = segmenter(max_iter=3, verbose=1).fit(X, y)
    assert model.n_iter_ == 3
    assert capsys.readouterr().out.count("iteration") == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoder": "mlp"}, 'needs encoder="linear"'),
        ({"callbacks": [EpochTimer()]}, "callbacks"),
        ({"crop_length": 50}, "crop_length"),
        ({"solver": "adam", "l1_ratio": 0.5}, "l1_ratio"),
        ({"single_position_labels": ["a", "z"]}, "'z'"),
        ({"single_position_labels": "a", "min_duration": 2}, "min_duration"),
    ],
)
def test_lbfgs_refuses(options, match):
    X, y = problem()
    with pytest.raises(ValueError, match=match):
        segmenter(**options).fit(X, y)


def test_partial_fit_needs_another_solver():
    assert not hasattr(segmenter(), "partial_fit")
    with pytest.raises(AttributeError, match="partial_fit") as raised:
        segmenter().partial_fit(*problem())
    assert "warm_start" in str(raised.value.__cause__)


def test_bio_tags_in_and_out():
    X = [np.eye(4)[[0, 1, 2, 0, 3, 3]], np.eye(4)[[3, 0, 0, 1]]]
    y = [["B-N", "I-N", "I-N", "B-N", "O", "O"], ["O", "B-N", "B-N", "I-N"]]
    model = segmenter(
        tagging="bio", boundary_scores=True, alpha=0.01, single_position_labels="O"
    ).fit(X, y)
    assert model.classes_.tolist() == ["N", "O"]
    assert [tags.tolist() for tags in model.predict(X)] == y
    assert model.score(X, y) == 1.0
    first = model.predict_segments(X)[0]
    assert [(s.start, s.end, s.label) for s in first] == [
        (0, 2, "N"), (3, 3, "N"), (4, 4, "O"), (5, 5, "O"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="index 1"):
        segmenter(tagging="bio").fit(X[1:], [["O", "N", "O", "O"]])


def test_bio_gold_tags_follow_the_segments():
    gold = check_y([["I-N", "I-M", "O", "B-M"]], check_X(SemiCRFSegmenter(), [np.ones((4, 1))],
                   reset=True).layout, "bio")  # fmt: skip
    assert gold.bio_tags.tolist() == ["B-N", "B-M", "O", "B-M"]
    table = encode_labels(gold, np.array(["M", "N", "O"]))
    assert isinstance(table, SegmentTable)
    assert table.label.tolist() == [1, 0, 2, 0]


SPARSE_FAILURES = {
    "check_sample_weight_equivalence_on_sparse_data": EXPECTED_FAILURES[
        "check_sample_weight_equivalence_on_dense_data"
    ]
}


@parametrize_with_checks(
    [SemiCRFSegmenter(solver="lbfgs")],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES | SPARSE_FAILURES,
)
def test_lbfgs_estimator_check(estimator, check):
    check(estimator)


def test_float32_scores_have_the_loss_of_their_float64_copy():
    # Weights and tails in float32 would put the gold scores off, and log Z not.
    head = SemiMarkovCRFHead(
        3, 4, hidden_dim=2, initial_scores=True, final_scores=True, duration_tail=-0.1
    ).double()
    lengths = np.array([30, 2000])
    start = [torch.arange(0, length, 10) for length in lengths]
    table = SegmentTable(
        torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([len(s) for s in start])),
        torch.cat(start), torch.cat(start) + 10, torch.cat(start) // 10 % 3,
    )  # fmt: skip
    scores = 100 * np.random.default_rng(0).random((2030, 3), dtype=np.float32)
    weights = np.array([0.1, 0.7])
    losses = [
        LinearLikelihood(head, None, lengths, table, weights, dtype).loss(scores.astype(dtype))
        for dtype in (np.float32, np.float64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)

"""SemiCRFSegmenter: forms, options, reproducibility, persistence and messages."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from skorch.callbacks import Callback
from torch import nn

from flash_semicrf.duration import PoissonDuration
from flash_semicrf.testing import enumerate_segmentations
from sklearn_api import SemiCRFSegmenter
from sklearn_api.model_selection import cross_val_predict

QUICK = {"max_epochs": 3, "random_state": 0}


def waves(count=4, seed=0, noise=0.3):
    """Short rests and waves of 8 to 12 positions; X is the wave's indicator with noise."""
    rng = np.random.default_rng(seed)
    X, y = [], []
    for _ in range(count):
        durations = rng.integers([8, 8, 8], [15, 13, 15])
        labels = np.repeat(["rest", "wave", "rest"], durations)
        x = (labels == "wave") + noise * rng.normal(size=len(labels))
        X.append(np.stack([x, rng.normal(size=len(labels))], axis=1))
        y.append(labels)
    return X, y


@pytest.fixture(scope="module")
def fitted():
    X, y = waves(8)
    return SemiCRFSegmenter(random_state=0, learning_rate=0.05).fit(X, y)


class Wide(nn.Module):
    """An encoder of the user's that draws random numbers in training."""

    def __init__(self, in_features, width=6):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        return self.layers(x)


class Count(Callback):
    """Counts epochs on itself."""

    epochs_ = 0

    def on_epoch_end(self, net, **kwargs):
        self.epochs_ += 1


def assert_same_parameters(a, b, **tolerance):
    """Bit for bit, unless a tolerance is given."""
    ours, theirs = a.module_.state_dict(), b.module_.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))


ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""Of float32 parameters after a few steps, where positions lie elsewhere in memory."""


# What it learns


def test_fit_learns_waves(fitted):
    X, y = waves(6, seed=1)
    assert fitted.score(X, y) > 0.97
    segments = fitted.predict_segments(X)
    assert [[s.label for s in one] for one in segments] == [["rest", "wave", "rest"]] * 6
    assert fitted.classes_.tolist() == ["rest", "wave"]
    assert fitted.n_features_in_ == 2
    assert fitted.max_duration_ == 14
    assert fitted.n_iter_ == len(fitted.history_)
    assert fitted.history_[-1]["train_loss"] < 0.1 * fitted.history_[0]["train_loss"]


@pytest.mark.parametrize("encoder", ["mlp", "cnn", "gru", Wide, nn.Linear(2, 3)])
def test_fit_with_each_encoder(encoder):
    X, y = waves(8)
    segmenter = SemiCRFSegmenter(
        encoder, hidden_size=8, num_layers=2, learning_rate=0.1, max_epochs=20, random_state=0
    )
    assert segmenter.fit(X, y).score(*waves(4, seed=1)) > 0.9


def test_fit_does_not_depend_on_scale_or_offset_with_a_named_encoder():
    X, y = waves(4)
    segmenter = SemiCRFSegmenter("mlp", num_layers=1, **QUICK)
    plain = segmenter.fit(X, y).history_[-1]["train_loss"]
    scaled = segmenter.fit([1000.0 * x + 500.0 for x in X], y).history_[-1]["train_loss"]
    assert scaled == pytest.approx(plain, rel=1e-3)


def test_boundary_scores_use_evidence_at_the_boundary():
    """Adjacent segments of one label, told apart only by a mark at their first positions."""
    rng = np.random.default_rng(0)
    X, y = [], []
    for _ in range(12):
        stops = np.cumsum(rng.integers(3, 8, size=4))
        starts = np.r_[0, stops[:-1]]
        x = 0.1 * rng.normal(size=(stops[-1], 1))
        x[starts] += 1.0
        X.append(x)
        y.append([(int(s), int(e), "chirp") for s, e in zip(starts, stops, strict=True)])
    segmenter = SemiCRFSegmenter(boundary_scores=True, learning_rate=0.1, random_state=0)
    segmenter.fit(X[:8], y[:8])
    found = [
        [(s.start, s.end + 1, s.label) for s in one] for one in segmenter.predict_segments(X[8:])
    ]
    assert found == y[8:]


# Probabilities


def test_log_likelihood_sums_to_one():
    """Over all segmentations of a short sequence; one with a forbidden transition counts 0."""
    X, y = waves(4)
    segmenter = SemiCRFSegmenter(
        max_duration=15, transition_constraints="observed", min_duration={"wave": 2}, **QUICK
    ).fit(X, y)
    x = X[0][:6]
    total, best, best_value = 0.0, None, -np.inf
    for segmentation in enumerate_segmentations(6, 6, 2):
        rows = [(s, e, segmenter.classes_[c]) for s, e, c in segmentation]
        value = segmenter.log_likelihood(x, rows)
        total += np.exp(value)
        if value > best_value:
            best, best_value = rows, value
    assert total == pytest.approx(1.0, abs=1e-6)
    assert [(s.start, s.end + 1, s.label) for s in segmenter.predict_segments(x)] == best


def test_predict_proba_and_boundary_proba(fitted):
    X, y = waves(3, seed=2)
    for x, labels, proba, boundary in zip(
        X, y, fitted.predict_proba(X), fitted.predict_boundary_proba(X), strict=True
    ):
        assert proba.shape == (len(x), 2)
        np.testing.assert_allclose(proba.sum(1), 1.0, atol=1e-6)
        assert (fitted.classes_[proba.argmax(1)] == labels).mean() > 0.95
        assert boundary.shape == (len(x),)
        assert boundary[0] == pytest.approx(1.0, abs=1e-5)
        assert boundary.sum() == pytest.approx(3.0, abs=0.5)


def test_score_is_position_accuracy(fitted):
    X, y = waves(3, seed=2, noise=1.0)
    same = np.concatenate(fitted.predict(X)) == np.concatenate(y)
    assert fitted.score(X, y) == pytest.approx(same.mean())


# Forms of input


def test_outputs_mirror_inputs(fitted):
    X, y = waves(3, seed=3, noise=0.1)  # every position is clear, however it is batched
    many = fitted.predict(X)
    assert many.dtype == object and many.shape == (3,)
    one = fitted.predict(X[0])
    np.testing.assert_array_equal(one, many[0])
    assert fitted.predict_proba(X[0]).shape == (len(X[0]), 2)
    assert isinstance(fitted.log_likelihood(X[0], y[0]), float)
    assert fitted.log_likelihood(X, y).shape == (3,)
    groups = np.repeat([0, 1, 2], [len(x) for x in X])
    rows = fitted.predict(np.concatenate(X), groups=groups)
    np.testing.assert_array_equal(rows, np.concatenate(many))
    assert len(fitted.predict_segments(np.concatenate(X), groups=groups)) == 3
    equal = np.stack([x[:20] for x in X])
    assert fitted.predict(equal).shape == (3,)
    assert fitted.predict_proba(equal)[0].shape == (20, 2)


@pytest.mark.parametrize("labels", [(3, 7), (False, True), ("rest", "wave")])
def test_segments_are_plain_python_objects(labels):
    """So that JSON takes them, whatever numpy made of the labels."""
    X, y = waves(3)
    y = [np.where(one == "wave", labels[1], labels[0]) for one in y]
    model = SemiCRFSegmenter(max_epochs=1, random_state=0).fit(X, y)
    outputs = {
        "predict_segments": model.predict_segments(X),
        "predict_topk": model.predict_topk(X, 2),
        "sample": model.sample(X, random_state=0),
        "cross_val_predict": cross_val_predict(model, X, y, cv=3, method="predict_segments"),
    }
    text = json.dumps(outputs, default=dataclasses.asdict)
    assert json.loads(text)["predict_topk"][0][0][0]["label"] in labels
    assert {type(s.label) for one in outputs["predict_segments"] for s in one} == {type(labels[0])}
    scalars = [model.score(X, y), model.log_likelihood(X[0], y[0]), model.entropy(X[0])]
    assert json.loads(json.dumps([*scalars, model.max_duration_, model.n_iter_]))


def test_fit_with_groups_equals_fit_with_sequences():
    X, y = waves(4)
    groups = np.repeat(np.arange(4), [len(x) for x in X])
    a = SemiCRFSegmenter(**QUICK).fit(X, y)
    b = SemiCRFSegmenter(**QUICK).fit(np.concatenate(X), np.concatenate(y), groups=groups)
    assert_same_parameters(a, b, **ROUNDING)


def test_fit_with_segments_equals_fit_with_labels():
    X, y = waves(4)
    a = SemiCRFSegmenter(**QUICK).fit(X, y)
    runs = []
    for labels in y:
        starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]]).tolist()
        stops = [*starts[1:], len(labels)]
        runs.append([(s, e, labels[s]) for s, e in zip(starts, stops, strict=True)])
    b = SemiCRFSegmenter(**QUICK).fit(X, runs)
    assert_same_parameters(a, b, **ROUNDING)
    np.testing.assert_allclose(a.log_likelihood(X, runs), b.log_likelihood(X, y), rtol=1e-5)


def test_prediction_does_not_depend_on_batches(fitted):
    X, _ = waves(5, seed=4)
    together = fitted.predict_proba(X)
    alone = copy.copy(fitted).set_params(window_length=1).predict_proba(X)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# Durations and constraints


def test_max_duration_splits_or_refuses_long_segments():
    X, y = waves(4)
    with pytest.warns(UserWarning, match="gold segments are longer than max_duration=5"):
        segmenter = SemiCRFSegmenter(max_duration=5, **QUICK).fit(X, y)
    assert segmenter.max_duration_ == 5
    assert max(s.duration for one in segmenter.predict_segments(X) for s in one) <= 5
    with pytest.raises(ValueError, match="longer than `max_duration`=5: sequence 0"):
        SemiCRFSegmenter(max_duration=5, long_segments="error", **QUICK).fit(X, y)


def test_min_duration_and_transitions_hold_in_predictions():
    X, y = waves(4, noise=2.0)
    segmenter = SemiCRFSegmenter(
        min_duration={"wave": 7}, transition_constraints="observed", **QUICK
    ).fit(X, y)
    X = waves(4, seed=5, noise=2.0)[0]
    for one in segmenter.predict_segments(X):
        labels = [s.label for s in one]
        assert all(s.duration >= 7 for s in one if s.label == "wave")
        assert all(a != b for a, b in zip(labels[:-1], labels[1:], strict=True))
    for labels in segmenter.predict(X):
        starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
        durations = np.diff(starts, append=len(labels))
        assert (durations[labels[starts] == "wave"] >= 7).all()


def test_predict_has_the_most_expected_correct_positions():
    """Without constraints the argmax; with them the best of all labellings that obey them."""
    X, y = waves(4, noise=2.0)
    x = X[0][:7]
    free = SemiCRFSegmenter(**QUICK).fit(X, y)
    best = free.classes_[free.predict_proba(x).argmax(1)]
    np.testing.assert_array_equal(free.predict(x), best)
    bound = SemiCRFSegmenter(min_duration=3, transition_constraints="observed", **QUICK).fit(X, y)
    proba = bound.predict_proba(x)
    expected = {
        tuple(np.repeat([c for _, _, c in rows], [e - s for s, e, _ in rows]))
        for rows in enumerate_segmentations(7, 7, 2)
        if all(e - s >= 3 for s, e, _ in rows)
        and all(a[2] != b[2] for a, b in zip(rows[:-1], rows[1:], strict=True))
    }
    best = max(expected, key=lambda labels: proba[np.arange(7), labels].sum())
    assert bound.predict(x).tolist() == bound.classes_[list(best)].tolist()


@pytest.mark.parametrize(
    "distribution", ["learned", "geometric", "negative_binomial", "poisson", "uniform"]
)
@pytest.mark.parametrize("init", ["empirical", "default"])
def test_duration_distributions_by_name(distribution, init):
    X, y = waves(3)
    segmenter = SemiCRFSegmenter(
        duration_distribution=distribution, duration_init=init, max_epochs=1, random_state=0
    ).fit(X, y)
    assert np.isfinite(segmenter.log_likelihood(X, y)).all()


def test_duration_init_starts_from_the_training_durations():
    X, y = waves(8)
    losses = {}
    for init in ("empirical", "default"):
        segmenter = SemiCRFSegmenter(duration_init=init, max_epochs=1, random_state=0).fit(X, y)
        losses[init] = segmenter.history_[0]["train_loss"]
    assert losses["empirical"] < losses["default"]


def test_duration_distribution_instance_is_copied():
    X, y = waves(3)
    given = PoissonDuration(14, 2)
    before = [p.detach().clone() for p in given.parameters()]
    SemiCRFSegmenter(duration_distribution=given, max_duration=14, **QUICK).fit(X, y)
    assert all(torch.equal(a, b) for a, b in zip(before, given.parameters(), strict=True))


# Training


@pytest.mark.parametrize("encoder", ["linear", "cnn", Wide])
def test_fits_with_one_seed_are_bitwise_equal(encoder):
    X, y = waves(6)
    segmenter = SemiCRFSegmenter(
        encoder,
        hidden_size=8,
        num_layers=2,
        dropout=0.2,
        batch_size=2,
        early_stopping=True,
        **QUICK,
    )
    before = torch.get_rng_state()
    first = segmenter.fit(X, y)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    second = clone(segmenter).fit(X, y)
    assert_same_parameters(first, second)
    assert first.history_[:, "train_loss"] == second.history_[:, "train_loss"]


def test_early_stopping_keeps_the_best_epoch():
    X, y = waves(8)
    segmenter = SemiCRFSegmenter(
        "mlp",
        early_stopping=True,
        validation_fraction=0.25,
        n_iter_no_change=3,
        learning_rate=0.3,
        random_state=0,
    ).fit(X, y)
    losses = segmenter.history_[:, "valid_loss"]
    assert segmenter.n_iter_ < 100
    assert int(np.argmin(losses)) < segmenter.n_iter_ - 1
    assert segmenter.net_.train_split is None


def test_training_stops_on_a_plateau():
    X, y = waves(2)
    segmenter = SemiCRFSegmenter(tol=10.0, n_iter_no_change=2, random_state=0).fit(X, y)
    assert segmenter.n_iter_ == 3


def test_partial_fit_runs_one_epoch_at_a_time():
    X, y = waves(6)
    segmenter = SemiCRFSegmenter(random_state=0, max_duration=20, learning_rate=0.05)
    for _ in range(60):
        segmenter.partial_fit(X[:3], y[:3], classes=["other", "rest", "wave"])
        segmenter.partial_fit(X[3:], y[3:])
    assert segmenter.n_iter_ == 120
    assert segmenter.classes_.tolist() == ["other", "rest", "wave"]
    assert segmenter.score(X, y) > 0.95


def test_partial_fit_keeps_its_classes():
    X, y = waves(2)
    segmenter = SemiCRFSegmenter(random_state=0).partial_fit(X, y, classes={"wave", "rest", "z"})
    segmenter.partial_fit(X, y, classes=["rest", "wave", "z"])
    with pytest.raises(
        ValueError, match=r"`classes` must be those .*'z'\]; got \['rest', 'wave'\]"
    ):
        segmenter.partial_fit(X, y, classes=["rest", "wave"])
    with pytest.raises(
        ValueError, match="`classes` must hold labels of one kind.* got 1 at index 1"
    ):
        SemiCRFSegmenter().partial_fit(X, y, classes=["rest", 1])
    with pytest.raises(TypeError, match="`classes` must be an array or list of labels; got 3"):
        SemiCRFSegmenter().partial_fit(X, y, classes=3)


def test_durations_beyond_all_sequences_are_left_out_of_the_inference():
    X, y = waves(2)
    for params in ({"max_epochs": 1}, {"solver": "lbfgs", "tol": 9.0, "n_iter_no_change": 1}):
        segmenter = SemiCRFSegmenter(max_duration=10**5, random_state=0, **params).fit(X, y)
        assert segmenter.max_duration_ == segmenter.module_.head.max_duration == 10**5
        for _, problem in segmenter._problems(segmenter._check_input(X, None)):
            assert problem.max_duration == problem.num_positions
        # On longer sequences longer segments are within reach.
        x = np.concatenate([*X, *X])
        assert np.isfinite(segmenter.log_likelihood(x, [(0, len(x), "rest")]))


def test_splitting_into_single_positions_is_silent():
    X, y = waves(2)
    segmenter = SemiCRFSegmenter(max_duration=1, max_epochs=1).fit(X, y)  # warnings are errors
    assert {s.duration for one in segmenter.predict_segments(X) for s in one} == {1}


def test_warm_start_continues():
    X, y = waves(4)
    segmenter = SemiCRFSegmenter(warm_start=True, **QUICK).fit(X, y)
    before = segmenter.history_[-1]["train_loss"]
    segmenter.set_params(learning_rate=0.05).fit(X, y)
    assert segmenter.n_iter_ == 6
    assert segmenter.history_[3]["train_loss"] < before
    assert segmenter.net_.lr == 0.05
    cold = SemiCRFSegmenter(**QUICK).fit(X, y)
    cold.fit(X, y)
    assert cold.n_iter_ == 3


def test_alpha_shrinks_weights():
    X, y = waves(4)
    norms = []
    for alpha in (0.0, 100.0):
        segmenter = SemiCRFSegmenter(alpha=alpha, random_state=0, learning_rate=0.05).fit(X, y)
        norms.append(float(segmenter.module_.penalty().detach()))
    assert norms[1] < 0.1 * norms[0]


def test_callbacks_and_parameters_reach_skorch():
    X, y = waves(4)
    count = Count()
    segmenter = SemiCRFSegmenter(
        Wide,
        solver="sgd",
        callbacks=[count],
        module__width=9,
        optimizer__momentum=0.5,
        iterator_train__drop_last=False,
        **QUICK,
    )
    cloned = clone(segmenter)
    assert cloned.get_params()["optimizer__momentum"] == 0.5
    cloned.fit(X, y)
    assert count.epochs_ == 0
    assert dict(cloned.net_.callbacks_)["Count"].epochs_ == 3
    assert cloned.net_.optimizer_.defaults["momentum"] == 0.5
    assert cloned.module_.head.hidden_dim == 9
    cloned.set_params(optimizer=torch.optim.RMSprop).fit(X, y)
    assert isinstance(cloned.net_.optimizer_, torch.optim.RMSprop)


def test_verbose_prints_a_line_per_epoch(capsys):
    X, y = waves(2)
    SemiCRFSegmenter(**QUICK).fit(X, y)
    assert capsys.readouterr().out == ""
    SemiCRFSegmenter(verbose=1, **QUICK).fit(X, y)
    assert "train_loss" in capsys.readouterr().out


def test_float64_and_float32_agree():
    X, y = waves(3)
    a = SemiCRFSegmenter(dtype="float64", **QUICK).fit(X, y)
    b = SemiCRFSegmenter(dtype="float32", **QUICK).fit(X, y)
    assert a.module_.head.transition.dtype == torch.float64
    np.testing.assert_allclose(a.log_likelihood(X, y), b.log_likelihood(X, y), rtol=1e-3)


def test_grid_search_over_durations():
    X, y = waves(6)
    grid = {"max_duration": [15, 20], "duration_distribution": ["learned", "poisson"]}
    search = GridSearchCV(SemiCRFSegmenter(**QUICK), grid, cv=KFold(2), error_score="raise")
    search.fit(X, y)
    assert search.best_params_["max_duration"] in (15, 20)
    assert search.predict(X).shape == (6,)


# Persistence


@pytest.mark.parametrize("encoder", ["linear", "cnn"])
def test_pickle_and_joblib_round_trip(encoder, tmp_path):
    X, y = waves(4)
    segmenter = SemiCRFSegmenter(encoder, early_stopping=True, **QUICK).fit(X, y)
    joblib.dump(segmenter, tmp_path / "model.joblib")
    for loaded in (pickle.loads(pickle.dumps(segmenter)), joblib.load(tmp_path / "model.joblib")):
        for a, b in zip(segmenter.predict_proba(X), loaded.predict_proba(X), strict=True):
            np.testing.assert_array_equal(a, b)
        loaded.partial_fit(X, y)
        assert loaded.n_iter_ == segmenter.n_iter_ + 1


def test_continuing_from_a_loaded_model_changes_nothing():
    X, y = waves(4)
    segmenter = SemiCRFSegmenter("mlp", dropout=0.2, **QUICK).fit(X, y)
    loaded = pickle.loads(pickle.dumps(segmenter))
    assert_same_parameters(segmenter.partial_fit(X, y), loaded.partial_fit(X, y))


# Bad input


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"encoder": "transformer"}, "'encoder' parameter of SemiCRFSegmenter must be"),
        ({"max_duration": 0}, "'max_duration' parameter .* Got 0"),
        ({"max_duration": True}, "`max_duration` must be a number, not a bool; got True"),
        ({"hidden_size": np.True_}, "'hidden_size' parameter .* Got"),
        ({"alpha": True}, "`alpha` must be a number, not a bool; got True"),
        ({"alpha": -1.0}, "'alpha' parameter .* Got -1.0"),
        ({"dropout": 1.0}, "'dropout' parameter"),
        ({"min_duration": {"wave": 11}}, "got label 'wave' at positions .* in sequence"),
        ({"transition_constraints": np.ones((3, 3), bool)}, r"must have shape \(2, 2\)"),
        ({"transition_constraints": np.ones((2, 2))}, "must have dtype bool"),
        (
            {"transition_constraints": np.array([[True, False], [True, True]])},
            "got label 'wave' at positions .* after label 'rest'. in sequence 0",
        ),
        ({"kernel_size": 4, "encoder": "cnn"}, "`kernel_size` must be odd; got 4"),
    ],
)
def test_fit_bad_parameters(params, message):
    X, y = waves(4)
    with pytest.raises(ValueError, match=message):
        SemiCRFSegmenter(**{**QUICK, **params}).fit(X, y)


def test_unknown_parameter():
    with pytest.raises(TypeError, match="no parameter 'hidden'; .* start with one of module__"):
        SemiCRFSegmenter(hidden=3).fit(*waves(2))
    with pytest.raises(ValueError, match="Invalid parameter 'hidden'"):
        SemiCRFSegmenter().set_params(hidden=3)


def test_early_stopping_needs_two_sequences():
    X, y = waves(1)
    with pytest.raises(ValueError, match="needs at least 2; got 1"):
        SemiCRFSegmenter(early_stopping=True).fit(X, y)


def test_unfitted_and_unseen(fitted):
    X, y = waves(2)
    for method in ("predict", "predict_proba", "predict_segments", "predict_boundary_proba"):
        with pytest.raises(NotFittedError):
            getattr(SemiCRFSegmenter(), method)(X)
    with pytest.raises(ValueError, match="only the classes .*; got 'nap' in sequence 1"):
        fitted.log_likelihood(X, [y[0], np.full(len(y[1]), "nap")])
    with pytest.raises(ValueError, match="must have 2 features, as in fit; got 1 in sequence 0"):
        fitted.predict([x[:, :1] for x in X])
    with pytest.raises(ValueError, match="Sequence 1 has .* positions in `X` and 3 labels in `y`"):
        fitted.score(X, [y[0], y[1][:3]])

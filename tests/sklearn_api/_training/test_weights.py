"""Sample weights: of sequences, of positions, of crops; routing of groups and weights."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn
import torch
from sklearn.model_selection import GroupKFold, cross_validate

from sklearn_api import SemiCRFSegmenter
from sklearn_api._inputs.sequences import Layout, object_array
from sklearn_api._training.crops import Crop, CroppedDataset
from sklearn_api._training.data import SequenceDataset
from sklearn_api._training.splitting import training_datasets
from sklearn_api._training.weights import WeightedDataset, check_sample_weight

QUICK = {"max_epochs": 5, "random_state": 0, "max_duration": 12, "dtype": "float64"}


def data(count=4, seed=0):
    rng = np.random.default_rng(seed)
    y = [np.repeat(["a", "b", "a", "b"], rng.integers(3, 12, 4)) for _ in range(count)]
    X = [(one == "b")[:, None] + rng.normal(size=(len(one), 2)) for one in y]
    return X, y


def assert_close_models(a, b):
    ours, theirs = a.module_.state_dict(), b.module_.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-8, msg=name)


def loss_of(model, X, y, weights=None):
    """The net's loss over one batch, without the penalty."""
    sequences, table = model._prepare(X, y, None, False)
    weights = check_sample_weight(weights, sequences.layout)
    dataset, _ = training_datasets(sequences, table, weights, model.module_.encoder)
    batch = next(iter(dataset.sampler(100, False, 0)))
    inputs, columns = dataset.collate([dataset[key] for key in batch])
    return float(model.net_.get_loss(model.module_(**inputs), columns, inputs).detach())


def test_loss_weighs_log_likelihoods():
    X, y = data()
    model = SemiCRFSegmenter(**QUICK).fit(X, y)
    weights = np.array([2.0, 0.0, 1.0, 0.5])
    expected = -(weights * model.log_likelihood(X, y)).sum() / sum(map(len, X))
    assert loss_of(model, X, y, weights) == pytest.approx(expected, rel=1e-9)
    assert loss_of(model, X, y) == pytest.approx(loss_of(model, X, y, np.ones(4)), rel=1e-12)


def test_weights_of_positions_act_through_their_mean():
    X, y = data()
    rng = np.random.default_rng(0)
    by_position = [rng.random(len(x)) for x in X]
    a = SemiCRFSegmenter(**QUICK).fit(X, y, sample_weight=by_position)
    means = [one.mean() for one in by_position]
    assert_close_models(a, SemiCRFSegmenter(**QUICK).fit(X, y, sample_weight=means))
    objects = object_array(by_position)
    assert_close_models(a, SemiCRFSegmenter(**QUICK).fit(X, y, sample_weight=objects))
    groups = np.repeat(np.arange(4), [len(x) for x in X])
    rows = SemiCRFSegmenter(**QUICK).fit(
        np.concatenate(X), np.concatenate(y), groups, sample_weight=np.concatenate(by_position)
    )
    assert_close_models(a, rows)


def test_weight_of_two_is_two_copies_and_zero_is_none():
    X, y = data(3)
    params = {**QUICK, "transition_constraints": "observed", "duration_init": "default"}
    weighted = SemiCRFSegmenter(alpha=2.0, **params).fit(X, y, sample_weight=[2.0, 2.0, 2.0])
    copies = SemiCRFSegmenter(alpha=2.0, **params).fit(X * 2, y * 2)
    # Two copies are twice the positions that a loss is divided by: steps are half as long, so
    # the losses are compared, not the parameters.
    for model in (weighted, copies):
        once, twice = loss_of(model, X, y, [2.0] * 3), loss_of(model, X * 2, y * 2)
        assert once == pytest.approx(2.0 * twice, rel=1e-9)
    zero = loss_of(weighted, X, y, [1.0, 1.0, 0.0]) * sum(map(len, X))
    without = loss_of(weighted, X[:2], y[:2]) * sum(map(len, X[:2]))
    assert zero == pytest.approx(without, rel=1e-9)


def test_weights_change_what_is_learnt_and_what_is_scored():
    """The same features with contradicting labels: the heavier sequence wins."""
    X = [np.repeat([[0.0], [1.0], [0.0]], 6, axis=0)] * 2
    y = [np.repeat(["a", "b", "a"], 6), np.repeat(["b", "a", "b"], 6)]
    params = {**QUICK, "max_epochs": 40, "learning_rate": 0.1}
    for heavy in (0, 1):
        weights = np.where(np.arange(2) == heavy, 1.0, 0.01)
        model = SemiCRFSegmenter(**params).fit(X, y, sample_weight=weights)
        assert model.score([X[heavy]], [y[heavy]]) == 1.0
        assert model.score(X, y, sample_weight=weights) == pytest.approx(1.0 / 1.01)
        assert model.score(X, y) == 0.5


def test_crops_weigh_by_their_positions():
    values = [np.zeros((10, 1))]
    model = SemiCRFSegmenter(**QUICK, crop_length=5)
    y = np.repeat([0, 1, 0, 1, 0], 2)
    model.fit(values[0], y)
    sequences, table = model._prepare(values[0], y, None, False)
    cropped = CroppedDataset(SequenceDataset(sequences.values, table), 5)
    weights = [np.r_[np.zeros(4), np.ones(6)]]
    dataset = WeightedDataset(cropped, weights)
    # With the gold segment that the cut passes through.
    assert dataset[Crop(0, 0, 5)][1].tolist() == [0, 0, 0, 0, 1, 1]
    assert dataset[Crop(0, 5, 10)][1].tolist() == [1] * 6
    _, columns = dataset.collate([dataset[Crop(0, 0, 5)], dataset[Crop(0, 8, 10)]])
    assert columns[4].tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]]


def test_held_out_sequences_are_weighed_too():
    X, y = data(4)
    plain = SemiCRFSegmenter(early_stopping=True, **QUICK).fit(X, y)
    double = SemiCRFSegmenter(early_stopping=True, alpha=2.0, **QUICK)
    double.fit(X, y, sample_weight=np.full(4, 2.0))
    ratio = double.history_[0]["valid_loss"] / plain.history_[0]["valid_loss"]
    assert ratio == pytest.approx(2.0, rel=0.05)


def test_check_sample_weight_forms():
    many, single = Layout("many", np.array([2, 3])), Layout("single", np.array([3]))
    for given in ([1, 2], np.array([1.0, 2.0])):
        assert [w.tolist() for w in check_sample_weight(given, many)] == [[1, 1], [2, 2, 2]]
    assert [w.tolist() for w in check_sample_weight(2.0, many)] == [[2, 2], [2, 2, 2]]
    assert check_sample_weight([1, 2, 3], single)[0].tolist() == [1, 2, 3]
    assert check_sample_weight(None, many) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one weight per sequence of `X`: 2; got 1"),
        ([[1.0, 1.0], [1.0]], "one weight per position of sequence 1: 3; got 1"),
        ([1.0, -1.0], "must be >= 0; got -1.0 in sequence 1"),
        ([1.0, np.nan], "NaN"),
        ([0.0, 0.0], "must not be zero everywhere"),
        (np.ones((2, 3, 1)), "1D"),
    ],
)
def test_check_sample_weight_bad_values(weights, message):
    with pytest.raises(ValueError, match=message):
        check_sample_weight(weights, Layout("many", np.array([2, 3])))


def test_groups_and_weights_are_routed():
    """Rows of a 2-D X, split by group: the estimator gets the groups and weights of its part."""
    X, y = data(6)
    groups = np.repeat(np.arange(6), [len(x) for x in X])
    weights = np.repeat([1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [len(x) for x in X])
    model = SemiCRFSegmenter(**QUICK)
    with sklearn.config_context(enable_metadata_routing=True):
        model.set_fit_request(groups=True, sample_weight=True)
        model.set_score_request(groups=True, sample_weight=False)
        result = cross_validate(
            model,
            np.concatenate(X),
            np.concatenate(y),
            cv=GroupKFold(2),
            params={"groups": groups, "sample_weight": weights},
            return_estimator=True,
            return_indices=True,
            error_score="raise",
        )
    for fitted, rows in zip(result["estimator"], result["indices"]["train"], strict=True):
        part = np.unique(groups[rows])
        direct = SemiCRFSegmenter(**QUICK).fit(
            [X[i] for i in part],
            [y[i] for i in part],
            sample_weight=[(1.0, 2.0)[i % 2] for i in part],
        )
        assert_close_models(fitted, direct)


def test_weights_of_any_ordered_collection():
    layout = Layout("many", np.array([2, 1]))
    for weights in ((w for w in (1.0, 2.0)), {0: 1.0, 1: 2.0}.values()):
        assert [w.tolist() for w in check_sample_weight(weights, layout)] == [[1.0, 1.0], [2.0]]
    by_position = (np.full(n, 2.0) for n in (2, 1))
    assert [w.tolist() for w in check_sample_weight(by_position, layout)] == [[2.0, 2.0], [2.0]]
    with pytest.raises(TypeError, match="`sample_weight` must be a number, array or list; got a s"):
        check_sample_weight({1.0, 2.0}, layout)

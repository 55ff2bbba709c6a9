"""Class weights: what they are of positions, that they act as sample weights do, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_sample_weight

from sklearn_api import SemiCRFSegmenter
from tests.sklearn_api._training.test_weights import QUICK, assert_close_models, data

WEIGHTS = {"a": 0.3, "b": 2.5}
# A few steps only, of which rounding makes the least.
LBFGS = {"solver": "lbfgs", "dtype": "float64", "tol": 0.01, "n_iter_no_change": 2}


def means(y, class_weight):
    """Mean weight of the positions of each sequence, by scikit-learn's definition."""
    weights = compute_sample_weight(class_weight, np.concatenate(y))
    return [part.mean() for part in np.split(weights, np.cumsum([len(one) for one in y])[:-1])]


def uneven():
    """Sequences with different shares of the labels."""
    X, y = data(5)
    y = [np.where(np.arange(len(one)) < 2 * i, "b", one) for i, one in enumerate(y)]
    return X, y


@pytest.mark.parametrize("params", [QUICK, LBFGS], ids=["adam", "lbfgs"])
@pytest.mark.parametrize("class_weight", ["balanced", WEIGHTS, {"b": 4.0}], ids=str)
def test_the_weight_of_a_sequence_is_the_mean_of_its_positions(class_weight, params):
    X, y = uneven()
    params = {**params, "class_weight": class_weight, "max_duration": 40}
    model = SemiCRFSegmenter(**params).fit(X, y)
    plain = SemiCRFSegmenter(**{**params, "class_weight": None})
    assert_close_models(model, plain.fit(X, y, sample_weight=means(y, class_weight)))


def test_class_weights_multiply_sample_weights():
    X, y = uneven()
    rng = np.random.default_rng(0)
    given = [rng.random(len(one)) for one in y]
    by_label = [np.where(one == "b", WEIGHTS["b"], WEIGHTS["a"]) for one in y]
    product = [a * b for a, b in zip(given, by_label, strict=True)]
    params = {**QUICK, "max_duration": 40}
    model = SemiCRFSegmenter(**params, class_weight=WEIGHTS).fit(X, y, sample_weight=given)
    assert_close_models(model, SemiCRFSegmenter(**params).fit(X, y, sample_weight=product))
    groups = np.repeat(np.arange(5), [len(x) for x in X])
    rows = SemiCRFSegmenter(**params, class_weight=WEIGHTS).fit(
        np.concatenate(X), np.concatenate(y), groups, sample_weight=np.concatenate(given)
    )
    assert_close_models(model, rows)


def test_heavy_labels_win_where_sequences_contradict_each_other():
    """The same features with other labels: the sequence with more of the heavy label is learnt."""
    X = [np.repeat([[0.0], [1.0], [0.0]], 6, axis=0)] * 2
    y = [np.repeat(["a", "b", "a"], 6), np.repeat(["b", "a", "b"], 6)]
    for label, learnt in (("a", 0), ("b", 1)):
        model = SemiCRFSegmenter(solver="lbfgs", alpha=0.1, class_weight={label: 50.0}).fit(X, y)
        assert model.score([X[learnt]], [y[learnt]]) == 1.0


def test_equal_weights_change_nothing():
    X, y = data()
    plain = SemiCRFSegmenter(**QUICK).fit(X, y)
    assert_close_models(plain, SemiCRFSegmenter(**QUICK, class_weight={}).fit(X, y))
    # One sequence has a mean of 1, whatever is balanced in it.
    one = SemiCRFSegmenter(**QUICK).fit(X[0], y[0])
    assert_close_models(one, SemiCRFSegmenter(**QUICK, class_weight="balanced").fit(X[0], y[0]))


def test_labels_of_bio_tags_are_those_of_the_classes():
    X, y = data()
    tags = [np.where(one == "b", "I-b", "O") for one in y]
    params = {**QUICK, "tagging": "bio", "single_position_labels": "O"}
    model = SemiCRFSegmenter(**params, class_weight={"O": 0.5}).fit(X, tags)
    by_hand = means(tags, {"O": 0.5, "I-b": 1.0})
    assert_close_models(model, SemiCRFSegmenter(**params).fit(X, tags, sample_weight=by_hand))


def test_partial_fit_takes_a_dict_with_labels_that_may_come():
    X, y = data(2)
    model = SemiCRFSegmenter(**QUICK, class_weight={"b": 3.0, "c": 9.0})
    model.partial_fit(X, y, classes=["a", "b", "c"])
    plain = SemiCRFSegmenter(**QUICK)
    plain.partial_fit(X, y, classes=["a", "b", "c"], sample_weight=means(y, {"a": 1.0, "b": 3.0}))
    assert_close_models(model, plain)
    with pytest.raises(ValueError, match="pass a dict"):
        SemiCRFSegmenter(class_weight="balanced").partial_fit(X, y)


@pytest.mark.parametrize(
    ("class_weight", "message"),
    [
        ({"c": 1.0}, r"`class_weight` must be in \['a', 'b'\]; got 'c'"),
        ({"a": -1.0}, "finite and >= 0; got -1.0 for label 'a'"),
        ({"a": np.nan}, "finite and >= 0; got nan"),
        ({"a": "many"}, "finite and >= 0; got 'many'"),
        ({"a": 0, "b": 0}, "must not be 0 for all labels of `y`"),
        ("equal", "The 'class_weight' parameter"),
    ],
    ids=str,
)
def test_bad_class_weights_are_refused(class_weight, message):
    X, y = data(1)
    with pytest.raises(ValueError, match=message):
        SemiCRFSegmenter(class_weight=class_weight).fit(X, y)

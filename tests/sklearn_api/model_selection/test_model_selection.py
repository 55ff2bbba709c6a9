"""Splitters, cross_val_predict and scorers of positions, on models small enough to check."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sklearn_api.model_selection
from flash_semicrf.problem.segments import Segment
from sklearn_api import SemiCRFSegmenter, as_sequences
from sklearn_api._inputs.sequences import check_X, object_array
from sklearn_api._inputs.targets import check_y
from sklearn_api.metrics import (
    frame_error_rate,
    log_likelihood_scorer,
    make_position_scorer,
    make_segment_scorer,
)
from sklearn_api.model_selection import (
    SequenceGroupKFold,
    SequenceKFold,
    SequenceStratifiedKFold,
    cross_val_predict,
)
from sklearn_api.preprocessing import PerPosition, TokenFeatures

SPLITTERS = [SequenceKFold(3), SequenceKFold(3, shuffle=True, random_state=0)]


def ragged(lengths=(4, 7, 7, 5, 6, 3)):
    """Sequences of one column that counts all positions, and two labels."""
    stops = np.cumsum(lengths)
    X = [np.arange(b - n, b, dtype=float)[:, None] for n, b in zip(lengths, stops, strict=True)]
    y = [np.where(np.arange(len(x)) < len(x) // 2, "a", "b") for x in X]
    return X, y


class Recorder(ClassifierMixin, BaseEstimator):
    """Remembers the pieces it was fitted on; predicts what identifies position and fit."""

    def fit(self, X, y, weight=None):
        sequences = check_X(self, X, reset=True)
        self.classes_ = np.unique(check_y(y, sequences.layout).labels)
        self.pieces_ = [x[:, 0].tolist() for x in sequences.values]
        self.weight_ = weight
        return self

    def _many(self, X, function):
        sequences = check_X(self, X)
        return sequences.layout.restore([function(x[:, 0]) for x in sequences.values])

    def predict(self, X):
        # Whether the model was trained on the position or on its left neighbour.
        seen = set().union(*self.pieces_)
        return self._many(X, lambda x: np.array([int(v in seen or v - 1 in seen) for v in x]))

    def predict_proba(self, X):
        width = len(self.classes_)
        return self._many(X, lambda x: np.repeat(x[:, None] + 1, width, axis=1))

    def predict_segments(self, X):
        sequences = check_X(self, X)
        return [[Segment(0, len(x) - 1, "a")] for x in sequences.values]


def test_all_is_pinned():
    assert sklearn_api.model_selection.__all__ == [
        "SequenceGroupKFold",
        "SequenceKFold",
        "SequenceStratifiedKFold",
        "cross_val_predict",
    ]


# ---- splitters


@pytest.mark.parametrize("form", ["list", "objects", "3-D", "groups"])
@pytest.mark.parametrize("splitter", SPLITTERS, ids=["plain", "shuffled"])
def test_folds_partition_and_keep_sequences_whole(splitter, form):
    X, y = ragged((4, 4, 4, 4, 4, 4, 4))
    ids = np.repeat(np.arange(7), 4)
    groups = ids if form == "groups" else None
    X = {"list": X, "objects": object_array(X), "3-D": np.stack(X), "groups": np.concatenate(X)}[
        form
    ]
    folds = list(splitter.split(X, groups=groups))
    assert len(folds) == splitter.get_n_splits() == 3
    tested = np.concatenate([test for _, test in folds])
    assert sorted(tested) == list(range(len(X)))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(len(X)))
        if form == "groups":
            assert not set(ids[train]) & set(ids[test])


def test_blocks_of_one_sequence_are_contiguous_with_a_gap():
    folds = list(SequenceKFold(4, gap=2).split(np.zeros((22, 1))))
    assert [len(test) for _, test in folds] == [6, 6, 5, 5]
    for train, test in folds:
        assert (np.diff(test) == 1).all()
        left, right = train[train < test[0]], train[train > test[-1]]
        assert left.tolist() == list(range(max(0, test[0] - 2)))
        assert right.tolist() == list(range(test[-1] + 3, 22))


def test_shuffle_is_reproducible_and_shuffles():
    X, _ = ragged()
    one, two = SequenceKFold(3, shuffle=True, random_state=1), SequenceKFold(3)
    tests = [[test.tolist() for _, test in kfold.split(X)] for kfold in (one, one, two)]
    assert tests[0] == tests[1] != tests[2]


def test_stratified_spreads_majority_labels():
    labels = ["aab", "aba", "abb", "bab", "aaa", "bbb"]
    y = [np.array(list(text)) for text in labels]
    X = [np.zeros((3, 1))] * 6
    for _, test in SequenceStratifiedKFold(3, shuffle=True, random_state=0).split(X, y):
        assert sorted(text.count("a") > 1 for text in np.array(labels)[test]) == [False, True]
    # Segments instead of labels; background counts only where it is alone.
    y = [[(0, 2, "-"), (2, 3, "a")], [(0, 3, "-")], [(0, 3, "-")], [(0, 2, "-"), (2, 3, "a")]]
    for _, test in SequenceStratifiedKFold(2, ignore_label="-").split([np.zeros((3, 1))] * 4, y):
        assert sorted(len(y[i]) for i in test) == [1, 2]


def test_groups_stay_together_and_balance_positions():
    lengths = (40, 3, 4, 20, 13, 5)
    X, _ = ragged(lengths)
    groups = np.array(["p", "q", "r", "s", "q", "r"])
    folds = list(SequenceGroupKFold(2).split(X, groups=groups))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
    positions = [sum(lengths[i] for i in test) for _, test in folds]
    assert sorted(positions) == [40, 45]
    rows = np.repeat([5, 5, 2, 9], 3)
    for train, test in SequenceGroupKFold(3).split(np.zeros((12, 1)), groups=rows):
        assert not set(rows[train]) & set(rows[test])
        assert len(train) + len(test) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceKFold(1), r"`n_splits` must be an integer >= 2; got 1\."),
        (lambda: SequenceKFold(2, gap=-1), r"`gap` must be an integer >= 0; got -1\."),
        (lambda: SequenceKFold(2, random_state=0), "random_state"),
        (
            lambda: next(SequenceKFold(7).split(ragged()[0])),
            r"at most the number of sequences, 6; got 7\.",
        ),
        (
            lambda: next(SequenceKFold(3).split(np.zeros((2, 1)))),
            r"at most the number of rows, 2; got 3\.",
        ),
        (
            lambda: list(SequenceKFold(2, gap=3).split(np.zeros((6, 1)))),
            r"`gap` must leave training rows in every fold; got 3 with 6 rows",
        ),
        (
            lambda: next(SequenceStratifiedKFold(2).split(np.zeros((4, 1)), np.zeros(4))),
            r"SequenceStratifiedKFold splits whole sequences, and a 2-D `X` without `groups` is",
        ),
        (
            lambda: next(SequenceGroupKFold(2).split(ragged()[0])),
            r"`groups` must be given: one group per sequence; got None\.",
        ),
        (
            lambda: next(SequenceGroupKFold(2).split(ragged()[0], groups=[1, 2])),
            r"`groups` must have one entry per sequence, 6; got shape \(2,\)\.",
        ),
        (lambda: next(SequenceKFold(2).split([])), r"at least 1 sequence or row; got 0\."),
    ],
)
def test_splitters_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_splitters_show_and_route():
    assert repr(SequenceKFold(3, gap=2)) == (
        "SequenceKFold(gap=2, n_splits=3, random_state=None, shuffle=False)"
    )
    X, y = ragged()
    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(Recorder(), {}, cv=SequenceGroupKFold(2), scoring=lambda *_: 1.0)
        search.fit(X, y, groups=[0, 0, 1, 1, 2, 2])
    assert search.n_splits_ == 2


# ---- groups of rows


def as_rows():
    X, y = ragged((9, 12, 10, 11))
    rng = np.random.default_rng(0)
    X = [(one == "b")[:, None] + 0.3 * rng.normal(size=(len(one), 1)) for one in y]
    groups = np.repeat(["p", "q", "r", "s"], [len(x) for x in X])
    return np.concatenate(X), np.concatenate(y), groups


def test_groups_of_rows_that_would_reach_only_the_splitter_are_refused():
    X, y, groups = as_rows()
    message = r"`groups` of the rows .* reach only the splitter.*`as_sequences\(X, groups\)`"
    for cv in (SequenceKFold(2), SequenceGroupKFold(2)):
        with pytest.raises(ValueError, match=message):
            cross_val_score(Recorder(), X, y, groups=groups, cv=cv)
        with pytest.raises(ValueError, match=message):
            GridSearchCV(Recorder(), {}, cv=cv, scoring=lambda *_: 1.0).fit(X, y, groups=groups)
        assert len(list(cv.split(X, y, groups))) == 2


@pytest.mark.parametrize(
    "scoring",
    [
        None,
        make_position_scorer(accuracy_score),
        make_segment_scorer(frame_error_rate),
        log_likelihood_scorer,
    ],
    ids=repr,
)
def test_groups_of_rows_are_routed_to_fit_and_score(scoring):
    X, y, groups = as_rows()
    model = SemiCRFSegmenter(max_epochs=1, random_state=0)
    options = {"cv": SequenceKFold(2), "scoring": scoring, "error_score": "raise"}
    nested = as_sequences(X, groups), as_sequences(y, groups)
    expected = cross_val_score(model, *nested, **options)
    with sklearn.config_context(enable_metadata_routing=True):
        model.set_fit_request(groups=True).set_score_request(groups=True)
        routed = cross_val_score(model, X, y, params={"groups": groups}, **options)
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError):
            cross_val_score(
                clone(model).set_fit_request(groups=None),
                X,
                y,
                params={"groups": groups},
                **options,
            )
    np.testing.assert_allclose(routed, expected, rtol=1e-5)
    assert pickle.loads(pickle.dumps(log_likelihood_scorer)).__name__ == "log_likelihood_scorer"


# ---- cross_val_predict


def test_every_sequence_is_predicted_without_itself():
    X, y = ragged()
    for form in (X, object_array(X)):
        out = cross_val_predict(Recorder(), form, y, cv=3)
        assert isinstance(out, np.ndarray)
        assert out.dtype == object
        assert [o.shape for o in out] == [labels.shape for labels in y]
        assert all((o[1:] == 0).all() for o in out)
        proba = cross_val_predict(Recorder(), form, y, cv=3, method="predict_proba")
        for p, x in zip(proba, X, strict=True):
            np.testing.assert_array_equal(p, np.repeat(x + 1, 2, axis=1))


def test_equal_lengths_stay_an_object_array():
    X, y = ragged((4, 4, 4))
    proba = cross_val_predict(Recorder(), X, y, cv=3, method="predict_proba")
    assert proba.shape == (3,)
    assert proba.dtype == object


def test_rows_of_one_sequence_are_not_glued():
    X, y = ragged((30,))
    X, y = X[0], y[0]
    seen = []

    class Spy(Recorder):
        def fit(self, X, y, weight=None):
            seen.append(([x[:, 0].astype(int).tolist() for x in X], weight))
            return super().fit(X, y)

    out = cross_val_predict(
        Spy(), X, y, cv=SequenceKFold(3, gap=2), params={"weight": np.arange(30)}
    )
    assert out.shape == (30,)
    # No test row is trained on; with a gap, nor is its left neighbour.
    assert (out == 0).all()
    assert [pieces for pieces, _ in seen] == [
        [list(range(12, 30))],
        [list(range(8)), list(range(22, 30))],
        [list(range(18))],
    ]
    assert [w.tolist() for w in seen[1][1]] == seen[1][0]
    segments = cross_val_predict(Recorder(), X, y, cv=3, method="predict_segments")
    assert [(s.start, s.end) for s in segments] == [(0, 9), (10, 19), (20, 29)]


def test_rows_with_groups_are_sequences():
    X, y = ragged()
    ids = np.repeat(np.arange(6), [len(x) for x in X])
    rows, labels = np.concatenate(X), np.concatenate(y)
    out = cross_val_predict(Recorder(), rows, labels, groups=ids, cv=2, method="predict_proba")
    np.testing.assert_array_equal(out, np.repeat(rows + 1, 2, axis=1))
    segments = cross_val_predict(
        Recorder(), rows, labels, groups=ids, cv=2, method="predict_segments"
    )
    assert [[(s.start, s.end) for s in one] for one in segments] == [[(0, len(x) - 1)] for x in X]


def test_rows_of_frames_with_an_index_of_their_own():
    pd = pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")
    X, y, groups = as_rows()
    index = pd.date_range("2026-01-01", periods=len(y))
    series = pd.Series(y, index=index)
    for given in (None, groups):
        found = cross_val_predict(Recorder(), X, series, groups=given, cv=2)
        np.testing.assert_array_equal(
            found, cross_val_predict(Recorder(), X, y, groups=given, cv=2)
        )
    frame = pd.DataFrame(X, columns=["u"], index=index)
    scores = cross_val_score(Recorder(), frame, series, cv=SequenceKFold(2), scoring=lambda *_: 1.0)
    assert scores.tolist() == [1.0, 1.0]


def test_tokens_are_sequences_too():
    X = [[{"w": c} for c in text] for text in ("abab", "bbaa", "aabb", "abbb")]
    y = [np.array([token["w"] for token in one]) for one in X]
    assert [test.tolist() for _, test in SequenceKFold(2).split(X)] == [[0, 1], [2, 3]]
    pipeline = make_pipeline(TokenFeatures(), SemiCRFSegmenter(max_epochs=1, random_state=0))
    found = cross_val_predict(pipeline, X, y, cv=2)
    assert [one.shape for one in found] == [(4,)] * 4
    assert (pipeline.fit(iter(X), y).predict(iter(X))[0] == pipeline.predict(X)[0]).all()


def test_parameters_of_fit_are_split_with_the_sequences():
    X, y = ragged()
    seen = []

    class Spy(Recorder):
        def fit(self, X, y, weight=None):
            seen.append(list(weight))
            return super().fit(X, y)

    cross_val_predict(Spy(), X, y, cv=3, params={"weight": np.arange(6)})
    assert seen == [[2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3]]


def test_columns_of_unseen_labels_are_zero():
    X, _ = ragged((2, 2))
    y = [np.array(["a", "c"]), np.array(["b", "b"])]
    with pytest.warns(RuntimeWarning, match=r"set holds the labels .* of \['a', 'b', 'c'\]"):
        proba = cross_val_predict(Recorder(), X, y, cv=2, method="predict_proba")
    np.testing.assert_array_equal(proba[0], [[0, 1, 0], [0, 2, 0]])
    np.testing.assert_array_equal(proba[1], [[3, 0, 3], [4, 0, 4]])


def test_cross_val_predict_refuses():
    X, y = ragged()
    with pytest.raises(ValueError, match=r"`method` must be one of predict, .*; got 'transform'"):
        cross_val_predict(Recorder(), X, y, method="transform")
    with pytest.raises(ValueError, match=r"each of the 6 entries of `X` once; got index 1 0 times"):
        cross_val_predict(Recorder(), X, y, cv=[(np.array([1]), np.array([0, 2, 3, 4, 5]))])
    with pytest.raises(ValueError, match=r"once; got index 6 1 times"):
        cross_val_predict(Recorder(), X, y, cv=[(np.array([1]), np.arange(7))])
    with pytest.raises(ValueError, match=r"one label per row of a 2-D `X`; got segments"):
        cross_val_predict(Recorder(), X[0], [(0, 4, "a")], cv=2)
    with pytest.raises(AttributeError, match=r"must have the method 'predict_boundary_proba'"):
        cross_val_predict(Recorder(), X, y, cv=2, method="predict_boundary_proba")


def test_cross_val_predict_of_a_pipeline_is_its_fold():
    rng = np.random.default_rng(0)
    X, y = ragged((9, 12, 10, 11))
    X = [
        (labels == "b")[:, None] + 0.3 * rng.normal(size=x.shape)
        for x, labels in zip(X, y, strict=True)
    ]
    pipeline = make_pipeline(
        PerPosition(StandardScaler()), SemiCRFSegmenter(max_epochs=2, random_state=0)
    )
    segments = cross_val_predict(pipeline, X, y, cv=2, method="predict_segments")
    boundary = cross_val_predict(pipeline, X, y, cv=2, method="predict_boundary_proba")
    pipeline.fit(X[2:], y[2:])
    scaled = pipeline[:-1].transform(X[:2])
    assert segments[:2] == pipeline[-1].predict_segments(scaled)
    expected = pipeline[-1].predict_boundary_proba(scaled)
    for found, one in zip(boundary[:2], expected, strict=True):
        np.testing.assert_array_equal(found, one)
    scorer = make_segment_scorer(frame_error_rate, response_method="predict_segments")
    assert scorer(pipeline, X, y) <= 0


# ---- scorers of positions


def test_position_scorers_match_the_flat_metric():
    rng = np.random.default_rng(1)
    X, y = ragged((9, 12))
    X = [
        (labels == "b")[:, None] + rng.normal(size=x.shape) for x, labels in zip(X, y, strict=True)
    ]
    model = SemiCRFSegmenter(max_epochs=3, random_state=0).fit(X, y)
    gold, proba = np.concatenate(y), np.concatenate(list(model.predict_proba(X)))
    accuracy = make_position_scorer(accuracy_score)
    assert accuracy(model, X, y) == model.score(X, y)
    loss = make_position_scorer(log_loss, greater_is_better=False, response_method="predict_proba")
    assert loss(model, X, y) == -log_loss(gold, proba[:, 1], labels=["a", "b"])
    # A fold with one label only still has two columns.
    only = [X[0][:4]], [y[0][:4]]
    assert set(only[1][0]) == {"a"}
    assert np.isfinite(loss(model, *only))
    auc = make_position_scorer(roc_auc_score, response_method="predict_proba")
    assert pickle.loads(pickle.dumps(auc))(model, X, y) == roc_auc_score(gold, proba[:, 1])
    assert auc(model, X[0], y[0]) == auc(model, X[:1], y[:1])
    assert repr(loss) == (
        "make_position_scorer(log_loss, greater_is_better=False, response_method='predict_proba')"
    )


def test_log_likelihood_scorer_is_per_position():
    X, y = ragged((9, 9))
    pipeline = make_pipeline(
        PerPosition(StandardScaler()), SemiCRFSegmenter(max_epochs=1, random_state=0)
    ).fit(X, y)
    value = pipeline[-1].log_likelihood(pipeline[:-1].transform(X), y)
    np.testing.assert_allclose(log_likelihood_scorer(pipeline, X, y), value.sum() / 18, rtol=1e-12)
    scores = cross_val_score(pipeline, X, y, cv=SequenceKFold(2), scoring=log_likelihood_scorer)
    assert (scores < 0).all()


def test_position_scorer_refuses():
    with pytest.raises(TypeError, match=r"`metric` must be a function of .*; got 'accuracy'"):
        make_position_scorer("accuracy")
    with pytest.raises(ValueError, match=r"'predict' or 'predict_proba'; got 'decision_function'"):
        make_position_scorer(accuracy_score, response_method="decision_function")

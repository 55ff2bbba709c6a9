"""Metrics of segmentations against small cases by hand and against brute force."""

from __future__ import annotations

import doctest
import importlib
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.model_selection import KFold, cross_validate

import sklearn_api.metrics
from flash_semicrf.problem.segments import Segment
from sklearn_api.datasets import load_gene_structure, make_segmentations
from sklearn_api.metrics import (
    PrecisionRecallF1,
    boundary_errors,
    boundary_precision_recall_f1,
    covering,
    frame_error_rate,
    make_segment_scorer,
    segment_error_rate,
    segment_precision_recall_f1,
)
from sklearn_api.metrics._matching import match_in_order


def as_object_array(sequences):
    packed = np.empty(len(sequences), dtype=object)
    for i, sequence in enumerate(sequences):
        packed[i] = sequence
    return packed


def runs(labels):
    cuts = [0] + [t for t in range(1, len(labels)) if labels[t] != labels[t - 1]] + [len(labels)]
    return [(a, b, labels[a]) for a, b in zip(cuts, cuts[1:], strict=False)]


@st.composite
def label_pairs(draw, max_sequences=3, max_positions=25, alphabet="abc"):
    """Two lists of label sequences with equal lengths."""
    lengths = draw(st.lists(st.integers(1, max_positions), min_size=1, max_size=max_sequences))
    letters = st.sampled_from(alphabet)
    return tuple(
        [draw(st.lists(letters, min_size=n, max_size=n)) for n in lengths] for _ in range(2)
    )


def oracle_matching(true, pred, tolerance):
    """Number of pairs and sum of differences of the best matching, by assignment."""
    if len(true) == 0 or len(pred) == 0:
        return 0, 0
    apart = np.abs(true[:, None, :] - pred[None, :, :])
    fits = apart.max(axis=-1) <= tolerance
    gain = np.where(fits, 10**6 - apart.sum(axis=-1), 0)
    i, j = linear_sum_assignment(gain, maximize=True)
    kept = fits[i, j]
    return int(kept.sum()), int(apart.sum(axis=-1)[i, j][kept].sum())


def test_all_is_pinned():
    assert sklearn_api.metrics.__all__ == [
        "PrecisionRecallF1",
        "boundary_errors",
        "boundary_precision_recall_f1",
        "chunk_precision_recall_f1",
        "covering",
        "frame_error_rate",
        "log_likelihood_scorer",
        "make_position_scorer",
        "make_segment_scorer",
        "segment_error_rate",
        "segment_precision_recall_f1",
    ]


@pytest.mark.parametrize("name", ["_boundaries", "_errors", "_scorers", "_segments"])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"sklearn_api.metrics.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# ---- matching


@given(
    true=st.sets(st.integers(0, 40), max_size=12),
    pred=st.sets(st.integers(0, 40), max_size=12),
    tolerance=st.integers(0, 45),
)
def test_matching_of_boundaries_is_optimal(true, pred, tolerance):
    true, pred = (np.array(sorted(s), dtype=np.int64).reshape(-1, 1) for s in (true, pred))
    i, j = match_in_order(true, pred, tolerance)
    assert (np.diff(i) > 0).all()
    assert (np.diff(j) > 0).all()
    apart = np.abs(true[i] - pred[j])
    assert (apart <= tolerance).all()
    assert (len(i), int(apart.sum())) == oracle_matching(true, pred, tolerance)


@given(pair=label_pairs(max_sequences=1, max_positions=40), tolerance=st.integers(0, 12))
def test_matching_of_segments_is_optimal(pair, tolerance):
    true, pred = (
        np.array([(a, b) for a, b, label in runs(y[0]) if label == "a"], dtype=np.int64).reshape(
            -1, 2
        )
        for y in pair
    )
    i, j = match_in_order(true, pred, tolerance)
    apart = np.abs(true[i] - pred[j])
    assert (apart <= tolerance).all()
    assert (len(i), int(apart.sum())) == oracle_matching(true, pred, tolerance)


def test_matching_prefers_pairs_to_small_distances():
    # Pairing 10 with 10 would leave 12 and 8 without partner.
    true, pred = np.array([[10], [12]]), np.array([[8], [10]])
    i, j = match_in_order(true, pred, 2)
    assert [i.tolist(), j.tolist()] == [[0, 1], [0, 1]]


# ---- precision, recall, F1


def test_segment_scores_by_hand():
    y_true = list("aaabbbccc")
    y_pred = list("aaabbcccc")
    scores = segment_precision_recall_f1(y_true, y_pred)
    assert scores == (1 / 3, 1 / 3, 1 / 3)
    assert segment_precision_recall_f1(y_true, y_pred, tolerance=1) == (1, 1, 1)
    by_label = segment_precision_recall_f1(y_true, y_pred, average=None)
    assert isinstance(by_label, PrecisionRecallF1)
    assert by_label.f1.tolist() == [1, 0, 0]
    ordered = segment_precision_recall_f1(y_true, y_pred, average=None, labels=["c", "a"])
    assert ordered.f1.tolist() == [0, 1]


def test_segment_scores_need_both_ends_and_the_label():
    y_true = [(0, 10, "a"), (10, 20, "b")]
    assert segment_precision_recall_f1(y_true, [(0, 13, "a"), (13, 20, "b")], tolerance=2).f1 == 0
    assert segment_precision_recall_f1(y_true, [(0, 10, "b"), (10, 20, "a")], tolerance=2).f1 == 0
    assert segment_precision_recall_f1(y_true, [(0, 12, "a"), (12, 20, "b")], tolerance=2).f1 == 1


def test_micro_and_macro_averages():
    y_true = [list("aabaabaab"), list("c")]
    y_pred = [list("aabaabaaa"), list("c")]
    micro = segment_precision_recall_f1(y_true, y_pred)
    # True: 3 a, 3 b, 1 c. Predicted: 3 a (the last too long), 2 b, 1 c.
    assert micro.precision == pytest.approx(5 / 6)
    assert micro.recall == pytest.approx(5 / 7)
    macro = segment_precision_recall_f1(y_true, y_pred, average="macro")
    assert macro.precision == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert macro.recall == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert macro.f1 == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)


def test_adjacent_segments_of_one_label_count_as_two():
    y_true = [(0, 3, "a"), (3, 6, "a")]
    assert segment_precision_recall_f1(y_true, y_true).recall == 1
    with pytest.warns(UndefinedMetricWarning):
        empty = segment_precision_recall_f1(y_true, [])
    assert empty == (0, 0, 0)
    assert segment_precision_recall_f1(y_true, ["a"] * 6, tolerance=3).precision == 1
    assert segment_precision_recall_f1(y_true, ["a"] * 6, tolerance=3).recall == 0.5


def test_matches_do_not_cross_sequences():
    y_true = [[(0, 2, "a")], [(5, 7, "a")]]
    y_pred = [[(5, 7, "a")], [(0, 2, "a")]]
    for tolerance in (0, 4, 4.9):
        assert segment_precision_recall_f1(y_true, y_pred, tolerance=tolerance).f1 == 0
        assert boundary_precision_recall_f1(y_true, y_pred, tolerance=tolerance).f1 == 0
    assert segment_precision_recall_f1(y_true, y_pred, tolerance=5).f1 == 1
    assert boundary_precision_recall_f1(y_true, y_pred, tolerance=np.inf).f1 == 1


def test_boundary_scores_by_hand():
    y_true = list("--PP--TTT-")
    y_pred = list("--PPP--TTT")
    score = boundary_precision_recall_f1
    for kind, tolerance, expected in [
        ("onset", 0, 1 / 2),
        ("offset", 0, 0),
        ("both", 0, 1 / 4),
        ("both", 1, 1),
        ("onset", 0.99, 1 / 2),
    ]:
        got = score(y_true, y_pred, ignore_label="-", kind=kind, tolerance=tolerance)
        assert got == (expected, expected, expected)
    by_label = score(y_true, y_pred, labels=["P", "T"], kind="onset", average=None)
    assert by_label.recall.tolist() == [1, 0]


def test_two_predicted_boundaries_near_one_true_match_once():
    y_true = [(10, 20, "a")]
    y_pred = [(9, 10, "a"), (11, 20, "a")]
    scores = boundary_precision_recall_f1(y_true, y_pred, tolerance=3, kind="onset")
    assert scores == (0.5, 1.0, pytest.approx(2 / 3))


def test_boundary_errors_by_hand():
    y_true = [[(10, 20, "P"), (30, 50, "T")], [(5, 9, "P")]]
    y_pred = [[(12, 19, "P"), (30, 58, "T")], [(4, 9, "P")]]
    onsets = boundary_errors(y_true, y_pred, tolerance=3, kind="onset")
    assert {label: e.tolist() for label, e in onsets.items()} == {"P": [2, -1], "T": [0]}
    offsets = boundary_errors(y_true, y_pred, tolerance=3, kind="offset")
    assert {label: e.tolist() for label, e in offsets.items()} == {"P": [-1, 0], "T": []}
    both = boundary_errors(y_true, y_pred, tolerance=np.inf, labels=["T"])
    assert {label: e.tolist() for label, e in both.items()} == {"T": [0, 8]}


def test_boundary_errors_take_the_nearest_partner():
    y_true = [(100, 110, "a")]
    y_pred = [(70, 75, "a"), (100, 110, "a"), (130, 131, "a")]
    errors = boundary_errors(y_true, y_pred, tolerance=38, kind="onset")
    assert errors["a"].tolist() == [0]


@given(pair=label_pairs(), tolerance=st.integers(0, 6), average=st.sampled_from(["micro", None]))
@pytest.mark.parametrize(
    "metric", [segment_precision_recall_f1, boundary_precision_recall_f1], ids=["segment", "edge"]
)
def test_scores_are_symmetric_and_grow_with_tolerance(metric, pair, tolerance, average):
    y_true, y_pred = pair
    options = {"average": average, "zero_division": 0.0}
    one = metric(y_true, y_pred, tolerance=tolerance, **options)
    two = metric(y_pred, y_true, tolerance=tolerance, **options)
    np.testing.assert_array_equal(one.precision, two.recall)
    np.testing.assert_array_equal(one.f1, two.f1)
    wider = metric(y_true, y_pred, tolerance=tolerance + 1, **options)
    assert np.all(wider.f1 >= one.f1)
    assert np.all((np.asarray(one) >= 0) & (np.asarray(one) <= 1))


@given(pair=label_pairs(), tolerance=st.integers(0, 6))
def test_segment_scores_equal_counting_by_assignment(pair, tolerance):
    y_true, y_pred = pair
    matched = n_true = n_pred = 0
    for true, pred in zip(y_true, y_pred, strict=True):
        for label in "abc":
            points = [
                np.array([s[:2] for s in runs(y) if s[2] == label], dtype=np.int64).reshape(-1, 2)
                for y in (true, pred)
            ]
            matched += oracle_matching(*points, tolerance)[0]
            n_true += len(points[0])
            n_pred += len(points[1])
    scores = segment_precision_recall_f1(y_true, y_pred, tolerance=tolerance)
    assert scores == pytest.approx(
        (matched / n_pred, matched / n_true, 2 * matched / (n_true + n_pred))
    )


@given(pair=label_pairs())
def test_truth_against_itself_is_perfect(pair):
    y = pair[0]
    assert segment_precision_recall_f1(y, y) == (1, 1, 1)
    assert boundary_precision_recall_f1(y, y, average="macro") == (1, 1, 1)
    assert all((e == 0).all() for e in boundary_errors(y, y, tolerance=np.inf).values())
    assert segment_error_rate(y, y) == 0
    assert frame_error_rate(y, y) == 0
    assert covering(y, y) == 1


# ---- zero division


def test_undefined_scores_warn_and_can_be_set():
    y_true, y_pred = ["a", "a"], ["b", "b"]
    with pytest.warns(
        UndefinedMetricWarning, match=r"0\.0 where undefined: recall \(nothing true\)"
    ):
        scores = segment_precision_recall_f1(y_true, y_pred, labels=["b"])
    assert scores == (0, 0, 0)
    assert segment_precision_recall_f1(y_true, y_pred, labels=["b"], zero_division=1).recall == 1
    macro = segment_precision_recall_f1(y_true, ["a", "b"], average="macro", zero_division=np.nan)
    assert macro.recall == 0
    assert macro.precision == 0
    nothing = segment_precision_recall_f1(
        y_true, ["a", "a"], ignore_label="a", average="macro", zero_division=np.nan
    )
    assert np.isnan(nothing).all()


def test_undefined_warning_names_every_score():
    message = r"precision \(nothing predicted\), recall .*, F1 \(nothing true or predicted\)"
    with pytest.warns(UndefinedMetricWarning, match=message):
        segment_precision_recall_f1(["a"], ["a"], ignore_label="a")


# ---- error rates and covering


def levenshtein(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = min(
            table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j])
        )
    return table[-1, -1]


@given(pair=label_pairs())
def test_segment_error_rate_equals_edit_distance(pair):
    y_true, y_pred = pair
    edits = n_true = 0
    for true, pred in zip(y_true, y_pred, strict=True):
        a, b = ([label for *_, label in runs(y) if label != "c"] for y in (true, pred))
        edits += levenshtein(a, b)
        n_true += len(a)
    if n_true == 0:
        with pytest.raises(ValueError, match="at least one segment to divide by; got 0"):
            segment_error_rate(y_true, y_pred, ignore_label="c")
    else:
        rate = segment_error_rate(y_true, y_pred, ignore_label="c")
        assert rate == pytest.approx(edits / n_true)


def test_segment_error_rate_by_hand():
    assert segment_error_rate(list("-a-b-"), list("-a---"), ignore_label="-") == 0.5
    assert segment_error_rate(list("a-a"), list("aaa"), ignore_label="-") == 0.5
    assert segment_error_rate(["a"], list("abcab"[:1]), ignore_label="-") == 0
    assert segment_error_rate(list("aaaaa"), list("abcab")) == 4
    assert segment_error_rate([(0, 2, "a")], []) == 1


@given(pair=label_pairs())
def test_frame_error_rate_counts_positions(pair):
    y_true, y_pred = pair
    true, pred = (np.concatenate([np.array(s) for s in y]) for y in pair)
    assert frame_error_rate(y_true, y_pred) == pytest.approx(np.mean(true != pred))
    if (true != "a").any():
        expected = np.mean((true != pred)[true != "a"])
        assert frame_error_rate(y_true, y_pred, ignore_label="a") == pytest.approx(expected)
    segments = [[(a, b, label) for a, b, label in runs(s)] for s in y_pred]
    assert frame_error_rate(y_true, segments) == pytest.approx(np.mean(true != pred))


@given(pair=label_pairs())
def test_covering_equals_its_definition(pair):
    y_true, y_pred = pair
    covered = total = 0
    for true, pred in zip(y_true, y_pred, strict=True):
        sets = [[set(range(a, b)) for a, b, label in runs(y) if label != "c"] for y in (true, pred)]
        for s in sets[0]:
            covered += len(s) * max((len(s & t) / len(s | t) for t in sets[1]), default=0)
            total += len(s)
    if total:
        score = covering(y_true, y_pred, ignore_label="c")
        assert score == pytest.approx(covered / total)


def test_covering_ignores_labels_and_gaps():
    assert covering(list("aabb"), list("bbaa")) == 1
    assert covering([(0, 4, "a")], [(2, 4, "a"), (10, 12, "a")]) == 0.5
    assert covering([(0, 4, "a")], []) == 0
    with pytest.raises(ValueError, match="at least one segment to divide by; got 0 with ignore"):
        covering(["a"], ["a"], ignore_label="a")


def test_long_sequences_are_quick():
    genes = load_gene_structure()
    y = genes.y[-1]
    shifted = np.concatenate([y[:3], y[:-3]])
    scores = segment_precision_recall_f1(y, shifted, tolerance=3, ignore_label="intergenic")
    assert scores.f1 == 1
    errors = boundary_errors(y, shifted, tolerance=5, labels=["CDS+"], kind="onset")
    assert (errors["CDS+"] == 3).all()


# ---- scorers


class Nearest(ClassifierMixin, BaseEstimator):
    """Labels every position by the sign of its feature."""

    def fit(self, X, y):
        return self

    def predict(self, X):
        return as_object_array([(x[:, 0] > 0).astype(int) for x in X])

    def predict_segments(self, X):
        return [
            [Segment(a, b - 1, label) for a, b, label in runs(labels)] for labels in self.predict(X)
        ]


@pytest.fixture
def toy():
    _, y = make_segmentations(6, (30, 40), n_labels=2, random_state=0)
    noise = np.random.default_rng(0)
    X = as_object_array([(s - 0.5 + noise.normal(0, 0.3, len(s)))[:, None] for s in y])
    return X, y


def test_scorer_equals_metric(toy):
    X, y = toy
    model = Nearest()
    f1 = segment_precision_recall_f1(y, model.predict(X), tolerance=2).f1
    assert 0 < f1 < 1
    for response in ("predict", "predict_segments"):
        scorer = make_segment_scorer(
            segment_precision_recall_f1, tolerance=2, response_method=response
        )
        assert scorer(model, X, y) == pytest.approx(f1)


@pytest.mark.parametrize("metric", [segment_error_rate, frame_error_rate])
def test_scorer_negates_errors(metric, toy):
    X, y = toy
    error = metric(y, Nearest().predict(X))
    assert error > 0
    assert make_segment_scorer(metric)(Nearest(), X, y) == -error
    assert make_segment_scorer(metric, greater_is_better=True)(Nearest(), X, y) == error


def test_scorer_in_cross_validation(toy):
    X, y = toy
    scoring = {
        "f1": make_segment_scorer(segment_precision_recall_f1, tolerance=1),
        "errors": make_segment_scorer(segment_error_rate),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cross_validate(Nearest(), X, y, cv=KFold(3), scoring=scoring)
    assert result["test_f1"].shape == (3,)
    assert (result["test_errors"] <= 0).all()


def test_scorer_pickles(toy):
    X, y = toy
    scorer = make_segment_scorer(covering)
    again = pickle.loads(pickle.dumps(scorer))
    assert again(Nearest(), X, y) == scorer(Nearest(), X, y)
    assert repr(again) == "make_segment_scorer(covering)"
    scorer = make_segment_scorer(
        frame_error_rate, response_method="predict_segments", ignore_label=0
    )
    assert repr(scorer) == (
        "make_segment_scorer(frame_error_rate, greater_is_better=False, "
        "response_method='predict_segments', ignore_label=0)"
    )


def test_scorer_refuses(toy):
    with pytest.raises(TypeError, match=r"`metric` must be a function .*; got 'f1'\."):
        make_segment_scorer("f1")
    with pytest.raises(ValueError, match=r"`response_method` must be .*; got 'predict_proba'\."):
        make_segment_scorer(covering, response_method="predict_proba")
    scorer = make_segment_scorer(segment_precision_recall_f1, average=None)
    with pytest.raises(ValueError, match=r"`metric` must return one number .*; segment_prec"):
        scorer(Nearest(), *toy)

"""`predict_topk`, `sample` and `entropy`: against all segmentations of short sequences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flash_semicrf.testing import enumerate_segmentations
from sklearn_api import SemiCRFSegmenter
from sklearn_api._responses import get_response
from sklearn_api.preprocessing import PerPosition
from tests.sklearn_api.comparisons import assert_same_segments

LENGTHS = (5, 3, 4, 1)


def data(seed=0):
    rng = np.random.default_rng(seed)
    y = [np.repeat(["a", "b", "a"], rng.integers(2, 5, 3)) for _ in range(6)]
    X = [(one == "b")[:, None] + rng.normal(size=(len(one), 2)) for one in y]
    return X, y


def fitted(**options):
    # Scores of boundaries tell two neighbours of one label from the same two in the other order.
    settings = {"solver": "lbfgs", "dtype": "float64", "max_duration": 4, "boundary_scores": True}
    return SemiCRFSegmenter(**{**settings, **options}).fit(*data())


@pytest.fixture(scope="module")
def model():
    return fitted()


@pytest.fixture(scope="module")
def short():
    """Sequences so short that all their segmentations can be listed."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(length, 2)) for length in LENGTHS]


def tuples(segments):
    return [(s.start, s.end + 1, s.label) for s in segments]


def everything(model, x, longest=None):
    """All segmentations of a sequence, with their log-probabilities."""
    longest = longest or model.max_duration_
    names = model.classes_.tolist()
    found = [
        [(start, stop, names[c]) for start, stop, c in y]
        for y in enumerate_segmentations(len(x), longest, len(names))
    ]
    return found, model.log_likelihood([x] * len(found), found)


def test_topk_are_the_most_probable_in_order(model, short):
    for x, found in zip(short, model.predict_topk(short, 7), strict=True):
        segmentations, log_p = everything(model, x)
        assert np.exp(log_p).sum() == pytest.approx(1.0)
        order = np.argsort(-log_p)[:7]
        assert [tuples(y) for y in found] == [segmentations[i] for i in order]
        scores = [sum(s.score for s in y) for y in found]
        np.testing.assert_allclose(np.diff(scores), np.diff(log_p[order]), atol=1e-9)
    ranked, best = model.predict_topk(short, 1), model.predict_segments(short)
    for (first,), segments in zip(ranked, best, strict=True):
        assert_same_segments(first, segments)


def test_topk_lists_no_more_than_there_are(model, short):
    counts = [len(everything(model, x)[0]) for x in short]
    assert [len(found) for found in model.predict_topk(short, 500)] == counts
    assert min(counts) == 2 and max(counts) < 500


def test_samples_have_their_probabilities(model, short):
    for x, drawn in zip(short, model.sample(short, 2000, random_state=0), strict=True):
        segmentations, log_p = everything(model, x)
        index = {tuple(y): i for i, y in enumerate(segmentations)}
        counts = np.bincount([index[tuple(tuples(y))] for y in drawn], minlength=len(index))
        deviation = np.sqrt(2000 * np.exp(log_p))
        assert (np.abs(counts - 2000 * np.exp(log_p)) <= 5 * deviation + 3).all()
    scores = {tuple(tuples(y)): sum(s.score for s in y) for y in model.predict_topk(short[1], 99)}
    for y in model.sample(short[1], 20, random_state=1):
        assert sum(s.score for s in y) == pytest.approx(scores[tuple(tuples(y))])


def test_random_state_fixes_samples(model, short):
    assert model.sample(short, 3, random_state=5) == model.sample(short, 3, random_state=5)
    assert model.sample(short, 3, random_state=5) != model.sample(short, 3, random_state=6)
    rng = np.random.RandomState(5)
    first = model.sample(short, 3, rng)
    assert first == model.sample(short, 3, random_state=5) != model.sample(short, 3, rng)
    assert [len(drawn) for drawn in model.sample(short)] == [1] * len(short)


def test_samples_of_equal_sequences_in_different_batches_differ(model):
    x = np.zeros((40, 2))
    small = fitted(window_length=50)  # one sequence a batch
    first, second = small.sample([x, x], 2, random_state=0)
    assert first[0] != second[0] and first[1] != second[1]
    ranked = (one.predict_topk([x, x[:30]], 3) for one in (small, model))
    for alone, together in zip(*ranked, strict=True):
        for segments, expected in zip(alone, together, strict=True):
            assert_same_segments(segments, expected)
    np.testing.assert_allclose(small.entropy([x, x[:30]]), model.entropy([x, x[:30]]))


@pytest.mark.parametrize("options", [{}, {"min_duration": {"b": 2}, "boundary_scores": False}])
def test_entropy_is_minus_the_mean_log_probability(short, options):
    model = fitted(**options)
    expected = []
    for x in short:
        log_p = everything(model, x)[1]
        possible = log_p[log_p > -np.inf]
        expected.append(-(np.exp(possible) * possible).sum())
    np.testing.assert_allclose(model.entropy(short), expected, atol=1e-9)


def test_outputs_are_nested_as_x(model, short):
    one, rows = short[0], np.concatenate(short)
    groups = np.repeat(np.arange(len(short)), LENGTHS)
    assert model.predict_topk(one, 2) == model.predict_topk([one], 2)[0]
    assert model.predict_topk(rows, 2, groups) == model.predict_topk(short, 2)
    assert model.sample(one, 2, random_state=0) == model.sample([one], 2, random_state=0)[0]
    assert model.sample(rows, 2, 0, groups=groups) == model.sample(short, 2, random_state=0)
    assert isinstance(model.entropy(one), float)
    assert model.entropy(one) == model.entropy([one])[0]
    np.testing.assert_array_equal(model.entropy(rows, groups), model.entropy(short))


def test_sparse_features_of_tags():
    X, y = data()
    tags = [np.where(one == "b", "I-b", "O") for one in y]
    model = SemiCRFSegmenter(
        solver="lbfgs", dtype="float64", tagging="bio", single_position_labels="O"
    )
    sparse = [sp.csr_array(x) for x in X]
    model.fit(sparse, tags)
    for segmentations in [*model.predict_topk(sparse, 3), *model.sample(sparse, 3, 0)]:
        for segments in segmentations:
            assert all(s.label in ("O", "b") for s in segments)
            assert all(s.duration == 1 for s in segments if s.label == "O")
    np.testing.assert_allclose(model.entropy(sparse), model.entropy(X))
    assert_same_segments(model.predict_topk(sparse, 3)[0][0], model.predict_segments(sparse)[0])


def test_other_encoders_and_tails():
    X, y = data()
    model = SemiCRFSegmenter(
        "cnn", hidden_size=4, num_layers=1, max_duration=2, duration_tail=-0.2,
        boundary_scores=True, max_epochs=2, random_state=0, dtype="float64",
    ).fit(X, y)  # fmt: skip
    x = np.random.default_rng(2).normal(size=(4, 2))
    segmentations, log_p = everything(model, x, longest=4)
    best = model.predict_topk(x, 3)
    assert [tuples(s) for s in best] == [segmentations[i] for i in np.argsort(-log_p)[:3]]
    assert model.entropy(x) == pytest.approx(-(np.exp(log_p) * log_p).sum())
    drawn = [model.sample(x, 30, random_state=0) for _ in range(2)]
    assert drawn[0] == drawn[1] and max(s.duration for y in drawn[0] for s in y) > 2


def test_pipelines_reach_them(short):
    X, y = data()
    pipeline = make_pipeline(PerPosition(StandardScaler()), SemiCRFSegmenter(solver="lbfgs"))
    pipeline.fit(X, y)
    scaled, last = pipeline[:-1].transform(short), pipeline[-1]
    assert get_response(pipeline, "predict_topk")(short, 2) == last.predict_topk(scaled, 2)
    drawn = get_response(pipeline, "sample")(short, 2, random_state=0)
    assert drawn == last.sample(scaled, 2, random_state=0)
    np.testing.assert_array_equal(get_response(pipeline, "entropy")(short), last.entropy(scaled))


@pytest.mark.parametrize("number", [0, 1.5])
def test_bad_numbers_are_refused(model, short, number):
    with pytest.raises(ValueError, match=f"`k` must be an integer >= 1; got {number}"):
        model.predict_topk(short, number)
    with pytest.raises(ValueError, match=f"`n_samples` must be an integer >= 1; got {number}"):
        model.sample(short, number)

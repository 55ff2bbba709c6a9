"""PerPosition: any transformer of rows, on ragged sequences."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_api import SemiCRFSegmenter
from sklearn_api.preprocessing import PerPosition


class DropLast(TransformerMixin, BaseEstimator):
    """A transformer that loses a row."""

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X[:-1]


def ragged(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(3.0, 2.0, size=(n, 3)).astype(dtype) for n in (4, 7, 7)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_per_position_uses_all_positions_and_keeps_sequences(dtype):
    X = ragged(dtype)
    scaled = PerPosition(StandardScaler()).fit_transform(X)
    assert [x.shape for x in scaled] == [(4, 3), (7, 3), (7, 3)]
    assert scaled[0].dtype == dtype
    expected = StandardScaler().fit_transform(np.concatenate(X))
    np.testing.assert_array_equal(np.concatenate(scaled), expected)


def test_per_position_of_one_sequence_and_names():
    x = ragged()[1]
    transformer = PerPosition(PCA(2)).fit(ragged())
    assert transformer.transform(x).shape == (7, 2)
    assert transformer.get_feature_names_out().tolist() == ["pca0", "pca1"]


def test_per_position_bad_input():
    with pytest.raises(ValueError, match="must keep the 18 positions; it returned 17 rows"):
        PerPosition(DropLast()).fit_transform(ragged())
    with pytest.raises(ValueError, match="must have 3 features, as in fit; got 2 in sequence 0"):
        PerPosition(StandardScaler()).fit(ragged()).transform([np.zeros((2, 2))])


def test_per_position_in_a_searched_pipeline():
    X = ragged()
    y = [(x[:, 0] > 3.0).astype(int) for x in X]
    pipeline = make_pipeline(
        PerPosition(StandardScaler()), SemiCRFSegmenter(max_epochs=2, random_state=0)
    )
    grid = {"perposition__transformer": [StandardScaler(), PCA(2)]}
    search = GridSearchCV(pipeline, grid, cv=KFold(3), error_score="raise").fit(X, y)
    assert search.predict(X).shape == (3,)


@parametrize_with_checks([PerPosition(StandardScaler())])
def test_estimator_check(estimator, check):
    check(estimator)

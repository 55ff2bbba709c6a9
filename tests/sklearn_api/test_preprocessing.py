"""PerPosition: any transformer of rows, on ragged sequences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
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
    np.testing.assert_allclose(np.concatenate(scaled), expected, rtol=1e-6)


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


def test_per_position_takes_nan_where_its_transformer_does():
    X = ragged()
    X[1][2, 0] = np.nan
    filled = PerPosition(SimpleImputer()).fit_transform(x for x in X)
    known = np.concatenate(X)[:, 0]
    assert filled[1][2, 0] == pytest.approx(np.nanmean(known))
    with pytest.raises(ValueError, match="Sequence 1 of `X`: Input X contains NaN, at position 2"):
        PerPosition(PCA(2)).fit(X)
    X[0][0, 0] = np.inf
    with pytest.raises(ValueError, match="Sequence 0 of `X`: Input X contains infinity"):
        PerPosition(SimpleImputer()).fit(X)


def test_per_position_in_a_searched_pipeline():
    X = ragged()
    y = [(x[:, 0] > 3.0).astype(int) for x in X]
    pipeline = make_pipeline(
        PerPosition(StandardScaler()), SemiCRFSegmenter(max_epochs=2, random_state=0)
    )
    grid = {"perposition__transformer": [StandardScaler(), PCA(2)]}
    search = GridSearchCV(pipeline, grid, cv=KFold(3), error_score="raise").fit(X, y)
    assert search.predict(X).shape == (3,)


SPARSE = {
    "stays sparse": MaxAbsScaler(),
    "not centred": StandardScaler(with_mean=False),
    "becomes dense": TruncatedSVD(2, random_state=0),
}


def dense(rows):
    return rows.toarray() if sp.issparse(rows) else rows


@pytest.mark.parametrize("transformer", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.coo_array])
def test_per_position_of_sparse_sequences(form, transformer):
    X = [np.where(x > 3.0, x, 0.0) for x in ragged()]
    rows = sp.csr_array(np.concatenate(X))
    expected = transformer.fit_transform(rows)
    found = PerPosition(transformer).fit_transform([form(x) for x in X])
    assert [x.shape[0] for x in found] == [4, 7, 7]
    assert all(sp.issparse(x) == sp.issparse(expected) for x in found)
    np.testing.assert_allclose(np.concatenate(list(map(dense, found))), dense(expected), atol=1e-12)
    one = PerPosition(transformer).fit(rows).transform(rows)
    np.testing.assert_allclose(dense(one), dense(expected), atol=1e-12)


def test_per_position_of_sparse_sequences_in_a_pipeline():
    X = [np.where(x > 3.0, x, 0.0) for x in ragged()]
    y = [(x[:, 0] > 3.0).astype(int) for x in X]
    last = SemiCRFSegmenter(solver="lbfgs", dtype="float64", tol=1e-12)
    pipeline = make_pipeline(PerPosition(MaxAbsScaler()), last)
    sparse_X = [sp.csc_array(x) for x in X]
    found = pipeline.fit(sparse_X, y).predict_proba(sparse_X)
    expected = pipeline.fit(X, y).predict_proba(X)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_per_position_sparse_needs_a_transformer_that_takes_it():
    X = [sp.csr_array(x) for x in ragged()]
    with pytest.raises(ValueError, match="Cannot center sparse matrices"):
        PerPosition(StandardScaler()).fit(X)
    with pytest.raises(ValueError, match="must keep the 18 positions; it returned 17 rows"):
        PerPosition(DropLast()).fit_transform(X)


@parametrize_with_checks([PerPosition(StandardScaler()), PerPosition(MaxAbsScaler())])
def test_estimator_check(estimator, check):
    check(estimator)

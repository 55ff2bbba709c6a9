"""Searches give the same numbers here, in threads, in other processes and on a dask cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.metrics import log_likelihood_scorer, make_segment_scorer, segment_error_rate
from sklearn_api.model_selection import SequenceKFold
from sklearn_api.preprocessing import PerPosition
from tests.flash_semicrf.cases import long

ROOT = Path(__file__).parents[2]

GRID = {
    "semicrfsegmenter__max_duration": [9, 14],
    "semicrfsegmenter__duration_distribution": ["learned", "geometric", "negative_binomial"],
}
SCORING = {
    "ser": make_segment_scorer(segment_error_rate),
    "log_likelihood": log_likelihood_scorer,
}


def results(search, backend=None):
    """All test scores of all candidates and folds, and the parameters of the candidates."""
    rng = np.random.default_rng(0)
    y = [np.repeat(["rest", "wave", "rest"], rng.integers(4, 9, 3)) for _ in range(4)]
    X = [(labels == "wave")[:, None] + 0.5 * rng.normal(size=(len(labels), 2)) for labels in y]
    if backend is None:
        search.fit(X, y)
    else:
        search.set_params(n_jobs=2)
        with joblib.parallel_config(backend=backend):
            search.fit(X, y)
    found = search.cv_results_
    scores = [found[f"split{i}_test_{name}"] for i in range(2) for name in SCORING]
    return np.array(scores), found["params"], search.best_params_


def make_search(kind):
    pipeline = make_pipeline(
        PerPosition(StandardScaler()),
        SemiCRFSegmenter(max_epochs=2, learning_rate=0.1, random_state=0),
    )
    options = {
        "cv": SequenceKFold(2),
        "scoring": SCORING,
        "refit": "log_likelihood",
        "error_score": "raise",
    }
    if kind == "grid":
        return GridSearchCV(pipeline, GRID, **options)
    return RandomizedSearchCV(pipeline, GRID, n_iter=3, random_state=0, **options)


@pytest.fixture(scope="module")
def alone():
    return {kind: results(make_search(kind)) for kind in ("grid", "random")}


def assert_search_is_the_same(kind, backend, expected):
    scores, params, best = results(make_search(kind), backend)
    # Other processes have other numbers of threads, and add in other orders.
    np.testing.assert_allclose(scores, expected[0], rtol=1e-5, atol=1e-5)
    assert params == expected[1]
    assert best == expected[2]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("random", "threading"), ("grid", "loky"), long("grid", "threading"), long("random", "loky")],
)
def test_search_is_the_same_in_parallel(kind, backend, alone):
    assert_search_is_the_same(kind, backend, alone[kind])


def compare_forked(kind):
    assert_search_is_the_same(kind, "multiprocessing", results(make_search(kind)))


# In a process of its own: idle workers of loky leave threads in this one, and a fork beside threads
# may inherit a lock that nobody releases. That process has used torch's threads before it forks,
# which its children must not wait for.
@pytest.mark.parametrize("kind", ["grid", long("random")])
def test_search_is_the_same_in_forked_processes(kind):
    module = "tests.sklearn_api.test_search_backends"
    program = f"from {module} import compare_forked; compare_forked({kind!r})"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=ROOT)


def test_search_tells_the_candidates_apart(alone):
    scores, params, _ = alone["grid"]
    # Rows of the log-likelihood: no two candidates score the same, and one is clearly best.
    assert len(params) == 6
    means = np.sort(scores[1::2].mean(axis=0))
    assert np.diff(means).min() > 1e-4


@pytest.mark.long
def test_search_is_the_same_on_a_dask_cluster(alone):
    from distributed import Client  # not for the forked processes above, which import this module

    # Two worker processes of this machine; a cluster of many differs in the address of its client.
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None):
        assert_search_is_the_same("grid", "dask", alone["grid"])

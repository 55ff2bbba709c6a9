"""Sparse X in mini-batches: the same training as of the dense form, which never exists."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_semicrf.testing import assert_close
from sklearn_api import SemiCRFSegmenter
from sklearn_api._model.sparse import pad_sparse, project_sparse
from sklearn_api._training.data import pad_values
from tests.sklearn_api._lbfgs.test_lbfgs import problem
from tests.sklearn_api._training.test_weights import assert_close_models

SETTINGS = {"max_epochs": 3, "batch_size": 3, "dtype": "float64", "random_state": 0}


def unsorted_with_duplicates():
    """Two matrices whose entries are in no order, one of them stored in two parts."""
    rows, columns = np.array([1, 0, 1, 1]), np.array([2, 1, 0, 2])
    matrix = sp.csr_array((np.array([1.0, 2.0, 3.0, 4.0]), (rows, columns)), shape=(2, 4))
    empty = sp.csr_array((3, 4))
    loose = sp.csr_array((np.array([5.0, 6.0, 7.0]), np.array([3, 0, 3]), np.array([0, 3])), (1, 4))
    return [matrix, empty, loose]


def test_batches_hold_the_rows_of_each_sequence():
    values = unsorted_with_duplicates()
    x, lengths = pad_sparse(values)
    expected, expected_lengths = pad_values([value.toarray() for value in values])
    assert torch.equal(x.to_dense(), expected) and torch.equal(lengths, expected_lengths)
    assert torch.equal(x.coalesce().indices(), x.indices())
    assert x._nnz() == 5


@pytest.mark.parametrize("boundary_scores", [False, True])
def test_scores_and_their_gradients_are_those_of_dense_features(boundary_scores):
    X, y = problem(5)
    head = SemiCRFSegmenter(boundary_scores=boundary_scores, **SETTINGS).fit(X, y).module_.head
    layers = [head.projection, head.boundary_projection][: 1 + boundary_scores]
    parameters = [p for layer in layers for p in layer.parameters()]
    dense = pad_values(X)[0]
    expected = torch.cat([layer(dense) for layer in layers], -1)
    found = project_sparse(head, pad_sparse([sp.csr_array(x) for x in X])[0])
    assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    ours, theirs = (torch.autograd.grad((z * weights).sum(), parameters) for z in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"boundary_scores": True, "early_stopping": True},
        {"crop_length": 6, "duration_tail": "geometric", "max_duration": 3},
        {"solver": "sgd", "class_weight": "balanced"},
    ],
    ids=str,
)
def test_training_is_that_of_dense_features(options):
    X, y = problem(7)
    sparse_X = [form(x) for form, x in zip([sp.csr_array, sp.coo_array] * 4, X, strict=False)]
    dense = SemiCRFSegmenter(**SETTINGS, **options).fit(X, y)
    sparse = SemiCRFSegmenter(**SETTINGS, **options).fit(sparse_X, y)
    assert_close_models(sparse, dense)
    for name in ("train_loss", "valid_loss")[: 1 + dense.early_stopping]:
        losses = [model.history_[:, name] for model in (sparse, dense)]
        np.testing.assert_allclose(*losses, rtol=1e-9)
    for one, two in zip(sparse.predict_proba(sparse_X), dense.predict_proba(X), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-9)


def test_partial_fit_and_forms_of_x():
    X, y = problem(5)
    dense, sparse = (SemiCRFSegmenter(max_duration=20, **SETTINGS) for _ in range(2))
    for part in (slice(2), slice(2, 5)):
        dense.partial_fit(X[part], y[part], classes=["a", "b", "c"])
        mixed = [sp.csc_array(x) if i else x for i, x in enumerate(X[part])][::-1]
        sparse.partial_fit(mixed[::-1], y[part], classes=["a", "b", "c"])
    assert_close_models(sparse, dense)
    one = SemiCRFSegmenter(**SETTINGS).fit(sp.csr_matrix(X[-1]), y[-1])
    assert_close_models(one, SemiCRFSegmenter(**SETTINGS).fit(X[-1], y[-1]))


def test_no_dense_form_is_made_and_nothing_warns():
    """1e6 columns: dense, a batch of the 40 positions would take 160 MB in float32."""
    rng = np.random.default_rng(0)
    X = [sp.random_array((20, 1_000_000), density=1e-5, rng=rng, format="csr") for _ in range(2)]
    y = [np.repeat(["a", "b"], 10)] * 2
    model = SemiCRFSegmenter(max_epochs=1, random_state=0)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                    largest.append(value.numel())
            return result

    tracemalloc.start()
    with Sizes(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X, y)
        model.predict(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(largest) == 2_000_000  # the weights of two labels
    assert peak < 100e6


def test_other_encoders_refuse_sparse_features():
    X, y = problem(2)
    with pytest.raises(TypeError, match="Sequence 0 of `X`: Sparse data was passed"):
        SemiCRFSegmenter("cnn").fit([sp.csr_array(x) for x in X], y)

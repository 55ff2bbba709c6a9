"""Features with large offsets: what is kept in float64, and warned of where it is lost."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sklearn_api import SemiCRFSegmenter
from sklearn_api._inputs.sequences import Layout, Sequences
from sklearn_api._model.precision import cast_features, warn_of_lost_spread
from sklearn_api.encoders import Standardize, position_moments

OFFSET = np.array([1e8, 1.7e9])  # spacing in float32: 8 and 128


def signals(offset=0.0):
    rng = np.random.default_rng(0)
    y = [np.repeat([0, 1, 0, 1], rng.integers(4, 9, 4)) for _ in range(4)]
    # Multiples of a power of 2: an offset takes nothing from them in float64.
    noise = [rng.integers(-9, 9, size=(len(labels), 2)) / 16 for labels in y]
    return [labels[:, None] + e + offset for labels, e in zip(y, noise, strict=True)], y


def sequences(*values):
    return Sequences(list(values), Layout("many", np.array([x.shape[0] for x in values])))


@pytest.mark.parametrize("params", [{"encoder": "cnn", "crop_length": 8}, {"encoder": "mlp"}])
def test_an_offset_changes_nothing_where_features_are_standardised(params):
    settings = {"hidden_size": 8, "num_layers": 1, "max_epochs": 2, "random_state": 0}
    segmenter = SemiCRFSegmenter(**settings, **params, window_length=16)
    X, y = signals()
    plain = segmenter.fit(X, y)
    losses, proba = plain.history_[:, "train_loss"], plain.predict_proba(X)
    far, _ = signals(OFFSET)
    shifted = segmenter.fit(far, y)
    np.testing.assert_allclose(shifted.history_[:, "train_loss"], losses, rtol=1e-5)
    loaded = pickle.loads(pickle.dumps(shifted)).partial_fit(far, y)
    assert loaded.module_.standardize.mean.dtype == torch.float64
    mixed = [far[0].astype(np.longdouble), *far[1:]]
    for one, two in zip(proba, shifted.predict_proba(mixed), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_standardize_keeps_its_dtype_and_follows_the_device():
    X, _ = signals(OFFSET)
    module = torch.nn.Sequential(Standardize.from_positions(X)).to(torch.float32).half()
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float64}
    near, _ = signals()
    expected = Standardize.from_positions(near)(torch.from_numpy(np.concatenate(near)))
    scaled = module(torch.from_numpy(np.concatenate(X)))
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert {buffer.device.type for buffer in module.to("meta").buffers()} == {"meta"}


def test_position_moments_of_a_constant():
    mean, std = position_moments([np.full((7, 1), 1e8 + 0.1), np.full((9, 1), 1e8 + 0.1)])
    assert mean[0] == 1e8 + 0.1 and std[0] == 0


def test_fit_warns_of_a_feature_that_float32_loses():
    X, y = signals(OFFSET)
    segmenter = SemiCRFSegmenter(max_epochs=1)
    with pytest.warns(UserWarning, match=r"Feature 0 of `X` has a standard deviation of 0\.\d+ at"):
        segmenter.fit(X, y)
    segmenter.set_params(dtype="float64").fit(X, y)
    segmenter.set_params(dtype="float32").fit([x.astype(np.float32) for x in X], y)


def test_no_warning_of_constants_and_sparse_features():
    x = np.array([[1e8, 1.0], [1e8, 2.0]])
    warn_of_lost_spread(sequences(x), np.float32)
    warn_of_lost_spread(sequences(sp.csr_array(x + [[0], [1]])), np.float32)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="1e\\+08"):
        warnings.simplefilter("error")
        warn_of_lost_spread(sequences(x + [[0], [1]]), np.float32)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
def test_cast_features_refuses_what_overflows(form):
    given = sequences(form(np.ones((2, 1))), form(np.array([[0.0], [1e300]])))
    with pytest.raises(ValueError, match=r"fit into float32; got 1e\+300 in sequence 1"):
        cast_features(given, "float32")
    assert cast_features(given, "float64").values[1] is not None


@pytest.mark.parametrize("dtype", [np.int16, np.float16, bool, np.int64])
def test_numbers_of_any_dtype_are_read_exactly(dtype):
    X, y = [np.array([[0], [0], [1], [1]], dtype=dtype)], [[0, 0, 1, 1]]
    segmenter = SemiCRFSegmenter("mlp", hidden_size=4, max_epochs=1, random_state=0).fit(X, y)
    wide = [x.astype(np.float64) for x in X]
    np.testing.assert_allclose(segmenter.predict_proba(X)[0], segmenter.predict_proba(wide)[0])

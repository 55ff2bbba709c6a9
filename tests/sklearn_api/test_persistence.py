"""Saved models: pickle, joblib, skops, cloudpickle, and other versions."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
from sklearn.exceptions import InconsistentVersionWarning as SklearnInconsistentVersionWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flash_semicrf import __version__
from sklearn_api import SemiCRFSegmenter
from sklearn_api._persistence import InconsistentVersionWarning
from sklearn_api.preprocessing import PerPosition

QUICK = {"max_epochs": 3, "random_state": 0, "max_duration": 12}


def data(count=3, seed=0):
    rng = np.random.default_rng(seed)
    y = [np.repeat(["a", "b", "a", "b"], rng.integers(3, 12, 4)) for _ in range(count)]
    X = [(one == "b")[:, None] + rng.normal(size=(len(one), 2)) for one in y]
    return X, y


@pytest.fixture(scope="module")
def fitted():
    return SemiCRFSegmenter("cnn", hidden_size=4, num_layers=1, **QUICK).fit(*data())


def assert_same_predictions(a, b):
    X, _ = data(seed=1)
    for p, q in zip(a.predict_proba(X), b.predict_proba(X), strict=True):
        np.testing.assert_array_equal(p, q)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def joblibbed(model):
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def through_skops(model):
    skops_io = pytest.importorskip("skops.io", reason="skops is optional (in the test extra)")
    saved = skops_io.dumps(model)
    return skops_io.loads(saved, trusted=skops_io.get_untrusted_types(data=saved))


def cloudpickled(model):
    cloudpickle = pytest.importorskip("cloudpickle", reason="comes with distributed (test extra)")
    return pickle.loads(cloudpickle.dumps(model))


@pytest.mark.parametrize("trip", [pickled, joblibbed, through_skops, cloudpickled, copy.deepcopy])
def test_round_trip_continues_as_if_never_saved(fitted, trip):
    """Same predictions, and the same parameters after one more epoch and after a warm start."""
    X, y = data()
    kept, loaded = copy.deepcopy(fitted), trip(fitted)
    assert_same_predictions(fitted, loaded)
    assert loaded.n_iter_ == 3
    for model in (kept, loaded):
        model.partial_fit(X, y).set_params(warm_start=True, max_epochs=2).fit(X, y)
    assert loaded.n_iter_ == 6
    assert_same_predictions(kept, loaded)


def test_pipeline_round_trip():
    X, y = data()
    model = make_pipeline(PerPosition(StandardScaler()), SemiCRFSegmenter(**QUICK)).fit(X, y)
    assert_same_predictions(model, joblibbed(model))


def test_recurrent_model_and_model_with_crops_round_trip():
    X, y = data()
    model = SemiCRFSegmenter("gru", hidden_size=4, num_layers=1, crop_length=15, **QUICK).fit(X, y)
    loaded = pickled(model)
    assert_same_predictions(model.partial_fit(X, y), loaded.partial_fit(X, y))


# Versions


def test_same_version_loads_in_silence(fitted):
    state = fitted.__getstate__()
    assert state["_flash_semicrf_version"] == __version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pickled(fitted)
    assert not hasattr(loaded, "_flash_semicrf_version")


@pytest.mark.parametrize("version", ["0.0.0", None])
def test_other_version_warns(fitted, version):
    state = fitted.__getstate__()
    state["_flash_semicrf_version"] = version
    if version is None:
        del state["_flash_semicrf_version"]
    model = SemiCRFSegmenter.__new__(SemiCRFSegmenter)
    with pytest.warns(SklearnInconsistentVersionWarning, match="saved with flash_semicrf") as seen:
        model.__setstate__(state)
    warning = seen[0].message
    assert isinstance(warning, InconsistentVersionWarning)
    assert warning.estimator_name == "SemiCRFSegmenter"
    assert warning.original_version == (version or "unknown")
    assert warning.current_version == __version__
    assert_same_predictions(fitted, model)


def loaded_without(model, *names):
    """The model as an earlier version would have saved it, and the warning that it loads with."""
    state = model.__getstate__()
    for name in names:
        del state[name]
    loaded = SemiCRFSegmenter.__new__(SemiCRFSegmenter)
    with pytest.warns(InconsistentVersionWarning) as seen:
        loaded.__setstate__(state)
    return loaded, seen[0].message


def test_parameters_younger_than_the_model_get_their_defaults(fitted):
    loaded, warning = loaded_without(fitted, "window_length", "class_weight", "_single_classes")
    assert warning.missing == ["class_weight", "window_length", "_single_classes"]
    assert "saved without class_weight, window_length, _single_classes" in str(warning)
    assert loaded.get_params() == fitted.get_params()
    assert_same_predictions(fitted, loaded)


def test_parts_younger_than_the_model_are_named(fitted):
    model = copy.deepcopy(fitted)
    del model.module_.head.tail
    _, warning = loaded_without(model)
    assert warning.missing == ["head.tail"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_gpu.py does it")
def test_model_of_an_encoder_named_for_a_gpu_predicts_without_one():
    X, y = data()
    model = SemiCRFSegmenter("mlp", max_epochs=1, device="cpu", random_state=0).fit(X, y)
    loaded = pickled(model.set_params(device="cuda"))
    assert_same_predictions(loaded, model.set_params(device="cpu"))

"""Saved models: pickle, joblib, skops, versions, and what an interrupted fit leaves."""

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
from skorch.callbacks import Callback

from flash_semicrf import __version__
from sklearn_api import SemiCRFSegmenter
from sklearn_api.persistence import InconsistentVersionWarning
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


@pytest.mark.parametrize("trip", [pickled, joblibbed, through_skops])
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


# Interrupting


class Interrupt(Callback):
    """Presses Ctrl-C in an epoch: at its end, or after its first batch."""

    def __init__(self, epoch, at_end):
        self.epoch = epoch
        self.at_end = at_end

    def on_batch_end(self, net, training=False, **kwargs):
        if not self.at_end and training and len(net.history) == self.epoch:
            raise KeyboardInterrupt

    def on_epoch_end(self, net, **kwargs):
        if self.at_end and len(net.history) == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at_end", [True, False])
def test_interrupted_fit_keeps_the_model_so_far(at_end):
    X, y = data()
    params = {**QUICK, "max_epochs": 50, "batch_size": 1, "dropout": 0.1}
    model = SemiCRFSegmenter(
        "mlp", hidden_size=4, num_layers=1, callbacks=[Interrupt(4, at_end)], **params
    )
    model.fit(X, y)
    assert model.n_iter_ == 4
    assert not model.module_.training
    if at_end:
        same = SemiCRFSegmenter("mlp", hidden_size=4, num_layers=1, **{**params, "max_epochs": 4})
        assert_same_predictions(model, same.fit(X, y))
    assert_same_predictions(model, pickled(model))
    model.set_params(callbacks=None, warm_start=True, max_epochs=2).fit(X, y)
    assert model.n_iter_ == 6
    assert np.isfinite([row["train_loss"] for row in model.history_[4:]]).all()


def test_interrupted_fit_keeps_the_best_epoch_so_far():
    X, y = data(8)
    model = SemiCRFSegmenter(
        early_stopping=True,
        learning_rate=2.0,
        callbacks=[Interrupt(6, False)],
        random_state=0,
        max_duration=12,
    ).fit(X, y)
    losses = [row["valid_loss"] for row in model.history_[:5]]
    best = int(np.argmin(losses)) + 1
    assert best < 5
    again = SemiCRFSegmenter(
        early_stopping=True, learning_rate=2.0, random_state=0, max_duration=12, max_epochs=best
    ).fit(X, y)
    state = model.module_.state_dict()
    for name, value in again.module_.state_dict().items():
        assert torch.equal(value, state[name]), name

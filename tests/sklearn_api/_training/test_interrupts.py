"""Ctrl-C during training: real signals, in `fit` alone and inside the loops of others."""

from __future__ import annotations

import io
import pickle
import signal
import sys

import joblib
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch.callbacks import Callback, EarlyStopping

from sklearn_api import SemiCRFSegmenter
from sklearn_api._training.net import StopTraining
from sklearn_api.model_selection import cross_val_predict
from sklearn_api.preprocessing import PerPosition

QUICK = {"random_state": 0, "max_duration": 12}


def data(count=3, seed=0):
    rng = np.random.default_rng(seed)
    y = [np.repeat(["a", "b", "a", "b"], rng.integers(3, 12, 4)) for _ in range(count)]
    X = [(one == "b")[:, None] + rng.normal(size=(len(one), 2)) for one in y]
    return X, y


@pytest.fixture(autouse=True)
def python_handles_ctrl_c():
    CtrlC.fits = 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(Callback):
    """Sends SIGINT in an epoch of the n-th fit: at its end, or after its first batch."""

    fits = 0  # of the class: callbacks are copied

    def __init__(self, epoch=1, at_end=False, fit=1):
        self.epoch = epoch
        self.at_end = at_end
        self.fit = fit

    def on_train_begin(self, net, **kwargs):
        CtrlC.fits += 1

    def press(self, net):
        if CtrlC.fits == self.fit and len(net.history) == self.epoch:
            signal.raise_signal(signal.SIGINT)

    def on_batch_end(self, net, training=False, **kwargs):
        if not self.at_end and training:
            self.press(net)

    def on_epoch_end(self, net, **kwargs):
        if self.at_end:
            self.press(net)


class CtrlCWhilePrinting(io.StringIO):
    """An output that sends SIGINT as a line is written to it."""

    def __init__(self, line):
        super().__init__()
        self.lines_left = line

    def write(self, text):
        self.lines_left -= 1
        if not self.lines_left:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def assert_same_parameters(a, b):
    ours, theirs = a.module_.state_dict(), b.module_.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


# Alone


@pytest.mark.parametrize("at_end", [True, False])
def test_fit_keeps_the_model_so_far_and_warns(at_end):
    X, y = data()
    params = {**QUICK, "hidden_size": 4, "num_layers": 1, "batch_size": 1, "dropout": 0.1}
    model = SemiCRFSegmenter("mlp", max_epochs=50, callbacks=[CtrlC(4, at_end)], **params)
    with pytest.warns(ConvergenceWarning, match="interrupted at epoch 4: the model is the one"):
        model.fit(X, y)
    assert model.interrupted_ is True
    assert model.n_iter_ == 4
    assert not model.module_.training
    if at_end:
        whole = SemiCRFSegmenter("mlp", max_epochs=4, **params).fit(X, y)
        assert whole.interrupted_ is False
        assert_same_parameters(model, whole)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.interrupted_
    loaded.set_params(callbacks=None, warm_start=True, max_epochs=2).fit(X, y)
    assert loaded.n_iter_ == 6
    assert loaded.interrupted_ is False
    assert np.isfinite([row["train_loss"] for row in loaded.history_[4:]]).all()


def test_fit_keeps_the_best_epoch_so_far():
    X, y = data(8)
    params = {**QUICK, "early_stopping": True, "learning_rate": 2.0}
    model = SemiCRFSegmenter(callbacks=[CtrlC(6)], **params)
    with pytest.warns(ConvergenceWarning, match="the model is the best one so far"):
        model.fit(X, y)
    best = int(np.argmin([row["valid_loss"] for row in model.history_[:5]])) + 1
    assert best < 5
    assert_same_parameters(model, SemiCRFSegmenter(max_epochs=best, **params).fit(X, y))


def test_fit_by_lbfgs_keeps_the_last_iteration(monkeypatch):
    X, y = data()
    params = {**QUICK, "solver": "lbfgs", "dtype": "float64"}
    model = SemiCRFSegmenter(verbose=1, **params)
    monkeypatch.setattr(sys, "stdout", CtrlCWhilePrinting(line=3))
    with pytest.warns(ConvergenceWarning, match="interrupted at iteration 3"):
        model.fit(X, y)
    assert model.interrupted_
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        whole = SemiCRFSegmenter(max_iter=3, **params).fit(X, y)
    assert not whole.interrupted_
    assert_same_parameters(model, whole)


def test_warning_points_at_the_call():
    with pytest.warns(ConvergenceWarning) as seen:
        SemiCRFSegmenter(callbacks=[CtrlC(1)], **QUICK).fit(*data())
    assert seen[0].filename == __file__


def test_pipeline_keeps_its_model():
    X, y = data()
    segmenter = SemiCRFSegmenter(callbacks=[CtrlC(2)], **QUICK)
    pipeline = make_pipeline(PerPosition(StandardScaler()), segmenter)
    with pytest.warns(ConvergenceWarning, match="interrupted at epoch 2"):
        pipeline.fit(X, y)
    assert pipeline[-1].interrupted_


# In loops


def search(model, X, y):
    GridSearchCV(model, {"alpha": [0.1, 1.0]}, cv=KFold(2)).fit(X, y)


def cross_validation_of_a_pipeline(model, X, y):
    cross_val_score(make_pipeline(PerPosition(StandardScaler()), model), X, y, cv=KFold(2))


def prediction_by_folds(model, X, y):
    cross_val_predict(model, X, y, cv=2)


def jobs(model, X, y):
    fit = joblib.delayed(model.fit)
    joblib.Parallel(n_jobs=1)(fit(X, y) for _ in range(2))


def chunks(model, X, y):
    for _ in range(2):
        model.partial_fit(X, y)


@pytest.mark.parametrize(
    ("loop", "fit"),
    [
        (search, 1),
        (search, 5),  # the refit
        (cross_validation_of_a_pipeline, 1),
        (prediction_by_folds, 1),
        (jobs, 1),
        (chunks, 1),
    ],
)
def test_interrupt_ends_a_loop(loop, fit):
    X, y = data(4)
    model = SemiCRFSegmenter(max_epochs=1, callbacks=[CtrlC(fit=fit)], **QUICK)
    with pytest.raises(KeyboardInterrupt):
        loop(model, X, y)
    assert CtrlC.fits == fit


def test_partial_fit_that_was_interrupted_can_go_on():
    X, y = data()
    model = SemiCRFSegmenter(batch_size=1, callbacks=[CtrlC()], **QUICK)
    with pytest.raises(KeyboardInterrupt):
        model.partial_fit(X, y)
    assert model.interrupted_
    assert not model.module_.training
    model.partial_fit(X, y)
    assert not model.interrupted_
    assert model.n_iter_ == 2


# Callbacks that end training where it should end


class Stop(Callback):
    """Ends training after its second epoch."""

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == 2:
            raise StopTraining


@pytest.mark.parametrize("callback", [Stop(), EarlyStopping("train_loss", patience=1, threshold=9)])
def test_callback_that_stops_training_is_no_interrupt(callback):
    X, y = data()
    model = SemiCRFSegmenter(callbacks=[callback], **QUICK)
    assert not model.fit(X, y).interrupted_
    assert model.n_iter_ == 2
    assert np.isfinite(cross_val_score(model, X, y, cv=KFold(2))).all()

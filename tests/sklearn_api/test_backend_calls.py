"""Gradients of log Z are computed where something needs them, and nowhere else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flash_semicrf.streaming.cpu.backend import NumbaBackend
from sklearn_api import SemiCRFSegmenter


def data():
    rng = np.random.default_rng(0)
    y = [np.repeat(["a", "b", "a"], rng.integers(3, 9, 3)) for _ in range(8)]
    return [(one == "b")[:, None] + rng.normal(size=(len(one), 2)) for one in y], y


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the backend that the estimator runs on, by method."""
    counts = Counter()

    def counted(name):
        method = getattr(NumbaBackend, name)

        def call(self, *args, **kwargs):
            counts[name] += 1
            return method(self, *args, **kwargs)

        return call

    for name in ("gradients", "log_partition", "messages", "viterbi"):
        monkeypatch.setattr(NumbaBackend, name, counted(name))
    return counts


@pytest.mark.parametrize("crop_length", [None, 10])
@pytest.mark.parametrize("encoder", ["linear", "mlp"])
def test_validation_loss_computes_no_gradients(calls, encoder, crop_length):
    model = SemiCRFSegmenter(
        encoder,
        hidden_size=4,
        num_layers=1,
        crop_length=crop_length,
        max_epochs=2,
        batch_size=100,
        early_stopping=True,
        validation_fraction=0.5,
        random_state=0,
    )
    model.fit(*data())
    # A batch to train on, and one to validate with, in each epoch.
    assert calls == {"gradients": 2, "log_partition": 2}


def test_last_check_of_training_computes_no_gradients(calls):
    SemiCRFSegmenter(max_epochs=3, batch_size=100, random_state=0).fit(*data())
    assert calls == {"gradients": 3, "log_partition": 1}


def test_evaluation_computes_gradients_for_marginals_only(calls):
    X, y = data()
    for solver in ("adam", "lbfgs"):
        model = SemiCRFSegmenter(solver=solver, min_duration=2, max_epochs=1).fit(X, y)
        for method, expected in {
            "log_likelihood": {"log_partition": 1},
            "predict_segments": {"viterbi": 1},
            "predict_proba": {"gradients": 1},
            "predict_boundary_proba": {"gradients": 1},
            "predict": {"gradients": 1, "viterbi": 1},
            "score": {"gradients": 1, "viterbi": 1},
        }.items():
            calls.clear()
            needs_y = method in ("log_likelihood", "score")
            getattr(model, method)(X, *([y] if needs_y else []))
            assert calls == expected, method

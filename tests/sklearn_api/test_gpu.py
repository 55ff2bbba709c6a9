"""A segmenter trained on a GPU, and what it saves, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import scipy.sparse as sp

from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.streaming.triton.backend import HAS_TRITON

pytest.importorskip("skorch", reason="SemiCRFSegmenter needs skorch, which is not installed")

from sklearn_api import SemiCRFSegmenter

pytestmark = pytest.mark.gpu(group="three labels")

ROOT = Path(__file__).parents[2]

# The CPU's kernels are numba's; the plain loop serves where it is not installed.
PREDICT = """
import importlib.util, sys
import joblib, torch
from flash_semicrf.streaming.dispatch import BACKENDS

if importlib.util.find_spec("numba") is None:
    del BACKENDS["numba"]
assert not torch.cuda.is_available()
folder = sys.argv[1]
segmenter, X = joblib.load(folder + "/model.joblib"), joblib.load(folder + "/X.joblib")
assert next(segmenter.module_.parameters()).device.type == "cpu"
found = segmenter.predict(X), segmenter.predict_proba(X)
joblib.dump(found, folder + "/found.joblib")
"""


def waves(count):
    """Rests and waves; X is the wave's indicator with noise."""
    rng = np.random.default_rng(0)
    y = [np.repeat(["rest", "wave", "rest"], rng.integers([8] * 3, [15] * 3)) for _ in range(count)]
    X = [(one == "wave")[:, None] + 0.3 * rng.normal(size=(len(one), 1)) for one in y]
    return X, y


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_sparse_features_train_on_a_gpu_as_dense_ones_do():
    X, y = waves(6)
    settings = {"device": "cuda", "dtype": "float64", "max_epochs": 5, "random_state": 0}
    dense = SemiCRFSegmenter(**settings).fit(X, y)
    sparse = SemiCRFSegmenter(**settings).fit([sp.csr_array(x) for x in X], y)
    assert sparse.net_.device.startswith("cuda")
    for actual, expected in zip(sparse.predict_proba(X), dense.predict_proba(X), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_model_of_a_gpu_predicts_the_same_without_one(device, tmp_path):
    X, y = waves(8)
    segmenter = SemiCRFSegmenter(
        "cnn", device=device, dropout=0.1, learning_rate=0.05, max_epochs=20, random_state=0
    )
    with record_backends() as ran:
        segmenter.fit(X, y)
        labels, probabilities = segmenter.predict(X), segmenter.predict_proba(X)
    assert segmenter.net_.device.startswith("cuda")
    assert set(ran) == {"triton" if HAS_TRITON else "reference"}
    right = sum(int((a == b).sum()) for a, b in zip(labels, y, strict=True))
    assert right > 0.9 * sum(map(len, y))
    joblib.dump(segmenter, tmp_path / "model.joblib")
    joblib.dump(X, tmp_path / "X.joblib")
    ran = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found_labels, found = joblib.load(tmp_path / "found.joblib")
    for actual, expected in zip(found_labels, labels, strict=True):
        np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(found, probabilities, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)

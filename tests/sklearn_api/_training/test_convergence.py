"""The warning of a training that `max_epochs` has ended."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from sklearn_api import SemiCRFSegmenter


def data():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 0], [10, 4, 8])
    return [labels[:, None] + 0.1 * rng.normal(size=(22, 1)) for _ in range(4)], [labels] * 4


def test_max_epochs_that_end_training_are_told():
    X, y = data()
    model = SemiCRFSegmenter(max_epochs=12, learning_rate=0.01, random_state=0)
    with pytest.warns(ConvergenceWarning, match=r"max_epochs=12 while the training loss"):
        model.fit(X, y)
    held_out = model.set_params(early_stopping=True)
    with pytest.warns(ConvergenceWarning, match="while the validation loss"):
        held_out.fit(X, y)


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 400, "tol": 0.01},  # converges
        {"max_epochs": 12, "n_iter_no_change": 12},  # something else decides
        {"max_epochs": 5},
    ],
    ids=str,
)
def test_others_are_not(options):
    X, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SemiCRFSegmenter(learning_rate=0.01, random_state=0, **options).fit(X, y)
        SemiCRFSegmenter(solver="lbfgs").fit(X, y)

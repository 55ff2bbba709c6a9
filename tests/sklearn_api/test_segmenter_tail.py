"""`SemiCRFSegmenter(duration_tail=)`."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone

from sklearn_api import SemiCRFSegmenter


def sequences():
    rng = np.random.default_rng(0)
    y = [np.repeat(["rest", "wave", "rest"], [n, 4, 12]) for n in (15, 25, 30)]
    X = [(labels == "wave")[:, None] + 0.3 * rng.normal(size=(len(labels), 1)) for labels in y]
    return X, y


@pytest.mark.parametrize(
    "options",
    [
        {"duration_tail": "geometric"},
        {"duration_tail": "geometric", "duration_distribution": "geometric"},
        {"duration_tail": -0.05, "min_duration": {"wave": 2}, "boundary_scores": True},
    ],
)
def test_segments_longer_than_max_duration_round_trip(options):
    X, y = sequences()
    settings = {"max_duration": 5, "max_epochs": 80, "learning_rate": 0.1, "alpha": 0.01}
    model = SemiCRFSegmenter(random_state=0, **settings, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Training ended with epoch max_epochs")
        model.fit(X, y)
    assert model.max_duration_ == 5
    found = [[(s.start, s.end, s.label) for s in one] for one in model.predict_segments(X)]
    expected = [
        [(0, n - 1, "rest"), (n, n + 3, "wave"), (n + 4, n + 15, "rest")] for n in (15, 25, 30)
    ]
    assert found == expected
    assert model.score(X, y) == 1.0
    other = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other.log_likelihood(X, y), model.log_likelihood(X, y))
    assert bool((model.log_likelihood(X, y) > -10).all())


def test_rates_start_from_the_training_segments():
    X, y = sequences()
    model = SemiCRFSegmenter(max_duration=5, max_epochs=1, learning_rate=1e-9, random_state=0)
    model.set_params(duration_tail="geometric").fit(X, y)
    rest, wave = model.module_.head.duration_tail.tolist()
    # Six segments of rest of 5 or more, 76 positions beyond.
    assert rest == pytest.approx(np.log(81 / 88), abs=1e-5)
    assert wave == pytest.approx(np.log(5 / 6), abs=1e-5)


def test_without_a_tail_long_segments_are_split():
    X, y = sequences()
    model = clone(SemiCRFSegmenter(max_duration=5, max_epochs=1, duration_tail=None))
    with pytest.warns(UserWarning, match="gold segments are longer"):
        model.fit(X, y)


def test_duration_tail_is_checked():
    X, y = sequences()
    with pytest.raises(ValueError, match="'duration_tail' parameter of SemiCRFSegmenter"):
        SemiCRFSegmenter(duration_tail="linear").fit(X, y)

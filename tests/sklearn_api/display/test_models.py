"""DurationDisplay and BoundaryDisplay: the numbers that are drawn."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_api import SemiCRFSegmenter
from sklearn_api.display import BoundaryDisplay, DurationDisplay, SegmentationDisplay
from sklearn_api.preprocessing import PerPosition

Y = [["a", "a", "b", "a", "a", "a"], ["b", "b", "a"]]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = [np.repeat(["rest", "wave", "rest"], n) for n in ([4, 5, 6], [7, 4, 3])]
    return [(one == "wave")[:, None] + 0.3 * rng.normal(size=(len(one), 1)) for one in y], y


@pytest.fixture(scope="module")
def fitted(data):
    model = SemiCRFSegmenter(max_epochs=2, min_duration={"wave": 2}, random_state=0)
    return make_pipeline(PerPosition(StandardScaler()), model).fit(*data)


def bars(ax):
    """(left, right, height) of the bars."""
    return [(b.get_x(), b.get_x() + b.get_width(), b.get_height()) for b in ax.patches]


# ---- durations


def test_bars_are_the_shares_of_durations():
    display = DurationDisplay.from_predictions(Y, colors={"a": "red"})
    assert list(display.axes_) == ["a", "b"]
    third = pytest.approx(1 / 3)
    assert bars(display.axes_["a"]) == [(0.5, 1.5, third), (1.5, 2.5, third), (2.5, 3.5, third)]
    assert bars(display.axes_["b"]) == [(0.5, 1.5, 0.5), (1.5, 2.5, 0.5), (2.5, 3.5, 0)]
    assert display.axes_["a"].patches[0].get_facecolor()[:3] == to_rgba("red")[:3]
    assert display.axes_["b"].get_xlabel() == "duration (positions)"
    texts = [text.get_text() for text in display.axes_["a"].get_legend().get_texts()]
    assert texts == ["3 segments"]
    display.figure_.canvas.draw()


def test_bars_and_line_share_bins():
    y = [[(0, 7, "a"), (7, 8, "a"), (8, 12, "a")]]
    modelled = {"a": np.arange(1, 8) / 28}
    display = DurationDisplay.from_predictions(y, modelled=modelled, bins=3, sampling_rate=2)
    ax = display.axes_["a"]
    # Durations 1..3, 4..6, 7..9, half a second per position.
    np.testing.assert_allclose(
        bars(ax), [(0.25, 1.75, 1 / 3), (1.75, 3.25, 1 / 3), (3.25, 4.75, 1 / 3)]
    )
    line = ax.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2.5, 4])
    np.testing.assert_allclose(line.get_ydata(), [6 / 28, 15 / 28, 7 / 28])
    assert ax.get_xlabel() == "duration (s)"


def test_line_is_the_model_of_the_last_step(fitted, data):
    display = DurationDisplay.from_estimator(fitted, *data)
    bias = fitted[-1].module_.head.duration_bias.detach().double().numpy()
    for i, label in enumerate(["rest", "wave"]):
        line = display.axes_[label].get_lines()[0]
        weights = np.exp(bias[:, i])
        np.testing.assert_allclose(line.get_ydata(), weights / weights.sum(), rtol=1e-12)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 8))
    # Below its minimum a duration has no mass.
    assert display.modelled["wave"][0] == 0
    assert sorted(display.durations["rest"]) == [3, 4, 6, 7]
    alone = DurationDisplay.from_estimator(fitted, ignore_label="rest")
    assert list(alone.axes_) == ["wave"]
    assert bars(alone.axes_["wave"]) == []


def test_given_axes_and_limit_are_used():
    _, axes = plt.subplots(1, 2)
    display = DurationDisplay.from_predictions(Y, max_duration=2, ax=axes[1])
    assert display.ax_ is axes[1]
    assert axes[1].child_axes == list(display.axes_.values())
    assert display.axes_["a"].get_xlim() == (0, 3)
    # A share is of all segments, drawn or not.
    assert bars(display.axes_["a"])[1][2] == pytest.approx(1 / 3)
    assert display.plot() is display
    assert len(plt.get_fignums()) == 2


def test_durations_refuse():
    with pytest.raises(ValueError, match=r"At least one of `durations` and `modelled` must hold"):
        DurationDisplay.from_predictions([])
    with pytest.raises(ValueError, match=r"`modelled` must have every label as a key; lacks 'b'"):
        DurationDisplay.from_predictions(Y, modelled={"a": [1.0]})
    with pytest.raises(NotFittedError):
        DurationDisplay.from_estimator(SemiCRFSegmenter())
    assert plt.get_fignums() == []


# ---- boundaries


def test_mean_posterior_by_distance():
    proba = [np.array([1, 0.1, 0.8, 0.3, 0, 0.0]), np.array([1, 0.2, 0.6])]
    display = BoundaryDisplay.from_predictions(Y, proba, window=2, color="red")
    # Boundaries at 2 and 3 of the first sequence, 2 of the second; position 0 does not count.
    expected = [0.1, (0.1 + 0.8 + 0.2) / 3, (0.8 + 0.3 + 0.6) / 3, (0.3 + 0) / 2, 0]
    np.testing.assert_allclose(display.mean, expected)
    assert display.n_boundaries == 3
    np.testing.assert_array_equal(display.line_.get_xdata(), [-2, -1, 0, 1, 2])
    np.testing.assert_allclose(display.line_.get_ydata(), expected)
    assert display.line_.get_color() == "red"
    np.testing.assert_allclose(display.quantiles[:, 2], np.quantile([0.8, 0.3, 0.6], [0.25, 0.75]))
    assert display.ax_.get_xlabel() == "distance to a true boundary (positions)"
    display.figure_.canvas.draw()


def test_unreachable_distances_are_nan_and_forms_agree():
    one = BoundaryDisplay.from_predictions([0, 0, 1], [1, 0.2, 0.7], window=2, sampling_rate=10)
    many = BoundaryDisplay.from_predictions([[(0, 2, 0), (2, 3, 1)]], [[1, 0.2, 0.7]], window=2)
    np.testing.assert_array_equal(one.mean, [np.nan, 0.2, 0.7, np.nan, np.nan])
    np.testing.assert_array_equal(one.mean, many.mean)
    np.testing.assert_allclose(one.line_.get_xdata(), [-0.2, -0.1, 0, 0.1, 0.2])


def test_boundaries_of_a_pipeline(fitted, data):
    X, y = data
    _, ax = plt.subplots()
    display = BoundaryDisplay.from_estimator(fitted, X, y, window=3, ax=ax)
    assert display.ax_ is ax
    proba = fitted[-1].predict_boundary_proba(fitted[:-1].transform(X))
    expected = np.mean([proba[0][4], proba[0][9], proba[1][7], proba[1][11]])
    np.testing.assert_allclose(display.mean[3], expected)
    one = SegmentationDisplay.from_estimator(fitted, X[0], y[0])
    np.testing.assert_array_equal(one.boundary_proba, proba[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], [1, 0.1]), r"must hold a boundary inside a sequence; got none\."),
        (([0, 1], [1, 1.5]), r"must be in \[0, 1\]; got 1\.5 at position 1 of sequence 0\."),
        (([[0, 1]], [[[1, 0]]]), r"shape \(T,\) with T >= 1 per sequence; got shape \(1, 2\)"),
        (([0, 1, 1], [1, 0.5]), "Sequence 0 has 2 positions .* and 3 labels"),
    ],
)
def test_boundaries_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        BoundaryDisplay.from_predictions(*arguments)
    for window in (-1, True, 2.5):
        with pytest.raises(ValueError, match=rf"`window` must be an integer >= 0; got {window}\."):
            BoundaryDisplay.from_predictions(*arguments, window=window)


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"`DurationDisplay\.plot` needs matplotlib"):
        DurationDisplay.from_predictions(Y)
    with pytest.raises(ImportError, match=r"`BoundaryDisplay\.from_estimator` needs matplotlib"):
        BoundaryDisplay.from_estimator(None, None, None)


@pytest.mark.parametrize("rate", [0, -4, float("nan"), "fast"])
def test_sampling_rate_is_checked(rate):
    message = r"`sampling_rate` must be None or a number > 0; got "
    with pytest.raises(ValueError, match=message):
        DurationDisplay.from_predictions(Y, sampling_rate=rate)
    with pytest.raises(ValueError, match=message):
        BoundaryDisplay.from_predictions([0, 0, 1], [1, 0.2, 0.7], sampling_rate=rate)


def test_displays_of_series_with_an_index_of_their_own():
    pd = pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")
    y, proba = pd.Series([0, 0, 1], index=[4, 5, 6]), pd.Series([1, 0.2, 0.7], index=[4, 5, 6])
    one = BoundaryDisplay.from_predictions(y, proba, window=1)
    many = BoundaryDisplay.from_predictions(pd.Series([y]), pd.Series([proba], [9]), window=1)
    np.testing.assert_array_equal(one.mean, many.mean)
    for name in ("bins", "max_duration"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1; got"):
            DurationDisplay.from_predictions(y, **{name: 2.5})

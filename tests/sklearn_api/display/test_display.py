"""SegmentationDisplay: what is drawn where, and what is refused."""

from __future__ import annotations

import doctest
import importlib.util
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

import sklearn_api.display
from flash_semicrf.problem.segments import Segment
from sklearn_api.datasets import load_ecg, make_segmentations
from sklearn_api.display import SegmentationDisplay

Y_TRUE = ["none", "none", "P", "P", "none", "T", "T", "T"]
Y_PRED = ["none", "P", "P", "P", "none", "none", "T", "T"]
SIGNAL = np.arange(8.0)
BOUNDARY = np.array([1.0, 0.2, 0.8, 0, 0.9, 0.7, 0.3, 0])


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


class Fitted(ClassifierMixin, BaseEstimator):
    """Labels every position by the sign of its first column."""

    def fit(self, X, y):
        self.classes_ = np.array(["high", "low", "middle"])
        return self

    def predict(self, X):
        first = np.asarray(X.todense() if sparse.issparse(X) else X)[:, 0]
        return np.where(first > 0, "high", "low")


class WithSegments(Fitted):
    """Also tells segments and boundaries."""

    def predict_segments(self, X):
        return [Segment(0, 2, "low"), Segment(3, 4, "low"), Segment(5, len(X) - 1, "high")]

    def predict_boundary_proba(self, X):
        return np.linspace(1, 0, len(X))


def bars(ax, row):
    """(start, end, colour) of the bars in one row of the segment panel, in order."""
    found = []
    for collection in ax.collections:
        assert isinstance(collection, PolyCollection)
        for path in collection.get_paths():
            x, y = path.vertices[:4].T
            if np.isclose(y.mean(), -row):
                found.append((x.min(), x.max(), tuple(collection.get_facecolor()[0])))
    return sorted(found)


def legend_texts(display):
    legends = [ax.get_legend() for ax in display.axes_.values() if ax.get_legend() is not None]
    assert len(legends) <= 1
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_all_is_pinned():
    assert sklearn_api.display.__all__ == [
        "BoundaryDisplay",
        "DurationDisplay",
        "SegmentationDisplay",
    ]


def test_docstring_example_runs():
    result = doctest.testmod(sklearn_api.display._segmentation)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_panel_is_drawn():
    display = SegmentationDisplay.from_predictions(
        Y_TRUE, Y_PRED, signal=SIGNAL, boundary_proba=BOUNDARY, ignore_label="none"
    )
    assert list(display.axes_) == ["signal", "segments", "boundary"]
    assert display.figure_ is display.ax_.figure
    for ax in display.axes_.values():
        assert ax.figure is display.figure_
        assert ax.get_xlim() == (0, 8)
    labels = [tick.get_text() for tick in display.axes_["segments"].get_yticklabels()]
    assert labels == ["true", "predicted"]
    assert legend_texts(display) == ["P", "T", "true start"]
    assert display.axes_["boundary"].get_xlabel() == "position"
    assert display.axes_["signal"].get_ylabel() == "signal"
    display.figure_.canvas.draw()


def test_panels_are_in_order_and_do_not_overlap():
    display = SegmentationDisplay.from_predictions(
        Y_TRUE, Y_PRED, signal=SIGNAL, boundary_proba=BOUNDARY
    )
    display.figure_.canvas.draw()
    boxes = [ax.get_position() for ax in display.axes_.values()]
    assert boxes[0].y0 > boxes[1].y1 > boxes[1].y0 > boxes[2].y1
    assert len({(box.x0, box.x1) for box in boxes}) == 1


def test_bars_are_the_segments():
    display = SegmentationDisplay.from_predictions(
        Y_TRUE, Y_PRED, ignore_label="none", colors={"T": "red"}
    )
    ax = display.axes_["segments"]
    blue, red = to_rgba("#0072B2"), to_rgba("red")
    assert bars(ax, 0) == [(2, 4, blue), (5, 8, red)]
    assert bars(ax, 1) == [(1, 4, blue), (6, 8, red)]


def test_adjacent_segments_of_one_label_are_two_bars():
    display = SegmentationDisplay.from_predictions(y_pred=[(0, 3, "a"), (3, 8, "a")])
    assert [bar[:2] for bar in bars(display.axes_["segments"], 0)] == [(0, 3), (3, 8)]
    assert display.axes_["segments"].get_xlim() == (0, 8)


def test_sampling_rate_gives_seconds():
    display = SegmentationDisplay.from_predictions(
        Y_TRUE, signal=SIGNAL, boundary_proba=BOUNDARY, sampling_rate=4, ignore_label="none"
    )
    assert [bar[:2] for bar in bars(display.axes_["segments"], 0)] == [(0.5, 1), (1.25, 2)]
    assert display.axes_["boundary"].get_xlabel() == "time (s)"
    assert display.axes_["signal"].get_xlim() == (0, 2)
    line = display.axes_["signal"].get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), (np.arange(8) + 0.5) / 4)
    np.testing.assert_allclose(line.get_ydata(), SIGNAL)
    posterior = display.axes_["boundary"].get_lines()[0]
    np.testing.assert_allclose(posterior.get_xdata(), np.arange(8) / 4)
    np.testing.assert_allclose(posterior.get_ydata(), BOUNDARY)


def test_few_columns_are_lines_and_many_an_image():
    lines = SegmentationDisplay.from_predictions(signal=np.ones((8, 4))).axes_["signal"]
    assert len(lines.get_lines()) == 4
    image = SegmentationDisplay.from_predictions(signal=np.eye(8, 5)).axes_["signal"]
    assert len(image.get_lines()) == 0
    assert image.get_images()[0].get_array().shape == (5, 8)


def test_shading_does_not_change_the_limits():
    plain = SegmentationDisplay.from_predictions(signal=100 + SIGNAL).axes_["signal"]
    shaded = SegmentationDisplay.from_predictions(Y_TRUE, signal=100 + SIGNAL).axes_["signal"]
    assert len(shaded.collections) > len(plain.collections)
    assert shaded.get_ylim() == plain.get_ylim()


@pytest.mark.parametrize("n_labels", [1, 3, 8, 9, 20, 21, 60])
def test_every_label_has_its_own_colour(n_labels):
    y = np.arange(n_labels)
    display = SegmentationDisplay.from_predictions(y)
    colors = [color for *_, color in bars(display.axes_["segments"], 0)]
    assert len(set(colors)) == n_labels
    assert legend_texts(display) == [str(label) for label in y]
    display.figure_.canvas.draw()


def test_labels_fix_order_and_colours():
    one = SegmentationDisplay.from_predictions(Y_TRUE, labels=["T", "P"])
    assert legend_texts(one) == ["T", "P"]
    assert [color for *_, color in bars(one.axes_["segments"], 0)] == [
        to_rgba("#D55E00"),
        to_rgba("#0072B2"),
    ]


def test_given_axes_are_used():
    _, axes = plt.subplots(1, 2)
    display = SegmentationDisplay(y_true=Y_TRUE, signal=SIGNAL)
    assert not hasattr(display, "ax_")
    assert display.plot(axes[1]) is display
    assert display.ax_ is axes[1]
    assert axes[0].child_axes == []
    assert axes[1].child_axes == list(display.axes_.values())
    assert len(plt.get_fignums()) == 1
    display.plot()
    assert len(plt.get_fignums()) == 2


def test_picture_of_real_data_is_written(tmp_path):
    ecg = load_ecg()
    display = SegmentationDisplay.from_predictions(
        ecg.y[3],
        ecg.y[3],
        signal=ecg.X[3],
        boundary_proba=np.zeros(len(ecg.y[3])),
        ignore_label="none",
        sampling_rate=ecg.sampling_rate,
    )
    display.ax_.set_title("record 3", loc="left")
    display.figure_.savefig(tmp_path / "ecg.png")
    assert plt.imread(tmp_path / "ecg.png").std() > 0.05


# ---- from_estimator


def test_from_estimator_with_predict_only():
    X = np.array([[-1.0], [-1], [2], [2]])
    display = SegmentationDisplay.from_estimator(Fitted().fit(X, None), X)
    assert list(display.axes_) == ["signal", "segments"]
    assert [bar[:2] for bar in bars(display.axes_["segments"], 0)] == [(0, 2), (2, 4)]
    # classes_ name the legend, also classes that do not occur.
    assert legend_texts(display) == ["high", "low", "middle"]


def test_from_estimator_prefers_segments_and_draws_boundaries():
    X = np.linspace(-1, 1, 16).reshape(8, 2)
    display = SegmentationDisplay.from_estimator(
        WithSegments().fit(X, None),
        X,
        ["low"] * 8,
        ignore_label="high",
        sampling_rate=2.0,
        signal_name="volt",
    )
    assert list(display.axes_) == ["signal", "segments", "boundary"]
    assert [bar[:2] for bar in bars(display.axes_["segments"], 1)] == [(0, 1.5), (1.5, 2.5)]
    assert legend_texts(display) == ["low", "middle", "true start"]
    assert display.axes_["signal"].get_ylabel() == "volt"
    posterior = display.axes_["boundary"].get_lines()[0]
    np.testing.assert_allclose(posterior.get_ydata(), np.linspace(1, 0, 8))


def test_from_estimator_does_not_draw_sparse_features():
    X = sparse.csr_array(np.eye(5))
    model = Fitted().fit(X, None)
    assert list(SegmentationDisplay.from_estimator(model, X).axes_) == ["segments"]
    display = SegmentationDisplay.from_estimator(model, X, signal=np.arange(5))
    assert list(display.axes_) == ["signal", "segments"]


def test_from_estimator_refuses():
    X, y = make_segmentations(2, (5, 9), random_state=0)
    model = Fitted().fit(X, y)
    message = r"`X` must be one sequence of shape \(T, D\); got shape {}\."
    for several, shape in [
        (X, r"\(2,\)"),
        (list(X), r"\(2,\)"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        ([X[0]], rf"\(1, {len(X[0])}, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message.format(shape)):
            SegmentationDisplay.from_estimator(model, several)
    with pytest.raises(NotFittedError):
        SegmentationDisplay.from_estimator(Fitted(), X[0])
    with pytest.raises(ValueError, match=r"same number of positions; got 1 and \d+ at sequence 0"):
        SegmentationDisplay.from_estimator(model, X[0], ["low"])


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"At least one of `y_true`, .* must be given; got None for all\."),
        (
            {"y_true": Y_TRUE, "y_pred": Y_PRED[:-1]},
            r"`y_true` and `y_pred` must have the same number of positions; got 8 and 7",
        ),
        (
            {"y_true": Y_TRUE, "signal": SIGNAL[1:]},
            r"`signal` must have as many positions as `y_true`, 8; got 7\.",
        ),
        (
            {"signal": SIGNAL, "boundary_proba": BOUNDARY[1:]},
            r"`boundary_proba` must have as many positions as `signal`, 8; got 7\.",
        ),
        (
            {"signal": SIGNAL, "y_pred": [(0, 9, "a")]},
            r"The predicted segments must end at or before the length of `signal`, 8; got 9\.",
        ),
        ({"y_true": [Y_TRUE, Y_TRUE]}, r"`y_true` must be one sequence; got 2\."),
        ({"y_true": Y_TRUE, "y_pred": [0] * 8}, r"labels of one kind; got strings and numbers"),
        ({"y_pred": [(0, 1, "a"), (1, 2, 3)]}, r"`y_pred` must hold labels of one kind; got str"),
        (
            {"signal": np.zeros((2, 2, 2))},
            r"`signal` must hold real numbers in shape \(T,\) or \(T, D\); got shape \(2, 2, 2\)",
        ),
        ({"signal": list("ab")}, r"`signal` must hold real numbers .* and dtype <U1\."),
        (
            {"boundary_proba": BOUNDARY[:, None]},
            r"`boundary_proba` must hold real numbers in shape \(T,\); got shape \(8, 1\)",
        ),
        (
            {"boundary_proba": BOUNDARY * 1.2},
            r"`boundary_proba` must be in \[0, 1\]; got 1\.2 at position 0\.",
        ),
        ({"boundary_proba": [0.5, np.nan]}, r"in \[0, 1\]; got nan at position 1\."),
        (
            {"y_true": Y_TRUE, "sampling_rate": 0},
            r"`sampling_rate` must be None or a number > 0; got 0\.",
        ),
        (
            {"y_true": Y_TRUE, "colors": {"Q": "red"}},
            r"`colors` must have labels as keys, of \['P', 'T', 'none'\]; got 'Q'\.",
        ),
        ({"y_true": Y_TRUE, "ignore_label": 0}, r"`ignore_label` must be a string .*; got 0\."),
    ],
)
def test_from_predictions_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationDisplay.from_predictions(**arguments)
    assert plt.get_fignums() == []


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    message = r"`SegmentationDisplay\.plot` needs matplotlib, .*flash-semicrf-sklearn\[plot\]"
    with pytest.raises(ImportError, match=message):
        SegmentationDisplay.from_predictions(Y_TRUE)
    with pytest.raises(ImportError, match=r"`SegmentationDisplay\.from_estimator` needs"):
        SegmentationDisplay.from_estimator(Fitted().fit(None, None), np.ones((2, 1)))


@pytest.mark.parametrize("name", ["_boundaries", "_drawing", "_durations", "_segmentation"])
def test_import_does_not_need_matplotlib(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.find_spec(f"sklearn_api.display.{name}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

"""Plot of a segmented sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.utils.validation import check_is_fitted

from sklearn_api._responses import find_response
from sklearn_api.display._drawing import (
    LINES,
    choose_colors,
    draw_boundary,
    draw_legend,
    draw_segments,
    draw_signal,
    import_matplotlib,
    legend_rows,
    make_panels,
    open_axes,
    position_unit,
    shade,
)
from sklearn_api.metrics._inputs import Segmentation, read_labels, read_one, read_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Heights of the panels and the gap between them, in inches, in the default figure.
_HEIGHTS = {"signal": 2.3, "segments": 0.36, "boundary": 0.9}
_GAP = 0.14


class SegmentationDisplay:
    """Signal, true and predicted segments, and boundary posterior of one sequence.

    Create it with `from_estimator` or `from_predictions`. Arguments that are None are not drawn.
    All panels share the axis of positions.

    Parameters
    ----------
    y_true, y_pred : array-like or None
        Labels per position of shape (T,), or a list of segments: ``(start, end, label)`` tuples,
        half-open, or `flash_semicrf.problem.segments.Segment`.
    signal : array-like of shape (T,) or (T, D) or None
        Up to four columns are drawn as lines, more as an image with one row per column.
    boundary_proba : array-like of shape (T,) or None
        Probability that a segment starts at each position; drawn with lines at the starts of the
        first row of segments.
    labels : list or None
        Labels to draw, in the order of colours and legend; None: all that occur, sorted.
    ignore_label : str, number or None
        Background without colour.
    colors : mapping of label to colour or None
        Colours of matplotlib, for labels that should not have their default.
    sampling_rate : float or None
        Positions per second, for an axis in seconds. None: in positions.
    signal_name : str
        Name of the axis of the signal.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Frameless axes around all panels; its title is that of the plot.
    axes_ : dict of str to matplotlib Axes
        The panels that are drawn, of "signal", "segments" and "boundary".
    figure_ : matplotlib Figure
        Figure of `ax_`.

    Examples
    --------
    >>> from sklearn_api.display import SegmentationDisplay
    >>> display = SegmentationDisplay.from_predictions(
    ...     ["rest", "rest", "wave", "wave"], ["rest", "wave", "wave", "wave"]
    ... )
    >>> sorted(display.axes_)
    ['segments']
    """

    def __init__(
        self,
        *,
        y_true: Any = None,
        y_pred: Any = None,
        signal: Any = None,
        boundary_proba: Any = None,
        labels: Sequence[Any] | None = None,
        ignore_label: Any = None,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
        signal_name: str = "signal",
    ) -> None:
        self.y_true = y_true
        self.y_pred = y_pred
        self.signal = signal
        self.boundary_proba = boundary_proba
        self.labels = labels
        self.ignore_label = ignore_label
        self.colors = colors
        self.sampling_rate = sampling_rate
        self.signal_name = signal_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        signal: Any = None,
        labels: Sequence[Any] | None = None,
        ignore_label: Any = None,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
        signal_name: str = "signal",
        ax: Axes | None = None,
    ) -> SegmentationDisplay:
        """Segment one sequence and draw it.

        Segments come from ``predict_segments`` if the estimator has it, else from ``predict``; the
        boundary posterior from ``predict_boundary_proba`` if it has that.

        Parameters
        ----------
        estimator : fitted estimator
            Such as `SemiCRFSegmenter`.
        X : array-like of shape (T, D)
            One sequence.
        y : array-like or None
            Its true labels or segments.
        signal : array-like of shape (T,) or (T, D) or None
            Drawn instead of `X`; sparse `X` is not drawn.
        labels, ignore_label, colors, sampling_rate, signal_name
            As for the class; `labels` None: ``estimator.classes_``, so that colours do not depend
            on the sequence.
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.

        Returns
        -------
        display : SegmentationDisplay
            The drawn display.

        Raises
        ------
        NotFittedError
            If the estimator is not fitted.
        ValueError
            If `X` is not one sequence or does not fit `y`.
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("SegmentationDisplay.from_estimator")
        check_is_fitted(estimator)
        shape = _shape(X)
        if len(shape) != 2:
            raise ValueError(f"`X` must be one sequence of shape (T, D); got shape {shape}.")
        segment = find_response(estimator, "predict_segments") or estimator.predict
        boundary = find_response(estimator, "predict_boundary_proba")
        if signal is None and not sparse.issparse(X):
            signal = X
        if labels is None and hasattr(estimator, "classes_"):
            labels = [label for label in estimator.classes_.tolist() if label != ignore_label]
        return cls.from_predictions(
            y,
            segment(X),
            signal=signal,
            boundary_proba=None if boundary is None else boundary(X),
            labels=labels or None,
            ignore_label=ignore_label,
            colors=colors,
            sampling_rate=sampling_rate,
            signal_name=signal_name,
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        y_true: Any = None,
        y_pred: Any = None,
        *,
        signal: Any = None,
        boundary_proba: Any = None,
        labels: Sequence[Any] | None = None,
        ignore_label: Any = None,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
        signal_name: str = "signal",
        ax: Axes | None = None,
    ) -> SegmentationDisplay:
        """Draw segmentations of one sequence.

        Parameters
        ----------
        y_true, y_pred, signal, boundary_proba, labels, ignore_label, colors, sampling_rate, \
signal_name
            As for the class.
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.

        Returns
        -------
        display : SegmentationDisplay
            The drawn display.

        Raises
        ------
        ValueError
            If the arguments do not fit together.
        ImportError
            If matplotlib is missing.
        """
        display = cls(
            y_true=y_true,
            y_pred=y_pred,
            signal=signal,
            boundary_proba=boundary_proba,
            labels=labels,
            ignore_label=ignore_label,
            colors=colors,
            sampling_rate=sampling_rate,
            signal_name=signal_name,
        )
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> SegmentationDisplay:
        """Draw the panels.

        Parameters
        ----------
        ax : matplotlib Axes or None
            Axes whose area is divided among the panels; None: a new figure.

        Returns
        -------
        display : SegmentationDisplay
            The display itself, with `ax_`, `axes_` and `figure_`.

        Raises
        ------
        ValueError
            If the arguments do not fit together.
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("SegmentationDisplay.plot")
        unit = position_unit(self.sampling_rate)
        rows, signal, boundary, length = self._check()
        pairs = [(row, row) for row in rows.values()]
        labels = read_labels(pairs, self.labels, self.ignore_label) if rows else []
        colors = choose_colors(labels, self.colors)
        heights = {
            "signal": _HEIGHTS["signal"] * (signal is not None),
            "segments": _HEIGHTS["segments"] * len(rows),
            "boundary": _HEIGHTS["boundary"] * (boundary is not None),
        }
        heights = {name: height for name, height in heights.items() if height}
        rest = 0.65 + 0.25 * legend_rows([str(label) for label in labels])
        height = sum(heights.values()) + _GAP * (len(heights) - 1) + rest
        self.ax_: Axes = open_axes(ax, figsize=(10, height))
        self.figure_: Figure | SubFigure = self.ax_.figure
        self.axes_: dict[str, Axes] = make_panels(self.ax_, heights, _GAP)

        first = next(iter(rows.values()), None)
        if signal is not None:
            draw_signal(self.axes_["signal"], signal, unit, self.signal_name)
            if first is not None and signal.shape[1] <= len(LINES):
                shade(self.axes_["signal"], first, colors, unit)
        if rows:
            draw_segments(self.axes_["segments"], rows, colors, unit)
        if boundary is not None:
            draw_boundary(self.axes_["boundary"], boundary, first, unit)
        name = f"{next(iter(rows))} start" if rows and boundary is not None else None
        draw_legend(next(iter(self.axes_.values())), colors, name)
        self._finish(length * unit)
        return self

    def _check(self) -> tuple[dict[str, Segmentation], Any, Any, int]:
        """Checked arguments: segmentations by row, signal, boundary posterior, length."""
        rows = {}
        lengths: dict[str, int] = {}
        for name, title, y in [
            ("y_true", "true", self.y_true),
            ("y_pred", "predicted", self.y_pred),
        ]:
            if y is not None:
                # An empty list is a sequence without segments.
                rows[title] = read_one(y, name) if len(y) else Segmentation.empty()
                length = rows[title].length
                if length is not None:
                    lengths[name] = length
        if len(rows) == 2:
            read_pairs(self.y_true, self.y_pred)  # checks one against the other
        signal, boundary = self.signal, self.boundary_proba
        if signal is not None:
            signal = _real_array("signal", signal, (1, 2))
            signal = signal[:, None] if signal.ndim == 1 else signal
            lengths["signal"] = len(signal)
        if boundary is not None:
            boundary = _real_array("boundary_proba", boundary, (1,))
            wrong = np.flatnonzero(~((boundary >= 0) & (boundary <= 1)))
            if len(wrong):
                raise ValueError(
                    f"`boundary_proba` must be in [0, 1]; got {boundary[wrong[0]]} at position "
                    f"{wrong[0]}."
                )
            lengths["boundary_proba"] = len(boundary)
        return rows, signal, boundary, _common_length(rows, lengths)

    def _finish(self, end: float) -> None:
        """Set limits and the axis of positions."""
        panels = list(self.axes_.values())
        for panel in panels:
            panel.set_xlim(0, end)
            panel.spines[["top", "right"]].set_visible(False)
            if panel is not panels[-1]:
                panel.tick_params(bottom=False, labelbottom=False)
        if "segments" in self.axes_ and panels[-1] is not self.axes_["segments"]:
            self.axes_["segments"].spines["bottom"].set_visible(False)
        panels[-1].set_xlabel("position" if self.sampling_rate is None else "time (s)")


def _shape(X: Any) -> tuple[int, ...]:
    if hasattr(X, "shape"):
        return tuple(X.shape)
    try:
        return np.shape(X)
    except ValueError:  # a list of sequences that differ in length
        return (len(X),)


def _real_array(name: str, values: Any, dimensions: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim not in dimensions or array.dtype.kind not in "biuf" or array.size == 0:
        shapes = " or ".join({1: "(T,)", 2: "(T, D)"}[d] for d in dimensions)
        raise ValueError(
            f"`{name}` must hold real numbers in shape {shapes}; got shape {array.shape} and dtype "
            f"{array.dtype}."
        )
    return array.astype(float)


def _common_length(rows: dict[str, Segmentation], lengths: dict[str, int]) -> int:
    """Common length of all arguments; ValueError if they differ."""
    if not rows and not lengths:
        raise ValueError(
            "At least one of `y_true`, `y_pred`, `signal` and `boundary_proba` must be given; got "
            "None for all."
        )
    ends = [int(one.stops.max(initial=0)) for one in rows.values()]
    if not lengths:
        return max(1, *ends)
    first, length = next(iter(lengths.items()))
    for name, other in lengths.items():
        if other != length:
            raise ValueError(
                f"`{name}` must have as many positions as `{first}`, {length}; got {other}."
            )
    for title, end in zip(rows, ends, strict=True):
        if end > length:
            raise ValueError(
                f"The {title} segments must end at or before the length of `{first}`, {length}; "
                f"got {end}."
            )
    return length

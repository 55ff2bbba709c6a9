"""Plot of the durations of true segments and of the durations expected by a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from flash_semicrf.problem.validation import check_positive_int
from sklearn_api._responses import final_estimator
from sklearn_api.display._drawing import choose_colors, import_matplotlib, open_axes, position_unit
from sklearn_api.metrics._inputs import read_labels, read_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class DurationDisplay:
    """Distribution of durations of each label: bars for the segments, a line for the model.

    Create it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    durations : dict of label to int ndarray
        Durations of the segments of each label, in positions.
    modelled : dict of label to ndarray of shape (K,), or None
        Probability of the durations 1..K of each label under the model.
    max_duration : int or None
        Longest duration drawn, in positions; None: the longest of all.
    bins : int, default=30
        Largest number of bars of a panel; a bar spans one or more positions.
    colors : mapping of label to colour or None
        Colours of matplotlib, for labels that should not have their default.
    sampling_rate : float or None
        Positions per second, for an axis in seconds. None: in positions.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Frameless axes around all panels.
    axes_ : dict of label to matplotlib Axes
        One panel per label.
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn_api.display import DurationDisplay
    >>> display = DurationDisplay.from_predictions(["a", "a", "b", "a", "a", "a"])
    >>> display.durations["a"].tolist(), display.durations["b"].tolist()
    ([2, 3], [1])
    """

    def __init__(
        self,
        *,
        durations: Mapping[Any, np.ndarray],
        modelled: Mapping[Any, np.ndarray] | None = None,
        max_duration: int | None = None,
        bins: int = 30,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
    ) -> None:
        self.durations = durations
        self.modelled = modelled
        self.max_duration = max_duration
        self.bins = bins
        self.colors = colors
        self.sampling_rate = sampling_rate

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any = None,
        y: Any = None,
        *,
        labels: Sequence[Any] | None = None,
        ignore_label: Any = None,
        max_duration: int | None = None,
        bins: int = 30,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
        ax: Axes | None = None,
    ) -> DurationDisplay:
        """Draw the durations of a fitted `SemiCRFSegmenter` over those of given segments.

        The line is the softmax over 1..K of the duration scores of the model: its distribution of
        durations if features and neighbouring segments had no influence.

        Parameters
        ----------
        estimator : fitted `SemiCRFSegmenter`, or pipeline or search with it
        X : ignored
            Present by convention of scikit-learn's displays.
        y : labels or segments of one sequence or many, or None
            True segments; None: the model alone.
        labels : list or None
            Labels to draw, in this order; None: ``classes_``.
        ignore_label : str, number or None
            Background that is not drawn.
        max_duration, bins, colors, sampling_rate
            As for the class.
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.

        Returns
        -------
        display : DurationDisplay

        Raises
        ------
        NotFittedError
            If the estimator is not fitted.
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("DurationDisplay.from_estimator")
        check_is_fitted(estimator)
        model = final_estimator(estimator)
        with torch.no_grad():
            probability = model.module_.head.duration_bias.double().softmax(0).cpu().numpy()
        names = model.classes_.tolist()
        return cls.from_predictions(
            [] if y is None else y,
            modelled=dict(zip(names, probability.T, strict=True)),
            labels=[label for label in names if label != ignore_label]
            if labels is None
            else labels,
            ignore_label=ignore_label,
            max_duration=max_duration,
            bins=bins,
            colors=colors,
            sampling_rate=sampling_rate,
            ax=ax,
        )

    @classmethod
    def from_predictions(
        cls,
        y: Any,
        *,
        modelled: Mapping[Any, np.ndarray] | None = None,
        labels: Sequence[Any] | None = None,
        ignore_label: Any = None,
        max_duration: int | None = None,
        bins: int = 30,
        colors: Mapping[Any, Any] | None = None,
        sampling_rate: float | None = None,
        ax: Axes | None = None,
    ) -> DurationDisplay:
        """Draw the durations of segments.

        Parameters
        ----------
        y : labels or segments of one sequence or many
        modelled : dict of label to array-like of shape (K,), or None
            Probability of the durations 1..K under a model.
        labels : list or None
            Labels to draw, in this order; None: all that occur, sorted.
        ignore_label, max_duration, bins, colors, sampling_rate
            As for `from_estimator`.
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.

        Returns
        -------
        display : DurationDisplay

        Raises
        ------
        ValueError
            If there is nothing to draw or an argument does not fit.
        ImportError
            If matplotlib is missing.
        """
        pairs = read_pairs(y, y) if len(y) else []
        labels = read_labels(pairs, labels, ignore_label)
        durations: dict[Any, list[int]] = {label: [] for label in labels}
        for one, _ in pairs:
            for start, stop, label in zip(one.starts, one.stops, one.labels, strict=True):
                if label in durations:
                    durations[label].append(int(stop - start))
        if modelled is not None:
            for label in labels:
                if label not in modelled:
                    raise ValueError(f"`modelled` must have every label as a key; lacks {label!r}.")
            modelled = {label: np.asarray(modelled[label], dtype=float) for label in labels}
        display = cls(
            durations={label: np.array(one, dtype=np.int64) for label, one in durations.items()},
            modelled=modelled,
            max_duration=max_duration,
            bins=bins,
            colors=colors,
            sampling_rate=sampling_rate,
        )
        return display.plot(ax)

    def plot(self, ax: Axes | None = None) -> DurationDisplay:
        """Draw one panel per label.

        Parameters
        ----------
        ax : matplotlib Axes or None
            Axes whose area is divided among the panels; None: a new figure.

        Returns
        -------
        display : DurationDisplay
            The display itself, with `ax_`, `axes_` and `figure_`.

        Raises
        ------
        ValueError
            If there is no duration to draw, or `max_duration` or `bins` is not an integer >= 1.
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("DurationDisplay.plot")
        unit = position_unit(self.sampling_rate)
        modelled = self.modelled or {}
        longest = [int(one.max()) for one in self.durations.values() if len(one)]
        longest += [len(one) for one in modelled.values()]
        if not longest:
            raise ValueError("At least one of `durations` and `modelled` must hold durations.")
        shown = max(longest)
        if self.max_duration is not None:
            shown = check_positive_int("max_duration", self.max_duration)
        width = -(-shown // check_positive_int("bins", self.bins))
        edges = np.arange(0, shown + width, width)
        colors = choose_colors(list(self.durations), self.colors)
        count = len(self.durations)
        ax = open_axes(ax, figsize=(6.4, 1.2 + 1.5 * count))
        ax.set_axis_off()
        self.ax_: Axes = ax
        self.figure_: Figure | SubFigure = ax.figure
        self.axes_: dict[Any, Axes] = {}
        for i, (label, durations) in enumerate(self.durations.items()):
            panel = ax.inset_axes((0, 1 - (i + 0.86) / count, 1, 0.78 / count))
            self.axes_[label] = panel
            # Bars of durations a+1..b, centred on whole positions.
            if len(durations):
                heights = np.histogram(durations, edges + 0.5)[0] / len(durations)
                name = f"{len(durations)} segments"
                panel.bar(
                    (edges[:-1] + 0.5) * unit,
                    heights,
                    width * unit,
                    align="edge",
                    color=colors[label],
                    alpha=0.45,
                    label=name,
                )
            if label in modelled:
                x, mass = _binned(modelled[label], edges)
                panel.plot(x * unit, mass, color="#222222", linewidth=1.2, label="model")
            panel.set_xlim(0, (shown + 1) * unit)
            panel.set_ylim(bottom=0)
            panel.set_title(str(label), loc="left", fontsize="medium")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False)
            if i < count - 1:
                panel.tick_params(labelbottom=False)
        panel.set_xlabel("duration (positions)" if self.sampling_rate is None else "duration (s)")
        return self


def _binned(probability: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle and mass of each bin (edges[i], edges[i + 1]] of durations."""
    cumulative = np.concatenate([[0.0], np.cumsum(probability)])
    at = cumulative[np.minimum(edges, len(probability))]
    return (edges[:-1] + edges[1:] + 1) / 2, np.diff(at)

"""Panels of a plot: signal, rows of segments, boundary posterior.

matplotlib is imported inside functions, so that the package works without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from sklearn_api.metrics._inputs import Segmentation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinct also for colour-blind eyes (the palette of Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#B8A800", "#7F7F7F")
LINES = ("#222222", "#8C8C8C", "#56B4E9", "#E69F00")
_START_LINE = "0.8"


def import_matplotlib(caller: str) -> Any:
    """Import pyplot; ImportError with instructions if it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"`{caller}` needs matplotlib, which is not installed. Install it with "
            '`pip install matplotlib` or `pip install "flash-semicrf-sklearn[plot]"`.'
        ) from error
    return plt


def position_unit(sampling_rate: float | None) -> float:
    """Length of a position on the axis: in seconds, or 1 without `sampling_rate`."""
    if sampling_rate is None:
        return 1.0
    if not (isinstance(sampling_rate, Real) and 0 < sampling_rate < np.inf):
        raise ValueError(f"`sampling_rate` must be None or a number > 0; got {sampling_rate!r}.")
    return 1.0 / sampling_rate


def open_axes(ax: Axes | None, **figure: Any) -> Axes:
    """`ax`, or if None the axes of a new figure with the options `figure`."""
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **figure)[1] if ax is None else ax


def choose_colors(labels: list[Any], chosen: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """Colour of every label: the chosen one, or else a distinct default."""
    import matplotlib

    palette: Sequence[Any] = _COLORS
    if len(labels) > 20:
        palette = list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(labels))))
    elif len(labels) > len(palette):
        palette = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # of a list
    colors = dict(zip(labels, palette, strict=False))
    for label, color in (chosen or {}).items():
        if label not in colors:
            raise ValueError(f"`colors` must have labels as keys, of {labels}; got {label!r}.")
        colors[label] = color
    return colors


def draw_signal(ax: Axes, signal: np.ndarray, unit: float, name: str) -> None:
    """Draw up to four columns as lines, more as an image."""
    length, n_columns = signal.shape
    if n_columns > len(LINES):
        extent = (0, length * unit, -0.5, n_columns - 0.5)
        ax.imshow(signal.T, aspect="auto", origin="lower", extent=extent, cmap="magma")
    else:
        # A position is the stretch [t, t + 1): its value belongs in the middle.
        middle = (np.arange(length) + 0.5) * unit
        for column, color in zip(signal.T, LINES, strict=False):
            ax.plot(middle, column, color=color, linewidth=1.0)
        ax.margins(y=0.08)
    ax.set_ylabel(name)


def make_panels(ax: Axes, heights: dict[str, float], gap: float) -> dict[str, Axes]:
    """Divide the area of `ax` into panels, from the top down."""
    ax.set_axis_off()
    total = sum(heights.values()) + gap * (len(heights) - 1)
    panels: dict[str, Axes] = {}
    top = total
    for name, height in heights.items():
        bounds = (0.0, (top - height) / total, 1.0, height / total)
        panels[name] = ax.inset_axes(bounds, sharex=next(iter(panels.values()), None))
        top -= height + gap
    return panels


def _polygons(one: Segmentation, label: Any, unit: float, low: float, high: float) -> list[Any]:
    """Corners of the bars of one label."""
    return [
        [(a * unit, low), (a * unit, high), (b * unit, high), (b * unit, low)]
        for a, b, other in zip(one.starts, one.stops, one.labels, strict=True)
        if other == label
    ]


def shade(ax: Axes, one: Segmentation, colors: dict[Any, Any], unit: float) -> None:
    """Tint the background of the signal."""
    from matplotlib.collections import PolyCollection

    for label, color in colors.items():
        bars = PolyCollection(
            _polygons(one, label, unit, 0, 1),
            facecolors=[color],
            linewidths=0,
            alpha=0.14,
            transform=ax.get_xaxis_transform(),
            zorder=0,
        )
        ax.add_collection(bars, autolim=False)


def draw_segments(
    ax: Axes, rows: dict[str, Segmentation], colors: dict[Any, Any], unit: float
) -> None:
    """Draw one row of bars per segmentation, the first on top."""
    from matplotlib.collections import PolyCollection

    for row, one in enumerate(rows.values()):
        # White edges separate adjacent segments of one label, but would hide very thin bars.
        wide = len(one.labels) < 200
        for label, color in colors.items():
            bars = PolyCollection(
                _polygons(one, label, unit, -row - 0.4, -row + 0.4),
                facecolors=[color],
                edgecolors="white" if wide else "face",
                linewidths=0.8 if wide else 0.2,
            )
            ax.add_collection(bars, autolim=False)
    ax.set_ylim(-len(rows) + 0.45, 0.55)
    ax.set_yticks([-row for row in range(len(rows))], labels=list(rows))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def draw_boundary(
    ax: Axes, boundary: np.ndarray, reference: Segmentation | None, unit: float
) -> None:
    """Draw the boundary posterior over the starts of a segmentation."""
    if reference is not None:
        ax.vlines(reference.starts * unit, 0, 1, color=_START_LINE, linewidth=0.8, zorder=0)
    onsets = np.arange(len(boundary)) * unit
    ax.fill_between(onsets, boundary, color="#222222", alpha=0.25, linewidth=0)
    ax.plot(onsets, boundary, color="#222222", linewidth=0.9)
    ax.set_ylim(0, 1.05)
    ax.set_yticks([0, 1])
    ax.set_ylabel("P(start)")


def legend_rows(names: Sequence[str]) -> int:
    """Rows of the legend: about 110 letters fit in one, and a colour takes up five."""
    return ceil(sum(len(name) + 5 for name in names) / 110)


def draw_legend(ax: Axes, colors: dict[Any, Any], line: str | None) -> None:
    """Draw the legend of labels, and of the lines of the boundary panel, above the plot."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=str(label)) for label, color in colors.items()]
    if line is not None:
        handles.append(Line2D([], [], color=_START_LINE, label=line))
    if not handles:
        return
    n_rows = legend_rows([handle.get_label() for handle in handles])
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=ceil(len(handles) / n_rows),
        frameon=False,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
        borderaxespad=0.2,
    )

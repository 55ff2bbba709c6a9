"""Plot of the boundary posterior around true boundaries."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.targets import check_y
from sklearn_api._responses import get_response
from sklearn_api.display._drawing import import_matplotlib, open_axes, position_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class BoundaryDisplay:
    """Boundary posterior around true boundaries.

    The plot shows the mean probability of a segment start against the distance to a true boundary.
    A peak at 0 indicates accurate boundaries, its width their uncertainty, and a shifted peak early
    or late boundaries. The sum over an isolated peak is the fraction of boundaries found; far from
    all boundaries, the curve is the rate of false boundaries.

    Create it with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    offsets : ndarray of shape (2 * window + 1,)
        Distances -window..window, in positions.
    mean : ndarray of shape (2 * window + 1,)
        Mean probability of a start at each distance; nan if no sequence extends that far.
    quantiles : ndarray of shape (2, 2 * window + 1) or None
        First and third quartile over the true boundaries, drawn as a band.
    n_boundaries : int
        Number of true boundaries, without the first positions of sequences.
    sampling_rate : float or None
        Positions per second, for an axis in seconds. None: in positions.

    Attributes
    ----------
    line_ : matplotlib Line2D
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    Examples
    --------
    >>> from sklearn_api.display import BoundaryDisplay
    >>> display = BoundaryDisplay.from_predictions(
    ...     ["a", "a", "a", "b", "b"], [1.0, 0.0, 0.25, 0.75, 0.0], window=1
    ... )
    >>> display.mean
    array([0.25, 0.75, 0.  ])
    """

    def __init__(
        self,
        *,
        offsets: np.ndarray,
        mean: np.ndarray,
        quantiles: np.ndarray | None = None,
        n_boundaries: int = 0,
        sampling_rate: float | None = None,
    ) -> None:
        self.offsets = offsets
        self.mean = mean
        self.quantiles = quantiles
        self.n_boundaries = n_boundaries
        self.sampling_rate = sampling_rate

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        window: int = 10,
        sampling_rate: float | None = None,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> BoundaryDisplay:
        """Compute the boundary posterior and draw it.

        Parameters
        ----------
        estimator : fitted estimator with ``predict_boundary_proba``
            Or a pipeline or search with it.
        X, y : sequences and their labels or segments
        window : int, default=10
            Largest distance, in positions.
        sampling_rate : float or None
            As for the class.
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.
        **kwargs
            Options of the line, as for `matplotlib.axes.Axes.plot`.

        Returns
        -------
        display : BoundaryDisplay

        Raises
        ------
        ValueError
            If X and y do not fit together, or y contains no boundary.
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("BoundaryDisplay.from_estimator")
        check_is_fitted(estimator)
        proba = get_response(estimator, "predict_boundary_proba")(X)
        options = {"window": window, "sampling_rate": sampling_rate, "ax": ax, **kwargs}
        return cls.from_predictions(y, proba, **options)

    @classmethod
    def from_predictions(
        cls,
        y_true: Any,
        boundary_proba: Any,
        *,
        window: int = 10,
        sampling_rate: float | None = None,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> BoundaryDisplay:
        """Draw a given boundary posterior.

        Parameters
        ----------
        y_true : labels or segments of one sequence or many
        boundary_proba : array-like of shape (T,), or list of those
            Probability that a segment starts at each position, in [0, 1].
        window, sampling_rate, ax, **kwargs
            As for `from_estimator`.

        Returns
        -------
        display : BoundaryDisplay

        Raises
        ------
        ValueError
            If the two do not fit together, or `y_true` contains no boundary.
        ImportError
            If matplotlib is missing.
        """
        if isinstance(window, bool) or not isinstance(window, Integral) or window < 0:
            raise ValueError(f"`window` must be an integer >= 0; got {window!r}.")
        many = np.ndim(next(iter(boundary_proba), 0.0)) > 0
        parts = list(boundary_proba) if many else [boundary_proba]
        parts = [_probabilities(part, i) for i, part in enumerate(parts)]
        rows = [part[:, None] for part in parts]
        gold = check_y(y_true, read_layout(rows if many else rows[0]))
        inner = gold.start > 0
        if not inner.any():
            raise ValueError("`y_true` must hold a boundary inside a sequence; got none.")
        offsets = np.arange(-window, window + 1)
        around = np.full((int(inner.sum()), len(offsets)), np.nan)
        for row, i, start in zip(around, gold.sequence[inner], gold.start[inner], strict=True):
            at = start + offsets
            inside = (at >= 1) & (at < len(parts[i]))  # a start at position 0 is certain
            row[inside] = parts[i][at[inside]]
        known = ~np.isnan(around).all(0)
        mean, quantiles = np.full(len(offsets), np.nan), np.full((2, len(offsets)), np.nan)
        mean[known] = np.nanmean(around[:, known], axis=0)
        quantiles[:, known] = np.nanquantile(around[:, known], [0.25, 0.75], axis=0)
        display = cls(
            offsets=offsets,
            mean=mean,
            quantiles=quantiles,
            n_boundaries=len(around),
            sampling_rate=sampling_rate,
        )
        return display.plot(ax, **kwargs)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> BoundaryDisplay:
        """Draw mean and quartiles.

        Parameters
        ----------
        ax : matplotlib Axes or None
            Axes to draw in; None: a new figure.
        **kwargs
            Options of the line, as for `matplotlib.axes.Axes.plot`.

        Returns
        -------
        display : BoundaryDisplay
            The display itself, with `line_`, `ax_` and `figure_`.

        Raises
        ------
        ImportError
            If matplotlib is missing.
        """
        import_matplotlib("BoundaryDisplay.plot")
        x = self.offsets * position_unit(self.sampling_rate)
        ax = open_axes(ax)
        options = {"color": "#0072B2", "label": f"mean of {self.n_boundaries} boundaries", **kwargs}
        (self.line_,) = ax.plot(x, self.mean, **options)
        if self.quantiles is not None:
            color = self.line_.get_color()
            ax.fill_between(
                x, *self.quantiles, color=color, alpha=0.2, linewidth=0, label="quartiles"
            )
        ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        unit = "positions" if self.sampling_rate is None else "s"
        ax.set_xlabel(f"distance to a true boundary ({unit})")
        ax.set_ylabel("P(start)")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        self.ax_: Axes = ax
        self.figure_: Figure | SubFigure = ax.figure
        return self


def _probabilities(values: Any, index: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(
            "`boundary_proba` must have shape (T,) with T >= 1 per sequence; got shape "
            f"{array.shape} at sequence {index}."
        )
    wrong = np.flatnonzero(~((array >= 0) & (array <= 1)))
    if len(wrong):
        raise ValueError(
            f"`boundary_proba` must be in [0, 1]; got {array[wrong[0]]} at position {wrong[0]} of "
            f"sequence {index}."
        )
    return array

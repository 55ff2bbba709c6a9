"""Limited-memory BFGS with an optional L1 term (OWL-QN), for many millions of variables.

Minimises ``f(x) + sum_i l1[i] |x[i]|`` for a smooth f. The inverse Hessian is used in its compact
form, H = g I + [S, g Y] M [S, g Y]^T with a small matrix M, so that an iteration reads the history
twice, in the dtype of x: once for its products with the last step, change and slope, and once for
the direction. With an L1 term a
step stays in the orthant that the pseudo-gradient points into. Cost O(n memory) per iteration.

scipy's L-BFGS-B takes several times as long per iteration and works in float64 only: 2 GB of
workspace for 10 million variables.

References
----------
R. H. Byrd, J. Nocedal and R. B. Schnabel, Representations of quasi-Newton matrices and their use in
limited memory methods, Mathematical Programming 63, 1994.
G. Andrew and J. Gao, Scalable training of L1-regularized log-linear models, ICML 2007.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sklearn_api._lbfgs.vectors import combine, largest, products

__all__ = ["Minimum", "minimize"]

_SUFFICIENT = 1e-4
_MAX_TRIALS = 20
_FIRST_STEP = 0.1


class Minimum(NamedTuple):
    """Where `minimize` ended.

    Attributes
    ----------
    x : ndarray of shape (n,)
    losses : list of float
        Value of the whole objective after each iteration.
    status : {"converged", "max_iter", "precision", "stopped", "interrupted", "diverged"}
        "precision": no step improves the objective any more in the dtype of x. "stopped": by the
        callback. "interrupted": by Ctrl-C. "diverged": the objective, its gradient or the square of
        the gradient is not finite at x.
    """

    x: np.ndarray
    losses: list[float]
    status: str


def minimize(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    *,
    l1: np.ndarray | None = None,
    tol: float = 1e-4,
    patience: int = 10,
    gradient_tol: float = 0.0,
    max_iter: int = 500,
    memory: int = 6,
    callback: Callable[[int, float, float, np.ndarray], bool | None] | None = None,
) -> Minimum:
    """Minimise a smooth function plus a weighted L1 norm.

    Parameters
    ----------
    function : callable
        Value and gradient of the smooth part at x; the gradient is a new array.
    x : floating ndarray of shape (n,)
        Start. Scaled so that no more than a tenth of the negative gradient is the right step.
    l1 : ndarray of shape (n,), optional
        Weights of the L1 term, >= 0.
    tol : float
        Ends when the objective has decreased by no more than this part of itself in `patience`
        iterations.
    patience : int
    gradient_tol : float
        Ends when no element of the (pseudo-)gradient is larger.
    max_iter : int
    memory : int
        Pairs of steps and gradient changes kept.
    callback : callable, optional
        Called with the iteration's number, the objective, the largest element of its gradient and
        x, which is not written again. Ends the search by returning True.

    Returns
    -------
    Minimum
    """
    history = _History(memory, x)
    losses: list[float] = []
    try:
        value, gradient = function(x)
        value += _norm(x, l1)
        slope = _pseudo_gradient(x, gradient, l1)
        steepest = largest(slope)
        losses.append(value)
        for iteration in range(1, max_iter + 1):
            if steepest <= gradient_tol:
                return Minimum(x, losses[1:], "converged")
            found = _step(function, x, value, slope, history, l1)
            if found is None:
                finite = np.isfinite(value) and np.isfinite(np.vdot(slope, slope))
                return Minimum(x, losses[1:], "precision" if finite else "diverged")
            new, value, new_gradient = found
            slope = _pseudo_gradient(new, new_gradient, l1)
            history.add(new, x, new_gradient, gradient, slope)
            x, gradient, steepest = new, new_gradient, largest(slope)
            losses.append(value)
            if callback is not None and callback(iteration, value, steepest, x):
                return Minimum(x, losses[1:], "stopped")
            if iteration >= patience and losses[-1 - patience] - value <= tol * abs(value):
                return Minimum(x, losses[1:], "converged")
    except KeyboardInterrupt:
        return Minimum(x, losses[1:], "interrupted")
    return Minimum(x, losses[1:], "max_iter")


def _norm(x: np.ndarray, l1: np.ndarray | None) -> float:
    return 0.0 if l1 is None else float(np.abs(x) @ l1)


def _pseudo_gradient(x: np.ndarray, gradient: np.ndarray, l1: np.ndarray | None) -> np.ndarray:
    """Gradient of the steepest of the descents from x; zero where both sides ascend."""
    if l1 is None:
        return gradient
    shrunk = np.sign(gradient) * np.maximum(np.abs(gradient) - l1, 0)
    return np.where(x == 0, shrunk, gradient + np.sign(x) * l1)


def _step(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    value: float,
    slope: np.ndarray,
    history: _History,
    l1: np.ndarray | None,
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """A better point as `_search` returns it, or None."""
    direction = history.direction(slope, value, l1 is not None)
    found = _search(function, x, value, slope, direction, l1)
    if found is None and history.count:
        # The curvature remembered may be to blame, not the precision.
        history.clear()
        direction = history.direction(slope, value, False)
        found = _search(function, x, value, slope, direction, l1)
    return found


def _search(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    value: float,
    slope: np.ndarray,
    direction: np.ndarray,
    l1: np.ndarray | None,
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """Backtrack from a whole step: (x, objective, gradient), or None if nothing is gained."""
    descent = float(slope @ direction)
    if not descent < 0:
        return None
    orthant = None if l1 is None else np.where(x == 0, -np.sign(slope), np.sign(x))
    step = 1.0
    for _ in range(_MAX_TRIALS):
        new = x + direction if step == 1.0 else x + x.dtype.type(step) * direction
        if orthant is not None:
            new[new * orthant <= 0] = 0
            descent = float(slope @ (new - x)) / step
        new_value, gradient = function(new)
        new_value += _norm(new, l1)
        if new_value <= value + _SUFFICIENT * step * descent and new_value < value:
            return new, new_value, gradient
        # The minimum of the parabola through both values and the slope, within bounds.
        curvature = new_value - value - step * descent
        if curvature > 0:
            guess = -0.5 * step * descent / curvature if np.isfinite(curvature) else 0.0
            step *= min(max(guess, 0.1), 0.5)
        else:
            step *= 0.5
    return None


class _History:
    """The last steps S and changes of the slope Y, as rows, and their products."""

    def __init__(self, memory: int, x: np.ndarray) -> None:
        rows = memory + 1  # one for a pair that may be refused
        self.steps = np.zeros((rows, len(x)), x.dtype)
        self.changes = np.zeros((rows, len(x)), x.dtype)
        self.cross = np.zeros((rows, rows))  # S Y^T
        self.square = np.zeros((rows, rows))  # Y Y^T
        self.along, self.across = np.zeros((2, rows))  # S and Y times the last slope
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.order: list[int] = []  # rows, oldest first

    @property
    def count(self) -> int:
        """Number of pairs held."""
        return len(self.order)

    def add(
        self,
        new_x: np.ndarray,
        x: np.ndarray,
        new_gradient: np.ndarray,
        gradient: np.ndarray,
        slope: np.ndarray,
    ) -> None:
        """Remember a pair of positive curvature, leave out any other, and prepare `direction`."""
        row = next(r for r in range(len(self.steps)) if r not in self.order)
        vectors = (new_x, x, new_gradient, gradient, slope, self.steps, self.changes)
        cross, self.along, square, self.across, back = products(*vectors, [*self.order, row])
        if not cross[row] > 1e-10 * square[row]:
            return
        self.cross[:, row], self.cross[row] = cross, back
        self.square[row] = self.square[:, row] = square
        self.order.append(row)
        if self.count == len(self.steps):
            self.order.pop(0)

    def direction(self, slope: np.ndarray, value: float, constrained: bool) -> np.ndarray:
        """Minus the approximate inverse Hessian times `slope`, which `add` has been given.

        Without a history, a step along the slope: a parabola of this value and slope that does not
        fall below 0 has its minimum at ``2 value / |slope|^2`` at most. Where `constrained`,
        elements that do not descend are 0.
        """
        if not self.count:
            square = float(np.vdot(slope, slope))
            step = min(_FIRST_STEP, 2 * value / square) if value > 0 else _FIRST_STEP
            return slope * slope.dtype.type(-step)
        rows = np.ix_(self.order, self.order)
        upper, square = np.triu(self.cross[rows]), self.square[rows]
        scale = upper[-1, -1] / square[-1, -1]
        along, across = self.along[self.order], self.across[self.order]
        inner = np.linalg.solve(upper, along)
        middle = np.diag(upper) * inner + scale * (square @ inner - across)
        coefficients = np.zeros((2, len(self.steps)))
        coefficients[0, self.order] = -np.linalg.solve(upper.T, middle)
        coefficients[1, self.order] = scale * inner
        direction = combine(slope, self.steps, self.changes, self.order, -scale, coefficients)
        if constrained:
            direction[direction * slope >= 0] = 0
        return direction

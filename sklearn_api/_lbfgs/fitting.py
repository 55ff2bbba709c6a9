"""`solver="lbfgs"`: from an estimator and its checked training data to a fitted module."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._lbfgs.features import FeatureMatrix, stack_rows
from sklearn_api._lbfgs.likelihood import LinearLikelihood
from sklearn_api._lbfgs.minimize import minimize
from sklearn_api._lbfgs.objective import LinearObjective
from sklearn_api._training.datasets import split_sequences
from sklearn_api._training.weights import training_weights

__all__ = ["check_solver", "fit_lbfgs", "offers_partial_fit"]


def offers_partial_fit(estimator: Any) -> bool:
    """True for solvers of mini-batches; for the other, raise AttributeError with what to do."""
    if estimator.solver == "lbfgs":
        raise AttributeError(
            '`partial_fit` needs a solver of mini-batches; solver="lbfgs" minimises over all '
            "sequences that it is given. To go on from the last solution, set `warm_start=True` "
            "and call `fit`."
        )
    return True


def check_solver(estimator: Any) -> None:
    """Raise ValueError for settings that do not go with an estimator's solver."""
    e = estimator
    if e.solver != "lbfgs":
        if e.l1_ratio > 0:
            raise ValueError(
                f'`l1_ratio` > 0 needs solver="lbfgs"; got {e.l1_ratio} with solver={e.solver!r}.'
            )
        return
    if not isinstance(e.encoder, str) or e.encoder != "linear":
        raise ValueError(f'solver="lbfgs" needs encoder="linear"; got {e.encoder!r}.')
    routed = ("optimizer__", "iterator_train__", "iterator_valid__", "callbacks__")
    routed = [name for name in e._extra_params() if name.startswith(routed)]
    for name in ("callbacks", "optimizer", "crop_length", *routed):
        if getattr(e, name) not in (None, False, [], ()):
            raise ValueError(
                f"`{name}` needs a solver of mini-batches; got {getattr(e, name)!r} with "
                'solver="lbfgs".'
            )


def fit_lbfgs(
    estimator: Any,
    sequences: Sequences,
    table: SegmentTable,
    start_anew: bool,
    sample_weight: Any = None,
) -> None:
    """Train the linear model of an estimator to the minimum of its objective.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
        With its net built around an initial module, which is changed in place.
    sequences, table : training data
    start_anew : bool
        Start from zero weights and transitions, rather than from the module's.
    sample_weight : array-like, optional
        As for `SemiCRFSegmenter.fit`.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C, with the last or best iteration's parameters in the module.
    ValueError
        Where the objective or its gradient is not finite.

    Warns
    -----
    ConvergenceWarning
        Where `max_iter` ends the search.
    """
    weights = training_weights(estimator, sample_weight, sequences.layout)
    count = len(sequences.lengths)
    means = np.ones(count) if weights is None else np.array([w.mean() for w in weights])
    module, net = estimator.module_, estimator.net_
    head = module.head.to(device="cpu", dtype=torch.float64)
    if start_anew:
        with torch.no_grad():
            for layer in (head.projection, head.boundary_projection):
                if layer is not None:
                    layer.weight.zero_()
                    layer.bias.zero_()
            head.transition.zero_()
    train, valid = np.arange(count), None
    if estimator.early_stopping:
        train, valid = split_sequences(count, estimator.validation_fraction, estimator._seed)

    def likelihood(rows: np.ndarray, like: FeatureMatrix | None = None) -> LinearLikelihood:
        order = rows[np.argsort(sequences.lengths[rows], kind="stable")]
        values = stack_rows([sequences.values[i] for i in order])
        features = FeatureMatrix(values) if like is None else like.reduced(values)
        part = _selected(table, order)
        lengths = sequences.lengths[order]
        return LinearLikelihood(head, features, lengths, part, means[order], estimator.dtype)

    try:
        # Steps that overflow are refused by the search.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            training = likelihood(train)
            objective = LinearObjective(
                training,
                [anchor.cpu().double() for anchor in module.duration_anchors()],
                int(np.isin(table.sequence.numpy(), train).sum()),
                estimator.alpha,
                estimator.l1_ratio,
            )
            held_out = None if valid is None else likelihood(valid, training.features)
            progress = _Progress(estimator, objective, held_out)
            found = minimize(
                objective,
                objective.pack(),
                l1=objective.l1,
                tol=estimator.tol,
                # Held-out sequences, if there are any, decide alone.
                patience=estimator.n_iter_no_change if valid is None else estimator.max_iter + 1,
                max_iter=estimator.max_iter,
                callback=progress,
            )
            objective.unpack(found.x if progress.best_x is None else progress.best_x)
    finally:
        module.to(device=net.device, dtype=getattr(torch, estimator.dtype))
    _report(estimator, found.status)


def _report(estimator: Any, status: str) -> None:
    """Raise, or warn, where a search has ended before a minimum."""
    e = estimator
    if status == "interrupted":
        raise KeyboardInterrupt
    if status == "diverged":
        raise _diverged(e, e.n_iter_ + 1, "the loss or its gradient")
    if status == "max_iter":
        warnings.warn(
            f"L-BFGS stopped after max_iter={e.max_iter} iterations while the "
            f"{'validation loss' if e.early_stopping else 'loss'} still decreased by more than "
            f"tol={e.tol} in {e.n_iter_no_change}. Raise `max_iter` or `tol`.",
            ConvergenceWarning,
            # `fit_lbfgs`, `fit`, scikit-learn's wrapper, its caller.
            stacklevel=5,
        )


def _diverged(estimator: Any, iteration: int, what: str) -> ValueError:
    return ValueError(
        f"Training diverged at iteration {iteration}: {what} is not finite. Scale `X`; large "
        f"weights of samples and a large `alpha` (now {estimator.alpha:g}) overflow, too."
    )


class _Progress:
    """Writes the history of a fit, an entry per iteration, and watches held-out sequences.

    Attributes
    ----------
    best_x : ndarray or None
        Variables of the least held-out loss.
    """

    def __init__(
        self, estimator: Any, objective: LinearObjective, held_out: LinearLikelihood | None
    ) -> None:
        self.estimator, self.objective, self.held_out = estimator, objective, held_out
        self.best_x: np.ndarray | None = None
        self.best, self.plateau, self.waited = np.inf, np.inf, 0

    def __call__(self, iteration: int, loss: float, slope: float, x: np.ndarray) -> bool:
        """Record an iteration; True where training is to stop."""
        e, history = self.estimator, self.estimator.net_.history
        history.new_epoch()
        history.record("epoch", len(history))
        history.record("train_loss", loss)
        text = f"iteration {iteration:4d}  loss {loss:.6f}  gradient {slope:.2e}"
        if self.held_out is not None:
            valid = self.objective.held_out_loss(self.held_out, x)
            history.record("valid_loss", valid)
            if not np.isfinite(valid):
                raise _diverged(e, len(history), "the loss of held-out sequences")
            text += f"  held out {valid:.6f}"
            if valid < self.best:
                self.best, self.best_x = valid, x
            improved = valid < self.plateau - e.tol
            self.plateau = valid if improved else self.plateau
            self.waited = 0 if improved else self.waited + 1
        if e.verbose:
            sys.stdout.write(text + "\n")
        return self.waited >= e.n_iter_no_change


def _selected(table: SegmentTable, order: np.ndarray) -> SegmentTable:
    """Segments of some sequences, numbered by their place in `order`."""
    count = int(table.sequence.max()) + 1
    rank = np.full(count, -1)
    rank[order] = np.arange(len(order))
    sequence = torch.from_numpy(rank)[table.sequence]
    rows = torch.argsort(sequence, stable=True)
    rows = rows[sequence[rows] >= 0]
    return SegmentTable(sequence[rows], *(column[rows] for column in table[1:]))

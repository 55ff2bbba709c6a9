"""`solver="lbfgs"`: from checked training data to a fitted module."""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from skorch.history import History

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._lbfgs.features import FeatureMatrix, stack_rows
from sklearn_api._lbfgs.likelihood import LinearLikelihood
from sklearn_api._lbfgs.minimize import minimize
from sklearn_api._lbfgs.objective import LinearObjective
from sklearn_api._model.module import SegmentationModule
from sklearn_api._training.splitting import split_sequences

__all__ = ["Options", "fit_lbfgs", "zero_weights"]


class Options(NamedTuple):
    """Parameters of `SemiCRFSegmenter` that a search reads."""

    alpha: float
    l1_ratio: float
    tol: float
    n_iter_no_change: int
    max_iter: int
    dtype: str
    verbose: int


def fit_lbfgs(
    module: SegmentationModule,
    history: History,
    sequences: Sequences,
    table: SegmentTable,
    weights: list[np.ndarray] | None,
    options: Options,
    *,
    validation_fraction: float | None,
    seed: int,
    device: torch.device,
) -> None:
    """Train a linear model to the minimum of its objective, from its current parameters.

    Parameters
    ----------
    module : SegmentationModule
        Changed in place.
    history : History
        Gets an entry per iteration.
    sequences, table : training data
    weights : list of ndarray of shape (T_i,), or None
        Of the positions.
    options : Options
    validation_fraction : float or None
        Fraction of the sequences to hold out; None: none.
    seed : int
        Of the choice of those.
    device : torch.device
        Of the module, before and after.

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
    tol, dtype = options.tol, options.dtype
    count = len(sequences.lengths)
    means = np.ones(count) if weights is None else np.array([w.mean() for w in weights])
    train, valid = np.arange(count), None
    if validation_fraction is not None:
        train, valid = split_sequences(count, validation_fraction, seed)
    head = module.head.to(device="cpu", dtype=torch.float64)

    def likelihood(rows: np.ndarray, like: FeatureMatrix | None = None) -> LinearLikelihood:
        order = rows[np.argsort(sequences.lengths[rows], kind="stable")]
        values = stack_rows([sequences.values[i] for i in order])
        features = FeatureMatrix(values) if like is None else like.reduced(values)
        part = _selected(table, order)
        return LinearLikelihood(head, features, sequences.lengths[order], part, means[order], dtype)

    try:
        # Steps that overflow are refused by the search.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            training = likelihood(train)
            anchors = [anchor.cpu().double() for anchor in module.duration_anchors()]
            num_segments = int(np.isin(table.sequence.numpy(), train).sum())
            objective = LinearObjective(
                training, anchors, num_segments, options.alpha, options.l1_ratio
            )
            held_out = None if valid is None else likelihood(valid, training.features)
            patience = options.n_iter_no_change
            progress = _Progress(
                history, objective, held_out, tol=tol, patience=patience, verbose=options.verbose
            )
            found = minimize(
                objective,
                objective.pack(),
                l1=objective.l1,
                tol=tol,
                # Held-out sequences, if there are any, decide alone.
                patience=patience if valid is None else options.max_iter + 1,
                max_iter=options.max_iter,
                callback=progress,
            )
            objective.unpack(found.x if progress.best_x is None else progress.best_x)
    finally:
        module.to(device=device, dtype=getattr(torch, dtype))
    if found.status == "interrupted":
        raise KeyboardInterrupt
    if found.status == "diverged":
        raise _diverged(options.alpha, len(history) + 1, "the loss or its gradient")
    if found.status == "max_iter":
        warnings.warn(
            f"L-BFGS stopped after max_iter={options.max_iter} iterations while the "
            f"{'loss' if valid is None else 'validation loss'} still decreased by more than "
            f"tol={tol} of itself in {options.n_iter_no_change}. Raise `max_iter` or `tol`.",
            ConvergenceWarning,
            # `fit_lbfgs`, `_run_lbfgs`, `fit`, scikit-learn's wrapper, its caller.
            stacklevel=5,
        )


def _diverged(alpha: float, iteration: int, what: str) -> ValueError:
    return ValueError(
        f"Training diverged at iteration {iteration}: {what} is not finite. Scale `X`; large "
        f"weights of samples and a large `alpha` (now {alpha:g}) overflow, too."
    )


class _Progress:
    """Writes the history of a fit, an entry per iteration, and watches held-out sequences.

    Attributes
    ----------
    best_x : ndarray or None
        Variables of the least held-out loss.
    """

    def __init__(
        self,
        history: History,
        objective: LinearObjective,
        held_out: LinearLikelihood | None,
        *,
        tol: float,
        patience: int,
        verbose: int,
    ) -> None:
        self.history, self.objective, self.held_out = history, objective, held_out
        self.tol, self.patience, self.verbose = tol, patience, verbose
        self.best_x: np.ndarray | None = None
        self.best, self.plateau, self.waited = np.inf, np.inf, 0

    def __call__(self, iteration: int, loss: float, slope: float, x: np.ndarray) -> bool:
        """Record an iteration; True where training is to stop."""
        history = self.history
        history.new_epoch()
        history.record("epoch", len(history))
        history.record("train_loss", loss)
        text = f"iteration {iteration:4d}  loss {loss:.6f}  gradient {slope:.2e}"
        if self.held_out is not None:
            valid = self.objective.held_out_loss(self.held_out, x)
            history.record("valid_loss", valid)
            if not np.isfinite(valid):
                alpha = self.objective.alpha
                raise _diverged(alpha, len(history), "the loss of held-out sequences")
            text += f"  held out {valid:.6f}"
            if valid < self.best:
                self.best, self.best_x = valid, x
            improved = valid + self.tol * abs(valid) < self.plateau
            self.plateau = valid if improved else self.plateau
            self.waited = 0 if improved else self.waited + 1
        if self.verbose:
            sys.stdout.write(text + "\n")
        return self.waited >= self.patience


def zero_weights(head: SemiMarkovCRFHead) -> None:
    """Set the projections and transitions of a head to 0, where L-BFGS starts anew."""
    with torch.no_grad():
        for layer in (head.projection, head.boundary_projection):
            if layer is not None:
                layer.weight.zero_()
                layer.bias.zero_()
        head.transition.zero_()


def _selected(table: SegmentTable, order: np.ndarray) -> SegmentTable:
    """Segments of some sequences, numbered by their place in `order`."""
    count = int(table.sequence.max()) + 1
    rank = np.full(count, -1)
    rank[order] = np.arange(len(order))
    sequence = torch.from_numpy(rank)[table.sequence]
    rows = torch.argsort(sequence, stable=True)
    rows = rows[sequence[rows] >= 0]
    return SegmentTable(sequence[rows], *(column[rows] for column in table[1:]))

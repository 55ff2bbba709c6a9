"""`solver="lbfgs"`: from an estimator and its checked training data to a fitted module."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from flash_semicrf.segments import SegmentTable
from sklearn_api.sequences import Sequences
from sklearn_api.solvers.features import FeatureMatrix, stack_rows
from sklearn_api.solvers.lbfgs import minimize
from sklearn_api.solvers.objective import LinearObjective
from sklearn_api.weights import check_sample_weight

__all__ = ["check_solver", "fit_lbfgs"]


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
    for name in ("early_stopping", "callbacks", "optimizer", "crop_length", "duration_tail"):
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
    """
    weights = check_sample_weight(sample_weight, sequences.layout)
    order = np.argsort(sequences.lengths, kind="stable")
    features = FeatureMatrix(stack_rows([sequences.values[i] for i in order]))
    module, net = estimator.module_, estimator.net_
    head = module.head.to(device="cpu", dtype=torch.float64)
    if start_anew:
        with torch.no_grad():
            for layer in (head.projection, head.boundary_projection):
                if layer is not None:
                    layer.weight.zero_()
                    layer.bias.zero_()
            head.transition.zero_()
    objective = LinearObjective(
        head,
        [anchor.cpu().double() for anchor in module.duration_anchors()],
        features,
        sequences.lengths[order],
        _reordered(table, order),
        estimator.alpha,
        estimator.l1_ratio,
        np.ones(len(order)) if weights is None else np.array([w.mean() for w in weights])[order],
        estimator.dtype,
    )

    def record(iteration: int, loss: float, slope: float) -> None:
        net.history.new_epoch()
        net.history.record("epoch", len(net.history))
        net.history.record("train_loss", loss)
        if estimator.verbose:
            sys.stdout.write(f"iteration {iteration:4d}  loss {loss:.6f}  gradient {slope:.2e}\n")

    x = objective.pack()
    try:
        found = minimize(
            objective,
            x,
            l1=objective.l1,
            tol=estimator.tol,
            patience=estimator.n_iter_no_change,
            max_iter=estimator.max_iter,
            callback=record,
        )
        objective.unpack(found.x)
    finally:
        module.to(device=net.device, dtype=getattr(torch, estimator.dtype))
    if found.status == "max_iter":
        warnings.warn(
            f"L-BFGS stopped after max_iter={estimator.max_iter} iterations while the loss still "
            f"decreased by more than tol={estimator.tol} in {estimator.n_iter_no_change}. Raise "
            "`max_iter` or `tol`.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _reordered(table: SegmentTable, order: np.ndarray) -> SegmentTable:
    """Segments of the sequences in another order."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    sequence = torch.from_numpy(rank)[table.sequence]
    rows = torch.argsort(sequence, stable=True)
    return SegmentTable(sequence[rows], *(column[rows] for column in table[1:]))

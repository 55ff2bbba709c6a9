"""Whether training by mini-batches ended before its loss had."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning
from skorch.callbacks import EarlyStopping

from sklearn_api._training.net import SegmentationNet

__all__ = ["warn_unconverged"]


def warn_unconverged(
    net: SegmentationNet, epochs: int, max_epochs: int, learning_rate: float
) -> None:
    """Warn where the last of `max_epochs` ended training that `n_iter_no_change` would not have.

    Not where that is as long as training: then something else decides when to stop, a schedule of
    learning rates for example.

    Parameters
    ----------
    net : SegmentationNet
        After a fit.
    epochs : int
        Those of this fit.
    max_epochs, learning_rate
        Parameters of the estimator, which the message names.

    Warns
    -----
    ConvergenceWarning
    """
    stopping = next(cb for name, cb in net.callbacks_ if name == "stopping")
    assert isinstance(stopping, EarlyStopping)
    if epochs < max_epochs or stopping.patience >= max_epochs or _stopped(stopping):
        return
    loss = "validation loss" if stopping.monitor == "valid_loss" else "training loss"
    warnings.warn(
        f"Training ended with epoch max_epochs={max_epochs} while the {loss} still decreased by "
        f"more than tol={stopping.threshold} within n_iter_no_change={stopping.patience} epochs. "
        f"Raise `max_epochs` or `learning_rate`, which is {learning_rate:g}.",
        ConvergenceWarning,
        stacklevel=5,  # this function, `_run_epochs`, `fit`, scikit-learn's wrapper, its caller
    )


def _stopped(stopping: EarlyStopping) -> bool:
    return bool(stopping.misses_ >= stopping.patience)

"""Ctrl-C during training: when the model so far is kept, and when the interrupt goes on.

`fit` that is called directly, or in a pipeline, keeps the model and warns. Inside a loop over fits
(a search, cross-validation, an ensemble) a model that was cut short would pass for a trained one:
there, and in `partial_fit`, which is a step of such a loop, the KeyboardInterrupt is raised again.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from sklearn.exceptions import ConvergenceWarning

__all__ = ["in_a_loop", "interruptible"]

_LOOPS = ("concurrent", "joblib", "multiprocessing", "sklearn")
_ONE_FIT = ("sklearn.base", "sklearn.pipeline", "sklearn.utils")


def in_a_loop() -> bool:
    """Whether code that may fit many models is among the callers.

    That is all of joblib and scikit-learn but its pipelines, and worker processes.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module.split(".")[0] in _LOOPS and not module.startswith(_ONE_FIT):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def interruptible(estimator: Any, keep: bool) -> Iterator[None]:
    """Set ``estimator.interrupted_`` by what becomes of the training inside the ``with`` block.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
        Its parameters are in order whenever the block raises KeyboardInterrupt.
    keep : bool
        Turn an interrupt that belongs to no loop into a ConvergenceWarning.
    """
    estimator.interrupted_ = False
    try:
        yield
    except KeyboardInterrupt:
        estimator.interrupted_ = True
        if not keep or in_a_loop():
            raise
        best = "best " if estimator.early_stopping else ""
        unit = "iteration" if estimator.solver == "lbfgs" else "epoch"
        warnings.warn(
            f"`fit` was interrupted at {unit} {estimator.n_iter_}: the model is the {best}one so "
            "far, and `interrupted_` is True. `fit` with `warm_start=True` goes on from it.",
            ConvergenceWarning,
            # The generator, contextlib, `fit`, scikit-learn's wrapper, its caller.
            stacklevel=5,
        )

"""Ctrl-C during training: when the model so far is kept, and when the interrupt goes on.

`fit` that is called directly, or in a pipeline, keeps the model and warns. Inside a loop over fits
(a search, cross-validation, an ensemble) a model that was cut short would pass for a trained one:
there, and in `partial_fit`, which is a step of such a loop, the KeyboardInterrupt is raised again.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

from sklearn.exceptions import ConvergenceWarning

__all__ = ["in_a_loop", "warn_of_interrupt"]

_LOOPS = ("concurrent", "joblib", "multiprocessing", "sklearn")
_ONE_FIT = ("sklearn.base", "sklearn.pipeline", "sklearn.utils")


def in_a_loop() -> bool:
    """Whether code that may fit many models is among the callers.

    That is all of joblib and scikit-learn but its pipelines, and worker processes.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if module.split(".")[0] in _LOOPS and not module.startswith(_ONE_FIT):
            return True
        frame = frame.f_back
    return False


def warn_of_interrupt(place: str, best: bool) -> None:
    """Warn that `fit`, which calls this, keeps a model whose training was cut short.

    Parameters
    ----------
    place : str
        Where training ended: "epoch 3".
    best : bool
        The model is the best one so far, not the last.

    Warns
    -----
    ConvergenceWarning
    """
    warnings.warn(
        f"`fit` was interrupted at {place}: the model is the {'best ' if best else ''}one so far, "
        "and `interrupted_` is True. `fit` with `warm_start=True` goes on from it.",
        ConvergenceWarning,
        stacklevel=4,  # this function, `fit`, scikit-learn's wrapper, its caller
    )

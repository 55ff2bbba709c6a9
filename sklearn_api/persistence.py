"""What a saved estimator carries beyond its attributes: the version it was saved with."""

from __future__ import annotations

import warnings
from typing import Any

from sklearn.exceptions import InconsistentVersionWarning as SklearnInconsistentVersionWarning

from flash_semicrf._version import __version__

__all__ = ["InconsistentVersionWarning", "VersionedMixin"]

_KEY = "_flash_semicrf_version"


class InconsistentVersionWarning(SklearnInconsistentVersionWarning):
    """A model is loaded with another version than it was saved with.

    Parameters
    ----------
    estimator_name : str
    current_version, original_version : str
        Of flash_semicrf: the one that loads, and the one that saved; "unknown" for a model that
        does not say.

    Notes
    -----
    Filters for scikit-learn's warning of this name apply to it too.
    """

    def __init__(self, *, estimator_name: str, current_version: str, original_version: str) -> None:
        self.estimator_name = estimator_name
        self.current_version = current_version
        self.original_version = original_version

    def __str__(self) -> str:
        return (
            f"{self.estimator_name} was saved with flash_semicrf {self.original_version} and is "
            f"loaded with version {self.current_version}. It may fail or predict differently; fit "
            "it again, or load it with the version that saved it."
        )


class VersionedMixin:
    """An estimator whose saved state names the version, and warns where another one loads it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _KEY: __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        saved_with = state.pop(_KEY, "unknown")
        if saved_with != __version__:
            warnings.warn(
                InconsistentVersionWarning(
                    estimator_name=type(self).__name__,
                    current_version=__version__,
                    original_version=saved_with,
                ),
                stacklevel=2,
            )
        super().__setstate__(state)

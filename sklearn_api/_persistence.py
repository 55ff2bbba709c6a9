"""What a saved estimator carries beyond its attributes: the version it was saved with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from sklearn.exceptions import InconsistentVersionWarning as SklearnInconsistentVersionWarning
from torch import nn

from flash_semicrf._version import __version__

__all__ = ["InconsistentVersionWarning", "VersionedMixin", "missing_attributes"]

_KEY = "_flash_semicrf_version"


class InconsistentVersionWarning(SklearnInconsistentVersionWarning):
    """A model is loaded with another version than it was saved with, or lacks a part.

    Parameters
    ----------
    estimator_name : str
    current_version, original_version : str
        Of flash_semicrf: the one that loads, and the one that saved; "unknown" for a model that
        does not say.
    missing : sequence of str
        Parameters and attributes of the loading version that the model was saved without.

    Notes
    -----
    Filters for scikit-learn's warning of this name apply to it too.
    """

    def __init__(
        self,
        *,
        estimator_name: str,
        current_version: str,
        original_version: str,
        missing: Sequence[str] = (),
    ) -> None:
        self.estimator_name = estimator_name
        self.current_version = current_version
        self.original_version = original_version
        self.missing = list(missing)

    def __str__(self) -> str:
        return (
            f"{self.estimator_name} was saved with flash_semicrf {self.original_version} and is "
            f"loaded with version {self.current_version}. It may fail or predict differently; fit "
            "it again, or load it with the version that saved it."
            + (f" It was saved without {', '.join(self.missing)}." if self.missing else "")
        )


class VersionedMixin:
    """An estimator whose saved state names the version, and warns where another one loads it.

    Parameters that are younger than the state get their defaults.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), _KEY: __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        saved_with = state.pop(_KEY, "unknown")
        parameters = inspect.signature(type(self).__init__).parameters.values()
        younger = {p.name: p.default for p in parameters if p.default is not p.empty}
        younger = {name: value for name, value in younger.items() if name not in state}
        super().__setstate__(state | younger)
        missing = [*younger, *self._missing_attributes()]
        if saved_with != __version__ or missing:
            warnings.warn(
                InconsistentVersionWarning(
                    estimator_name=type(self).__name__,
                    current_version=__version__,
                    original_version=saved_with,
                    missing=missing,
                ),
                stacklevel=2,
            )

    def _missing_attributes(self) -> list[str]:
        """Names of what a model fitted by this version has and this one lacks."""
        return []


def missing_attributes(module: nn.Module, like: nn.Module) -> list[str]:
    """Attributes, parameters, buffers and submodules of one module that another one lacks."""

    def names(m: nn.Module) -> set[str]:
        return {*vars(m), *m._parameters, *m._buffers, *m._modules}

    return sorted(names(like) - names(module) - names(nn.Module()))

"""The version that a saved estimator carries, and the warning where another version loads it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sklearn.exceptions import InconsistentVersionWarning as SklearnInconsistentVersionWarning
from torch import nn

from flash_semicrf._version import __version__
from flash_semicrf.nn import SemiMarkovCRFHead
from sklearn_api._model.rng import PrivateRNG

__all__ = [
    "InconsistentVersionWarning",
    "defaults_of",
    "missing_from_head",
    "split_version",
    "warn_of_version",
    "with_version",
]

_KEY = "_flash_semicrf_version"


class InconsistentVersionWarning(SklearnInconsistentVersionWarning):
    """A model is loaded with another version than it was saved with, or lacks a part.

    Parameters
    ----------
    estimator_name : str
    current_version, original_version : str
        Of flash_semicrf: the one that loads, and the one that saved; "unknown" for a model that
        does not record it.
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


def with_version(state: dict[str, Any]) -> dict[str, Any]:
    """State to save, with this version in it."""
    return {**state, _KEY: __version__}


def split_version(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Saved state without the version, and the version; "unknown" where the state has none."""
    state = dict(state)
    saved_with = state.pop(_KEY, "unknown")
    return state, saved_with


def defaults_of(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Default values of the parameters of a constructor."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def warn_of_version(name: str, saved_with: str, missing: Sequence[str]) -> None:
    """Warn where a loaded estimator is another version's, or lacks a part.

    Parameters
    ----------
    name : str
        Class of the estimator.
    saved_with : str
        Version that saved it.
    missing : sequence of str
        Parameters and attributes that it was saved without.

    Warns
    -----
    InconsistentVersionWarning
    """
    if saved_with != __version__ or missing:
        warnings.warn(
            InconsistentVersionWarning(
                estimator_name=name,
                current_version=__version__,
                original_version=saved_with,
                missing=missing,
            ),
            stacklevel=3,  # this function, `__setstate__`, its caller
        )


def missing_from_head(head: nn.Module) -> list[str]:
    """Attributes, parameters, buffers and submodules that a head of this version has beyond one."""

    def names(m: nn.Module) -> set[str]:
        return {*vars(m), *m._parameters, *m._buffers, *m._modules}

    with PrivateRNG(0, torch.device("cpu")).use():
        like = SemiMarkovCRFHead(1, 1, 1)
    return sorted(names(like) - names(head) - names(nn.Module()))

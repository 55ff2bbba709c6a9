"""Checks of an estimator's parameters that scikit-learn's constraints cannot express."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from skorch.callbacks import Callback

from sklearn_api._sklearn import Interval

__all__ = [
    "check_largest",
    "check_parameters",
    "check_routed",
    "check_solver",
    "encoder_params",
    "is_routed",
    "net_params",
]

_NET_PREFIXES = ("optimizer__", "iterator_train__", "iterator_valid__", "callbacks__")
_PREFIXES = ("module__", *_NET_PREFIXES)


def is_routed(name: str) -> bool:
    """Whether a parameter has the prefix of those for the encoder or the skorch net."""
    return name.startswith(_PREFIXES)


def check_routed(names: Iterable[str], owner: str) -> None:
    """Raise for a parameter that is neither the estimator's own nor routed.

    Parameters
    ----------
    names : iterable of str
        Parameters beyond those that the constructor names.
    owner : str
        Class of the estimator, for the message.

    Raises
    ------
    TypeError
    """
    for name in names:
        if not is_routed(name):
            raise TypeError(
                f"{owner} has no parameter {name!r}; further parameters start with one of "
                f"{', '.join(_PREFIXES)}."
            )


def encoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters routed to the encoder, by the names that it has for them."""
    prefix = "module__"
    return {name[len(prefix) :]: v for name, v in params.items() if name.startswith(prefix)}


def net_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters routed to the skorch net."""
    return {name: value for name, value in params.items() if name.startswith(_NET_PREFIXES)}


def check_parameters(params: Mapping[str, Any], constraints: Mapping[str, list[Any] | str]) -> None:
    """Raise for parameters that are wrong whatever the data.

    Parameters
    ----------
    params : mapping of name to value
        Parameters of a `SemiCRFSegmenter`, which meet the constraints.
    constraints : mapping of name to scikit-learn's constraints

    Raises
    ------
    ValueError
        For a number that is a bool, numbers that overflow, or entries of `callbacks` that are none.
    """
    for name, allowed in constraints.items():
        value = params[name]
        if isinstance(value, bool) and any(isinstance(c, Interval) for c in allowed):
            raise ValueError(f"`{name}` must be a number, not a bool; got {value}.")
    dtype, tail, class_weight = params["dtype"], params["duration_tail"], params["class_weight"]
    check_largest("alpha", params["alpha"], dtype)
    if isinstance(tail, Real) and float(tail) > -math.inf:
        check_largest("duration_tail", float(tail), dtype)
    if isinstance(class_weight, dict):
        for label, weight in class_weight.items():
            if isinstance(weight, Real):
                check_largest("class_weight", float(weight), dtype, f" for label {label!r}")
    _check_callbacks(params["callbacks"] or [])


def _check_callbacks(callbacks: Iterable[Any]) -> None:
    for i, entry in enumerate(callbacks):
        named = isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)
        callback = entry[1] if named else entry
        is_class = isinstance(callback, type) and issubclass(callback, Callback)
        if not (callback is None or is_class or isinstance(callback, Callback)):
            raise ValueError(
                "`callbacks` must hold skorch callbacks, or pairs of a name and a callback; got "
                f"{entry!r} at index {i}."
            )


def check_solver(params: Mapping[str, Any]) -> None:
    """Raise for parameters that do not go with `solver`.

    Parameters
    ----------
    params : mapping of name to value
        Parameters of a `SemiCRFSegmenter`, with those that are routed.

    Raises
    ------
    ValueError
    """
    solver, encoder = params["solver"], params["encoder"]
    if solver != "lbfgs":
        if params["l1_ratio"] > 0:
            raise ValueError(
                f'`l1_ratio` > 0 needs solver="lbfgs"; got {params["l1_ratio"]} with '
                f"solver={solver!r}."
            )
        return
    if params["loss"] != "likelihood":
        raise ValueError(
            f'`loss` needs a solver of mini-batches; got {params["loss"]!r} with solver="lbfgs", '
            'which minimises loss="likelihood".'
        )
    if not isinstance(encoder, str) or encoder != "linear":
        raise ValueError(f'solver="lbfgs" needs encoder="linear"; got {encoder!r}.')
    for name in ("callbacks", "optimizer", "crop_length", *net_params(params)):
        if params[name] not in (None, False, [], ()):
            raise ValueError(
                f"`{name}` needs a solver of mini-batches; got {params[name]!r} with "
                'solver="lbfgs".'
            )


def check_largest(name: str, value: float, dtype: str, where: str = "") -> None:
    """Raise for a factor of the loss whose square overflows, as squares of gradients then do."""
    largest = math.sqrt(torch.finfo(getattr(torch, dtype)).max)
    if abs(value) > largest:
        raise ValueError(
            f"`{name}` must be at most {largest:.1e} in size, or gradients overflow in {dtype}; "
            f"got {value:g}{where}."
        )

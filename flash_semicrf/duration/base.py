"""Base classes of duration distributions: (K, C) output, values per label and their checks.

Row ``k - 1`` of the output belongs to duration ``k``, for k = 1..K. Parametric families are
computed as unnormalised log-weights in float64 and normalised over 1..K by a log-softmax, so that
no probability is lost by the truncation at K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from flash_semicrf.problem.potentials import accumulator_dtype
from flash_semicrf.problem.validation import check_finite_or_forbidden, check_positive_int

Numbers: TypeAlias = ArrayLike | Tensor
Value = TypeVar("Value")


class DurationDistribution(nn.Module):
    """Base class: a module that returns the score of every duration for every label.

    A subclass implements ``forward() -> Tensor of shape (K, C)``, row k-1 being duration k, and
    optionally `from_segments`.

    Parameters
    ----------
    max_duration : int
        Longest duration K, in positions.
    num_classes : int
        Number of labels C.

    Examples
    --------
    >>> import torch
    >>> from flash_semicrf.duration import DurationDistribution
    >>> class AtLeastTwo(DurationDistribution):
    ...     def forward(self):
    ...         scores = torch.zeros(self.max_duration, self.num_classes)
    ...         scores[0] = -torch.inf
    ...         return scores
    >>> AtLeastTwo(3, 2)()[:, 0]
    tensor([-inf, 0., 0.])
    """

    def __init__(self, max_duration: int, num_classes: int) -> None:
        super().__init__()
        self.max_duration = check_positive_int("max_duration", max_duration)
        self.num_classes = check_positive_int("num_classes", num_classes)

    def forward(self) -> Tensor:
        """Scores of the durations, a Tensor of shape (K, C)."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward().")

    def tail_log_rate(self) -> Tensor | None:
        """Log-rate (C,) of the scores beyond K, or None if the distribution defines none."""
        return None

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> DurationDistribution:
        """Build the distribution with initial values fitted to observed segments.

        Parameters
        ----------
        durations, labels : integer array-like of shape (N,)
            Duration in 1..K and label in 0..C-1 of every observed segment.
        max_duration, num_classes : int
            K and C.
        **kwargs
            Further arguments of the class, such as ``learnable``.

        Returns
        -------
        DurationDistribution
            Labels never observed get the values fitted to all segments together.

        Raises
        ------
        ValueError
            If an array is empty, or a duration or label is out of range.
        TypeError
            If the distribution cannot be fitted, or an array does not hold integers.
        """
        raise TypeError(f"{cls.__name__} cannot be fitted to segments.")

    def extra_repr(self) -> str:
        return f"max_duration={self.max_duration}, num_classes={self.num_classes}"


class NormalizedDuration(DurationDistribution):
    """Base of the parametric families: log-probabilities normalised over 1..K for each label.

    Parameters
    ----------
    max_duration, num_classes : int
        K and C.
    learnable : bool, default=True
        Whether the values are parameters (True) or buffers, which are not trained (False).
    learn_rate : bool, optional
        Other name of `learnable`, as in release 0.2.0.

    Attributes
    ----------
    names : tuple of str
        Attributes that hold the values, each of shape (C,), as they are after pruning and
        parametrizations.
    """

    names: tuple[str, ...]

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        *,
        learnable: bool = True,
        learn_rate: bool | None = None,
    ) -> None:
        super().__init__(max_duration, num_classes)
        self.learnable = bool(learnable if learn_rate is None else learn_rate)

    def forward(self) -> Tensor:
        """Log-probabilities of shape (K, C), whose log-sum-exp over durations is 0."""
        values = [getattr(self, name) for name in self.names]
        wide = [value.to(accumulator_dtype(value.device)) for value in values]
        return torch.log_softmax(self._log_weights(*wide), dim=0).to(values[0].dtype)

    _log_weights: Callable[..., Tensor]
    """Log-probabilities (K, C), up to a constant for each label, of the values in `names`."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learnable={self.learnable}"


def one_of(name: str, value: Value | None, other: str, alias: Value | None) -> Value | None:
    """Value of an argument that has two names; TypeError if both are given."""
    if value is not None and alias is not None:
        raise TypeError(f"`{name}` and `{other}` are one argument; got both.")
    return alias if value is None else value


def add_values(module: nn.Module, name: str, values: Tensor, learnable: bool) -> None:
    """Register ``values`` as a parameter or as a buffer of ``module``."""
    if learnable:
        module.register_parameter(name, nn.Parameter(values))
    else:
        module.register_buffer(name, values)


def add_dtype_and_device(module: nn.Module) -> None:
    """Add a buffer ``like`` whose dtype and device follow the module, to a module without values.

    The buffer is empty: there is nothing to save, and nothing is lost if a loader creates the
    module on the meta device and allocates its buffers later.
    """
    device = torch.get_default_device()
    if device.type == "meta":
        device = torch.device("cpu")
    module.register_buffer("like", torch.empty(0, device=device), persistent=False)


def given_numbers(value: Numbers, name: str) -> Tensor:
    """Numbers given by a user as a tensor with data, whatever the default device."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiuO":
            raise TypeError
        return torch.from_numpy(np.array(array, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` must be a number or an array of numbers; got {value!r}."
        ) from None


def per_label(value: Numbers, name: str, num_classes: int, *, forbidden: bool = False) -> Tensor:
    """New (C,) tensor from one number for all labels or one number per label.

    Parameters
    ----------
    value : float or array-like of shape (C,)
    name : str
        Of the argument, for messages.
    num_classes : int
        C.
    forbidden : bool, default=False
        Accept -inf, which forbids.

    Returns
    -------
    Tensor of shape (C,)
        In the default dtype, on the default device.

    Raises
    ------
    TypeError
        If `value` does not hold numbers.
    ValueError
        If the shape is wrong, or a number is not finite (but for -inf with `forbidden`).
    """
    values = given_numbers(value, name).to(torch.get_default_dtype())
    if values.ndim == 0:
        values = values.expand(num_classes)
    if tuple(values.shape) != (num_classes,):
        raise ValueError(
            f"`{name}` must be a number or have shape (C={num_classes},); "
            f"got shape {tuple(values.shape)}."
        )
    if forbidden:
        check_finite_or_forbidden(name, values)
    elif not values.is_meta and not bool(torch.isfinite(values).all()):
        index = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(f"`{name}` must be finite; got {values[index].item()} at index {index}.")
    return values.to(torch.get_default_device(), copy=True)

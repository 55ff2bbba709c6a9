"""Duration distributions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from torch import Tensor

from .base import DurationDistribution
from .free import CallableDuration, LearnedDuration
from .parametric import (
    GeometricDuration,
    NegativeBinomialDuration,
    PoissonDuration,
    UniformDuration,
)

DURATION_DISTRIBUTIONS: dict[str, type[DurationDistribution]] = {
    "learned": LearnedDuration,
    "geometric": GeometricDuration,
    "negative_binomial": NegativeBinomialDuration,
    "poisson": PoissonDuration,
    "uniform": UniformDuration,
    "callable": CallableDuration,
}


def create_duration_distribution(
    distribution: str | DurationDistribution | Callable[[Tensor], Tensor] | None,
    max_duration: int,
    num_classes: int,
    **kwargs: Any,
) -> DurationDistribution:
    """Duration distribution from its name, a function, a class or an instance.

    Parameters
    ----------
    distribution : str, DurationDistribution, callable or None
        A key of `DURATION_DISTRIBUTIONS`; an instance, which is checked and returned; a function
        of the durations, for `CallableDuration`; None means "learned".
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    **kwargs
        Further arguments of the class, such as ``init_logit`` or ``learnable``.

    Returns
    -------
    DurationDistribution
        A module whose call returns a Tensor of shape (K, C).

    Raises
    ------
    ValueError
        If the name is unknown, or the K or C of an instance differs.
    TypeError
        If ``distribution`` has another type, or a further argument is unknown to the class.

    Examples
    --------
    >>> from flash_semicrf.duration import create_duration_distribution
    >>> create_duration_distribution("geometric", max_duration=100, num_classes=24, init_logit=-1.0)
    GeometricDuration(max_duration=100, num_classes=24, learnable=True)
    """
    if distribution is None:
        distribution = "learned"
    if isinstance(distribution, DurationDistribution):
        return _check_instance(distribution, max_duration, num_classes, kwargs)
    if isinstance(distribution, str):
        if distribution not in DURATION_DISTRIBUTIONS:
            names = ", ".join(repr(name) for name in DURATION_DISTRIBUTIONS)
            raise ValueError(
                f"`distribution` must be one of {names}, or a DurationDistribution; "
                f"got {distribution!r}."
            )
        return DURATION_DISTRIBUTIONS[distribution](max_duration, num_classes, **kwargs)
    if _is_distribution_class(distribution):
        return distribution(max_duration, num_classes, **kwargs)
    if callable(distribution):
        return CallableDuration(max_duration, num_classes, distribution, **kwargs)
    raise TypeError(
        "`distribution` must be a name, a DurationDistribution or a callable; "
        f"got {type(distribution).__name__}."
    )


def _is_distribution_class(value: object) -> TypeGuard[type[DurationDistribution]]:
    return isinstance(value, type) and issubclass(value, DurationDistribution)


def _check_instance(
    instance: DurationDistribution, max_duration: int, num_classes: int, kwargs: dict[str, Any]
) -> DurationDistribution:
    if kwargs:
        raise TypeError(
            f"a {type(instance).__name__} instance takes no further arguments; "
            f"got {', '.join(sorted(kwargs))}."
        )
    got = (instance.max_duration, instance.num_classes)
    if got != (max_duration, num_classes):
        raise ValueError(
            f"`distribution` must have max_duration={max_duration} and num_classes={num_classes}; "
            f"got max_duration={got[0]} and num_classes={got[1]}."
        )
    return instance

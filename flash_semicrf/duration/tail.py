"""Durations beyond K: a log-rate per label that continues the scores from that of K.

    score of k > K  =  duration_bias[K-1, c] + (k - K) * log_rate[c]

The durations above K are then geometric, given that a segment is longer than K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flash_semicrf.problem.validation import check_positive_int

from .base import DurationDistribution, Numbers, add_values, per_label
from .fitting import tail_counts

__all__ = ["GeometricTail", "create_duration_tail"]

_STEEPEST = -5.0


class GeometricTail(nn.Module):
    """Log-rate of the durations beyond K.

    Parameters
    ----------
    num_classes : int
        Number of labels C.
    log_rate : float or array-like of shape (C,), default=-1.0
        Added to the score for each position beyond the K-th; -inf for a label whose segments last
        at most K positions.
    learnable : bool, default=True
        Whether ``log_rate`` is a parameter (True) or a buffer (False).

    Examples
    --------
    >>> from flash_semicrf.duration import GeometricTail
    >>> GeometricTail(2, [-0.5, -float("inf")], learnable=False)()
    tensor([-0.5000,    -inf])
    """

    log_rate: Tensor

    def __init__(
        self,
        num_classes: int,
        log_rate: Numbers = -1.0,
        *,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.learnable = bool(learnable)
        values = per_label(log_rate, "log_rate", num_classes, forbidden=True)
        add_values(self, "log_rate", values, learnable)

    def forward(self) -> Tensor:
        """Log-rates, a Tensor of shape (C,)."""
        return self.log_rate

    @classmethod
    def from_scores(cls, duration_bias: Tensor, **kwargs: Any) -> GeometricTail:
        """Tail with the slope of the last two scores (K, C), within -5 to -1/K a position."""
        max_duration, num_classes = duration_bias.shape
        slowest = torch.full((num_classes,), -1.0 / max_duration, dtype=torch.float64, device="cpu")
        rate = slowest
        if max_duration > 1 and not duration_bias.is_meta:
            last = duration_bias.detach().double().cpu()
            step = last[-1] - last[-2]
            rate = torch.where(torch.isfinite(step), step, slowest)
        return cls(num_classes, rate.clamp(_STEEPEST).minimum(slowest), **kwargs)

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> GeometricTail:
        """Tail with the most probable rate, given the observed segments of at least K positions.

        Parameters
        ----------
        durations, labels : integer array-like of shape (N,)
            Duration, >= 1, and label of every observed segment.
        max_duration, num_classes : int
            K and C.
        **kwargs
            Further arguments of the class.

        Returns
        -------
        GeometricTail
            A pseudo-observation per label, one end against K continuations, keeps the rates
            finite.

        Raises
        ------
        TypeError, ValueError
            If an array does not hold integers, or a label is out of range.
        """
        segments, beyond = tail_counts(durations, labels, max_duration, num_classes)
        went_on = beyond + max_duration
        rate = np.log(went_on / (went_on + segments + 1))
        return cls(num_classes, torch.from_numpy(rate), **kwargs)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, learnable={self.learnable}"


def create_duration_tail(
    tail: str | Numbers | GeometricTail | None,
    distribution: DurationDistribution,
) -> GeometricTail | None:
    """Tail that continues a duration distribution beyond K, if any.

    Parameters
    ----------
    tail : None, "geometric", float, array-like of shape (C,) or GeometricTail
        No tail; a learnable rate initialised by the last two scores; fixed rates; a module.
    distribution : DurationDistribution

    Returns
    -------
    GeometricTail or None
        Also None for "geometric" if the distribution has a rate of its own: see
        `DurationDistribution.tail_log_rate`.

    Raises
    ------
    ValueError
        For another string, the wrong number of labels, or a rate that is NaN or inf.
    """
    if tail is None:
        return None
    if isinstance(tail, GeometricTail):
        if tail.num_classes != distribution.num_classes:
            raise ValueError(
                f"`duration_tail` must have num_classes={distribution.num_classes}; "
                f"got {tail.num_classes}."
            )
        return tail
    if isinstance(tail, str):
        if tail != "geometric":
            raise ValueError(f'`duration_tail` must be None, "geometric" or rates; got {tail!r}.')
        if distribution.tail_log_rate() is not None:
            return None
        return GeometricTail.from_scores(distribution())
    rates = per_label(tail, "duration_tail", distribution.num_classes, forbidden=True)
    return GeometricTail(distribution.num_classes, rates, learnable=False)

"""Duration scores without a parametric form: a free table or a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flash_semicrf.problem.validation import check_finite_or_forbidden, check_number

from .base import (
    DurationDistribution,
    Numbers,
    add_dtype_and_device,
    add_values,
    given_numbers,
    one_of,
)
from .fitting import duration_counts, smooth_log_histogram


class LearnedDuration(DurationDistribution):
    """One free score for every duration and label; not normalised.

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    init_scale : float, default=0.1
        Standard deviation of the normal draws that initialise the scores; 0 initialises zeros.
    init_bias : array-like of shape (K, C), optional
        Initial scores, instead of draws.
    learnable : bool, default=True
        Whether ``duration_bias`` is a parameter (True) or a buffer (False).

    Examples
    --------
    >>> from flash_semicrf.duration import LearnedDuration
    >>> LearnedDuration(5, 2)().shape
    torch.Size([5, 2])
    """

    duration_bias: Tensor

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        init_scale: float = 0.1,
        init_bias: Numbers | None = None,
        *,
        learnable: bool = True,
    ) -> None:
        super().__init__(max_duration, num_classes)
        init_scale = check_number("init_scale", init_scale, zero=True)
        self.learnable = bool(learnable)
        shape = (self.max_duration, self.num_classes)
        if init_bias is None:
            values = torch.randn(shape) * init_scale
        else:
            values = _check_table(given_numbers(init_bias, "init_bias"), "init_bias", shape)
            check_finite_or_forbidden("init_bias", values)
            values = values.to(torch.get_default_device(), torch.get_default_dtype(), copy=True)
        add_values(self, "duration_bias", values, learnable)

    def forward(self) -> Tensor:
        """Scores, a Tensor of shape (K, C)."""
        return self.duration_bias

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        *,
        pseudo_count: float = 1.0,
        bandwidth: float | None = None,
        **kwargs: Any,
    ) -> LearnedDuration:
        """Distribution initialised by the log of the smoothed histogram of durations per label.

        Parameters
        ----------
        durations, labels : integer array-like of shape (N,)
            Duration in 1..K and label in 0..C-1 of every observed segment.
        max_duration, num_classes : int
            K and C.
        pseudo_count : float, default=1.0
            Number of pseudo-observations per label, spread evenly over 1..K; > 0.
        bandwidth : float, optional
            Standard deviation of the Gaussian smoothing in positions, >= 0; by default Silverman's
            rule for each label.
        **kwargs
            Further arguments of the class.

        Returns
        -------
        LearnedDuration

        Raises
        ------
        TypeError, ValueError
            As for `DurationDistribution.from_segments`, and if `pseudo_count` or `bandwidth` is
            out of range.

        References
        ----------
        B. W. Silverman, Density Estimation for Statistics and Data Analysis, 1986, section 3.4.2.
        """
        check_number("pseudo_count", pseudo_count)
        if bandwidth is not None:
            check_number("bandwidth", bandwidth, zero=True)
        counts = duration_counts(durations, labels, max_duration, num_classes)
        table = torch.from_numpy(smooth_log_histogram(counts, pseudo_count, bandwidth))
        return cls(max_duration, num_classes, init_bias=table, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learnable={self.learnable}"


class CallableDuration(DurationDistribution):
    """Scores computed by a function of the durations.

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    function : callable
        Takes the durations 1..K as a float Tensor of shape (K,) and returns a floating Tensor of
        shape (K, C). An nn.Module is registered, so its parameters are trained and saved.
    func : callable
        Other name of `function`, as in release 0.2.0.

    Examples
    --------
    >>> import torch
    >>> from flash_semicrf.duration import CallableDuration
    >>> slopes = torch.tensor([0.0, -1.0])
    >>> CallableDuration(3, 2, lambda durations: durations[:, None] * slopes)()
    tensor([[ 0., -1.],
            [ 0., -2.],
            [ 0., -3.]])
    """

    like: Tensor

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        function: Callable[[Tensor], Tensor] | None = None,
        *,
        func: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(max_duration, num_classes)
        function = one_of("function", function, "func", func)
        if not callable(function):
            raise TypeError(f"`function` must be callable; got {type(function).__name__}.")
        self.function = function
        add_dtype_and_device(self)

    def forward(self) -> Tensor:
        """Scores computed by the function, a Tensor of shape (K, C).

        Raises
        ------
        TypeError, ValueError
            If the function returns something else."""
        dtype, device = self.like.dtype, self.like.device
        scores = self.function(torch.arange(1, self.max_duration + 1, dtype=dtype, device=device))
        return _check_table(scores, "function", (self.max_duration, self.num_classes))

    def extra_repr(self) -> str:
        if isinstance(self.function, nn.Module):
            return super().extra_repr()
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{super().extra_repr()}, function={name}"


def _check_table(table: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    verb = "return" if name == "function" else "be"
    wanted = f"a floating tensor of shape (K={shape[0]}, C={shape[1]})"
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = f"dtype {table.dtype}" if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"`{name}` must {verb} {wanted}; got {got}.")
    if tuple(table.shape) != shape:
        raise ValueError(f"`{name}` must {verb} {wanted}; got shape {tuple(table.shape)}.")
    return table

"""Parametric duration distributions: geometric, negative binomial, Poisson, uniform.

Each gives log-probabilities on 1..K, truncated there and normalised. Cost O(KC).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import gammaln
from torch import Tensor

from .base import NormalizedDuration, Numbers, add_dtype_and_device, add_values, per_label
from .fitting import duration_counts, moments, tilt_to_mean

# Fitted values stay inside these bounds: at them a distribution is, to working precision, its own
# limit (all mass on one duration, or a uniform one), and beyond them gradients would vanish.
_LOGIT_BOUND = 10.0
_LOG_R_BOUND = 7.0
_LOG_LAMBDA_BOUND = 20.0


class GeometricDuration(NormalizedDuration):
    """Geometric durations, P(k) proportional to p (1-p)^(k-1) with p = sigmoid(logit).

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    init_logit : float or array-like of shape (C,), default=-1.0
        Initial logit of the probability p that a segment ends after any position.
    learnable : bool, default=True
        Whether ``logit`` is a parameter (True) or a buffer (False).
    learn_rate : bool, optional
        Other name of `learnable`, as in release 0.2.0.

    Examples
    --------
    >>> from flash_semicrf.duration import GeometricDuration
    >>> GeometricDuration(3, 1, init_logit=0.0)().exp().squeeze(1).detach()
    tensor([0.5714, 0.2857, 0.1429])
    """

    names = ("logit",)
    logit: Tensor

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        init_logit: Numbers = -1.0,
        *,
        learnable: bool = True,
        learn_rate: bool | None = None,
    ) -> None:
        super().__init__(max_duration, num_classes, learnable=learnable, learn_rate=learn_rate)
        add_values(self, "logit", per_label(init_logit, "init_logit", num_classes), self.learnable)

    def _log_weights(self, logit: Tensor) -> Tensor:
        failures = torch.arange(self.max_duration, device=logit.device, dtype=logit.dtype)
        return failures[:, None] * F.logsigmoid(-logit)

    def tail_log_rate(self) -> Tensor:
        """Tensor log(1-p) of shape (C,), with which durations are geometric without truncation."""
        return F.logsigmoid(-self.logit)

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> GeometricDuration:
        """Distribution with the maximum-likelihood p of each label, truncation at K included.

        Parameters and errors are those of `DurationDistribution.from_segments`."""
        counts = duration_counts(durations, labels, max_duration, num_classes)
        mean, _ = moments(counts)
        log_failure = tilt_to_mean(np.zeros(max_duration), mean, -_LOGIT_BOUND, -1e-9)
        logit = np.log(np.expm1(-log_failure))
        logit = np.clip(logit, -_LOGIT_BOUND, _LOGIT_BOUND)
        return cls(max_duration, num_classes, init_logit=torch.from_numpy(logit), **kwargs)


class NegativeBinomialDuration(NormalizedDuration):
    """Negative binomial durations: k - 1 failures before the r-th success of probability p.

    P(k) is proportional to Gamma(k-1+r) / (Gamma(r) (k-1)!) (1-p)^(k-1), with r = exp(log_r) > 0
    real and p = sigmoid(logit). r = 1 is geometric, r > 1 has a mode away from 1 and r -> 0
    concentrates on k = 1, the rest of the mass following (1-p)^(k-1) / (k-1).

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    init_log_r, init_logit : float or array-like of shape (C,), default=0.0 and -1.0
        Initial log r and logit of p.
    learnable : bool, default=True
        Whether ``log_r`` and ``logit`` are parameters (True) or buffers (False).
    learn_rate : bool, optional
        Other name of `learnable`, as in release 0.2.0.

    Notes
    -----
    The logarithm of the ratio of gamma functions is summed from those of its factors
    (r+i) / (i+1), each computed from log r and not from r, so that values and gradients are finite
    for every log r.

    Examples
    --------
    >>> from flash_semicrf.duration import NegativeBinomialDuration
    >>> dist = NegativeBinomialDuration(4, 1, init_log_r=0.6931472, init_logit=0.0)
    >>> dist().exp().squeeze(1).detach()
    tensor([0.3077, 0.3077, 0.2308, 0.1538])
    """

    names = ("log_r", "logit")
    log_r: Tensor
    logit: Tensor

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        init_log_r: Numbers = 0.0,
        init_logit: Numbers = -1.0,
        *,
        learnable: bool = True,
        learn_rate: bool | None = None,
    ) -> None:
        super().__init__(max_duration, num_classes, learnable=learnable, learn_rate=learn_rate)
        add_values(self, "log_r", per_label(init_log_r, "init_log_r", num_classes), self.learnable)
        add_values(self, "logit", per_label(init_logit, "init_logit", num_classes), self.learnable)

    def _log_weights(self, log_r: Tensor, logit: Tensor) -> Tensor:
        steps = torch.arange(self.max_duration, device=logit.device, dtype=logit.dtype)
        i = steps[1:-1, None]
        # log((r+i)/(i+1)): its first term, i = 0, is log r itself.
        factors = torch.logaddexp(log_r - torch.log1p(i), torch.log(i / (i + 1)))
        factors = torch.cat([torch.zeros_like(log_r)[None], log_r[None], factors])
        log_coefficient = factors[: self.max_duration].cumsum(dim=0)
        return log_coefficient + steps[:, None] * F.logsigmoid(-logit)

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> NegativeBinomialDuration:
        """Distribution in which k - 1 has its observed mean and variance.

        If the variance does not exceed the mean there is no such r, and a large r approximates the
        limit, a Poisson distribution. Parameters and errors are those of
        `DurationDistribution.from_segments`.
        """
        counts = duration_counts(durations, labels, max_duration, num_classes)
        mean, variance = moments(counts)
        failures = np.maximum(mean - 1, math.exp(-_LOGIT_BOUND))
        excess = np.maximum(variance - failures, failures**2 * math.exp(-_LOG_R_BOUND))
        log_r = np.clip(np.log(failures**2 / excess), -_LOG_R_BOUND, _LOG_R_BOUND)
        logit = np.clip(log_r - np.log(failures), -_LOGIT_BOUND, _LOGIT_BOUND)
        return cls(
            max_duration,
            num_classes,
            init_log_r=torch.from_numpy(log_r),
            init_logit=torch.from_numpy(logit),
            **kwargs,
        )


class PoissonDuration(NormalizedDuration):
    """Poisson durations, P(k) proportional to lambda^k / k! on 1..K.

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.
    init_log_lambda : float or array-like of shape (C,), default=1.0
        Initial log lambda; lambda is near the mean duration when that is well inside 1..K.
    learnable : bool, default=True
        Whether ``log_lambda`` is a parameter (True) or a buffer (False).
    learn_rate : bool, optional
        Other name of `learnable`, as in release 0.2.0.

    Examples
    --------
    >>> from flash_semicrf.duration import PoissonDuration
    >>> PoissonDuration(3, 1, init_log_lambda=0.0)().exp().squeeze(1).detach()
    tensor([0.6000, 0.3000, 0.1000])
    """

    names = ("log_lambda",)
    log_lambda: Tensor

    def __init__(
        self,
        max_duration: int,
        num_classes: int,
        init_log_lambda: Numbers = 1.0,
        *,
        learnable: bool = True,
        learn_rate: bool | None = None,
    ) -> None:
        super().__init__(max_duration, num_classes, learnable=learnable, learn_rate=learn_rate)
        values = per_label(init_log_lambda, "init_log_lambda", num_classes)
        add_values(self, "log_lambda", values, self.learnable)

    def _log_weights(self, log_lambda: Tensor) -> Tensor:
        durations = torch.arange(
            1, self.max_duration + 1, device=log_lambda.device, dtype=log_lambda.dtype
        )[:, None]
        return durations * log_lambda - torch.lgamma(durations + 1)

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> PoissonDuration:
        """Distribution whose truncated mean is the observed mean duration.

        Parameters and errors are those of `DurationDistribution.from_segments`."""
        counts = duration_counts(durations, labels, max_duration, num_classes)
        mean, _ = moments(counts)
        log_base = -gammaln(np.arange(2, max_duration + 2))
        log_lambda = tilt_to_mean(log_base, mean, -_LOGIT_BOUND, _LOG_LAMBDA_BOUND)
        init_log_lambda = torch.from_numpy(log_lambda)
        return cls(max_duration, num_classes, init_log_lambda=init_log_lambda, **kwargs)


class UniformDuration(NormalizedDuration):
    """Uniform durations: each has the log-probability -log K. There is nothing to learn.

    Parameters
    ----------
    max_duration, num_classes : int
        Longest duration K and number of labels C.

    Examples
    --------
    >>> from flash_semicrf.duration import UniformDuration
    >>> UniformDuration(4, 2)()[0]
    tensor([-1.3863, -1.3863])
    """

    names = ("like",)

    def __init__(self, max_duration: int, num_classes: int) -> None:
        super().__init__(max_duration, num_classes, learnable=False)
        add_dtype_and_device(self)

    def _log_weights(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.max_duration, self.num_classes)

    @classmethod
    def from_segments(
        cls,
        durations: Numbers,
        labels: Numbers,
        max_duration: int,
        num_classes: int,
        **kwargs: Any,
    ) -> UniformDuration:
        """Check the segments and return the distribution; there is nothing to fit.

        Parameters and errors are those of `DurationDistribution.from_segments`."""
        duration_counts(durations, labels, max_duration, num_classes)
        return cls(max_duration, num_classes, **kwargs)

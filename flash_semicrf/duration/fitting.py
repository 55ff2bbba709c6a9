"""Initial values of duration distributions from observed segments.

Every fit starts from one table: the counts of durations per label. A label that was never observed
takes the pooled counts of all labels. Float64 throughout.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from flash_semicrf.problem.validation import check_positive_int

from .base import Numbers

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


def tail_counts(
    durations: Numbers, labels: Numbers, max_duration: int, num_classes: int
) -> tuple[Integers, NDArray[np.number]]:
    """Numbers of segments of at least K positions, and of their positions beyond K, per label.

    Parameters
    ----------
    durations, labels : integer array-like of shape (N,)
        Duration, >= 1, and label of every segment.
    max_duration, num_classes : int
        K and C.

    Returns
    -------
    segments, beyond : ndarray of shape (C,)
    """
    duration, label = _integers(durations, "durations"), _integers(labels, "labels")
    _check_range(label, "labels", 0, num_classes - 1, f"[0, C-1={num_classes - 1}]")
    long = duration >= max_duration
    segments = np.bincount(label[long], minlength=num_classes)
    beyond = np.bincount(label[long], duration[long] - max_duration, minlength=num_classes)
    return segments, beyond


def duration_counts(
    durations: Numbers, labels: Numbers, max_duration: int, num_classes: int
) -> Floats:
    """Counts of observed durations per label.

    Parameters
    ----------
    durations, labels : integer array-like of shape (N,)
        Duration in 1..K and label in 0..C-1 of every segment.
    max_duration, num_classes : int
        K and C.

    Returns
    -------
    ndarray of shape (K, C)
        Counts; row k-1 is duration k. Unobserved labels hold the pooled counts.

    Raises
    ------
    ValueError
        If an array is empty, is not 1-D, or has a value out of range.
    TypeError
        If an array does not hold integers.
    """
    max_duration = check_positive_int("max_duration", max_duration)
    num_classes = check_positive_int("num_classes", num_classes)
    duration = _integers(durations, "durations")
    label = _integers(labels, "labels")
    if len(duration) != len(label):
        raise ValueError(
            "`durations` and `labels` must have one entry per segment; "
            f"got {len(duration)} and {len(label)} entries."
        )
    if len(duration) == 0:
        raise ValueError("`durations` must hold at least one segment; got 0.")
    _check_range(duration, "durations", 1, max_duration, f"[1, K={max_duration}]")
    _check_range(label, "labels", 0, num_classes - 1, f"[0, C-1={num_classes - 1}]")
    counts = np.zeros((max_duration, num_classes))
    np.add.at(counts, (duration - 1, label), 1.0)
    unseen = counts.sum(axis=0) == 0
    counts[:, unseen] = counts.sum(axis=1, keepdims=True)
    return counts


def moments(counts: Floats) -> tuple[Floats, Floats]:
    """Mean and variance of the durations, in positions; two arrays of shape (C,)."""
    durations = np.arange(1, len(counts) + 1)[:, None]
    total = counts.sum(axis=0)
    mean = (counts * durations).sum(axis=0) / total
    variance = (counts * (durations - mean) ** 2).sum(axis=0) / np.maximum(total - 1, 1)
    return mean, variance


def tilt_to_mean(
    log_base: Floats, mean: Floats, low: float, high: float, steps: int = 80
) -> Floats:
    """Solve for the tilt theta at which weights exp(log_base_k + k theta) have a given mean.

    The mean grows with theta, so bisection cannot fail; in an exponential family truncated to 1..K
    the solution is the maximum-likelihood estimate.

    Parameters
    ----------
    log_base : ndarray of shape (K,)
    mean : ndarray of shape (C,)
        Wanted means, in 1..K.
    low, high : float
        Bounds of theta. A mean outside what they reach gives the nearer bound.
    steps : int, default=80
        Halvings of the interval.

    Returns
    -------
    ndarray of shape (C,)
    """
    durations = np.arange(1, len(log_base) + 1)[:, None]
    lower = np.full(len(mean), low)
    upper = np.full(len(mean), high)
    for _ in range(steps):
        middle = (lower + upper) / 2
        log_weights = log_base[:, None] + durations * middle
        weights = np.exp(log_weights - log_weights.max(axis=0))
        too_small = (weights * durations).sum(axis=0) / weights.sum(axis=0) < mean
        lower = np.where(too_small, middle, lower)
        upper = np.where(too_small, upper, middle)
    tilt: Floats = (lower + upper) / 2
    return tilt


def smooth_log_histogram(counts: Floats, pseudo_count: float, bandwidth: float | None) -> Floats:
    """Log-probabilities of durations from a Gaussian-smoothed histogram.

    Parameters
    ----------
    counts : ndarray of shape (K, C)
    pseudo_count : float
        Number of pseudo-observations per label, spread evenly over 1..K.
    bandwidth : float or None
        Standard deviation of the kernel in positions; None: by Silverman's rule for each label.

    Returns
    -------
    ndarray of shape (K, C)
        Normalised over durations.

    References
    ----------
    B. W. Silverman, Density Estimation for Statistics and Data Analysis, 1986, section 3.4.2.
    """
    max_duration = len(counts)
    smooth = np.empty_like(counts)
    for label, column in enumerate(counts.T):
        width = _silverman_bandwidth(column) if bandwidth is None else bandwidth
        smooth[:, label] = _smooth(column, width)
    smooth += pseudo_count / max_duration
    log_share: Floats = np.log(smooth) - np.log(smooth.sum(axis=0))
    return log_share


def _silverman_bandwidth(column: Floats) -> float:
    total = float(column.sum())
    _, variance = moments(column[:, None])
    cumulative = np.cumsum(column)
    lower, upper = np.searchsorted(cumulative, [0.25 * total, 0.75 * total])
    spread = min(float(np.sqrt(variance[0])), (upper - lower) / 1.34)
    return float(0.9 * spread * total**-0.2)


def _smooth(column: Floats, width: float) -> Floats:
    reach = min(int(np.ceil(4 * width)), len(column) - 1)
    if reach == 0:
        return column.copy()
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # Weight that would spread outside 1..K is put back inside.
    inside = np.convolve(np.ones_like(column), kernel)[reach:-reach]
    return np.convolve(column / inside, kernel)[reach:-reach]


def _integers(values: Numbers, name: str) -> Integers:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have shape (N,); got shape {array.shape}.")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must hold integers; got dtype {array.dtype}.")
    return array.astype(np.int64)


def _check_range(values: Integers, name: str, low: int, high: int, text: str) -> None:
    wrong = np.flatnonzero((values < low) | (values > high))
    if len(wrong):
        raise ValueError(f"`{name}` must be in {text}; got {values[wrong[0]]} at index {wrong[0]}.")

"""Sequences drawn from a semi-Markov process.

A sequence is drawn segment by segment: a label that differs from the last one, a duration from the
distribution of that label, then one feature vector per position from its normal distribution. Cost
O(n_sequences * n_positions * n_features).
"""

from __future__ import annotations

from numbers import Integral, Real

import numpy as np
from sklearn.utils import check_random_state

from sklearn_api._inputs.sequences import object_array


def make_segmentations(
    n_sequences: int = 20,
    n_positions: int | tuple[int, int] = 200,
    *,
    n_labels: int = 3,
    n_features: int = 2,
    max_duration: int = 40,
    class_sep: float = 2.0,
    noise: float = 1.0,
    random_state: int | np.random.RandomState | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw labelled sequences from a semi-Markov process with Gaussian features.

    Labels differ in the centre of their features and in their durations, whose distributions are
    discretised normal distributions on 1..`max_duration`, with means between an eighth and a half
    of `max_duration`. The last segment of a sequence is cut at its end.

    Parameters
    ----------
    n_sequences : int
        Number of sequences.
    n_positions : int or (int, int)
        Length of every sequence, or the smallest and the largest length, drawn uniformly.
    n_labels : int
        Number of labels, 0..n_labels-1. Adjacent segments differ in label unless there is only
        one.
    n_features : int
        Number of columns of every sequence.
    max_duration : int
        Longest segment, in positions.
    class_sep : float
        Standard deviation of the centres of the labels; larger values make the task easier.
    noise : float
        Standard deviation of features about their centre; larger values make the task harder.
    random_state : int, RandomState or None
        Seed; an int gives the same sequences in every call.

    Returns
    -------
    X : object array of shape (n_sequences,)
        Element i is a float32 array of shape (T_i, n_features).
    y : object array of shape (n_sequences,)
        Element i is an int64 array of shape (T_i,).

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Examples
    --------
    >>> from sklearn_api.datasets import make_segmentations
    >>> X, y = make_segmentations(3, (50, 80), random_state=0)
    >>> X.shape, X[0].shape[1], len(X[0]) == len(y[0])
    ((3,), 2, True)
    """
    for name, number in [
        ("n_sequences", n_sequences),
        ("n_labels", n_labels),
        ("n_features", n_features),
        ("max_duration", max_duration),
    ]:
        _check_count(name, number)
    for name, scale in [("class_sep", class_sep), ("noise", noise)]:
        if not isinstance(scale, Real) or not 0 <= scale < np.inf:
            raise ValueError(f"`{name}` must be a finite number >= 0; got {scale!r}.")
    shortest, longest = _check_positions(n_positions)

    rng = check_random_state(random_state)
    centres = rng.normal(scale=class_sep, size=(n_labels, n_features))
    durations = _duration_probabilities(n_labels, max_duration)
    lengths = rng.randint(shortest, longest + 1, size=n_sequences)
    y = object_array([_draw_labels(rng, int(length), durations) for length in lengths])
    X = object_array(
        [
            (centres[labels] + rng.normal(scale=noise, size=(len(labels), n_features))).astype(
                np.float32
            )
            for labels in y
        ]
    )
    return X, y


def _check_count(name: str, number: object) -> None:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise ValueError(f"`{name}` must be an integer >= 1; got {number!r}.")


def _check_positions(n_positions: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(n_positions, tuple | list):
        _check_count("n_positions", n_positions)
        return n_positions, n_positions
    if len(n_positions) != 2:
        raise ValueError(
            f"`n_positions` must be an integer or a pair (smallest, largest); got {n_positions!r}."
        )
    for i, number in enumerate(n_positions):
        _check_count(f"n_positions[{i}]", number)
    shortest, longest = n_positions
    if shortest > longest:
        raise ValueError(
            "`n_positions` must be a pair (smallest, largest) in this order; got "
            f"({shortest}, {longest})."
        )
    return shortest, longest


def _duration_probabilities(n_labels: int, max_duration: int) -> np.ndarray:
    """Probability of durations 1..max_duration for every label, of shape (n_labels, K)."""
    means = np.maximum(1.0, max_duration * np.linspace(1 / 8, 1 / 2, n_labels))[:, None]
    durations = np.arange(1, max_duration + 1)
    weights = np.exp(-0.5 * ((durations - means) / (means / 4)) ** 2)
    probabilities: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def _draw_labels(rng: np.random.RandomState, length: int, durations: np.ndarray) -> np.ndarray:
    """Draw one label sequence of shape (length,)."""
    n_labels, max_duration = durations.shape
    labels = np.empty(length, dtype=np.int64)
    label, start = rng.randint(n_labels), 0
    while start < length:
        duration = 1 + rng.choice(max_duration, p=durations[label])
        labels[start : start + duration] = label
        start += duration
        if n_labels > 1:
            # A step of 1..n_labels-1 around the circle: any other label, equally likely.
            label = (label + 1 + rng.randint(n_labels - 1)) % n_labels
    return labels

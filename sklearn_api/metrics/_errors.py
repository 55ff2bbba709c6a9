"""Segment error rate, frame error rate and covering."""

from __future__ import annotations

from typing import Any

import numpy as np

from sklearn_api.metrics._inputs import Segmentation, check_ignore_label, read_pairs


def segment_error_rate(y_true: Any, y_pred: Any, *, ignore_label: Any = None) -> float:
    """Edit distance between the label sequences of segments, per true segment.

    The smallest number of segments to insert, delete or relabel that turns the predicted into the
    true sequence of labels; positions do not matter. It is known as the syllable error rate of bird
    song and the word error rate of speech. It may exceed 1. Cost O(N M) for N true and M predicted
    segments of a sequence.

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments, of one sequence or many (see the module).
    ignore_label : str, number or None
        Background that is removed from both label sequences before they are compared.

    Returns
    -------
    rate : float
        Edits in all sequences divided by true segments in all sequences. 0.0 is best.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit together or no true segment is left.

    References
    ----------
    V. I. Levenshtein: Binary codes capable of correcting deletions, insertions and reversals.
    Soviet Physics Doklady 10(8):707-710, 1966: the edit distance.

    Examples
    --------
    >>> from sklearn_api.metrics import segment_error_rate
    >>> segment_error_rate(list("aabbc"), list("abbbd"))
    0.3333333333333333
    """
    pairs = _read(y_true, y_pred, ignore_label)
    edits = n_true = 0
    for one, two in pairs:
        edits += _edit_distance(one.labels, two.labels)
        n_true += len(one.labels)
    if n_true == 0:
        raise ValueError(
            "`y_true` must hold at least one segment to divide by; got 0 "
            f"with ignore_label={ignore_label!r}."
        )
    return edits / n_true


def frame_error_rate(y_true: Any, y_pred: Any, *, ignore_label: Any = None) -> float:
    """Share of positions with a wrong label.

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments that leave no gap, of one sequence or many (see
        the module).
    ignore_label : str, number or None
        True label whose positions do not count.

    Returns
    -------
    rate : float
        Wrong positions in all sequences divided by positions in all sequences. 0.0 is best.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit together, segments leave gaps, or no position is left.

    Examples
    --------
    >>> from sklearn_api.metrics import frame_error_rate
    >>> frame_error_rate(list("aabbc"), list("abbbd"))
    0.4
    """
    pairs = read_pairs(y_true, y_pred)
    labels = sorted({label for pair in pairs for one in pair for label in one.labels})
    check_ignore_label(labels, ignore_label)
    index = {label: n for n, label in enumerate(labels)}
    ignored = index.get(ignore_label, -1)
    wrong = total = 0
    for i, (one, two) in enumerate(pairs):
        length = next((s.length for s in (one, two) if s.length is not None), None)
        if length is None:
            length = int(max(one.stops.max(initial=0), two.stops.max(initial=0)))
        true = _positions(one, index, length, "y_true", i)
        pred = _positions(two, index, length, "y_pred", i)
        counted = true != ignored
        wrong += int(((true != pred) & counted).sum())
        total += int(counted.sum())
    if total == 0:
        raise ValueError(
            "`y_true` must have at least one position to divide by; got 0 "
            f"with ignore_label={ignore_label!r}."
        )
    return wrong / total


def covering(y_true: Any, y_pred: Any, *, ignore_label: Any = None) -> float:
    """Covering of the true segments by predicted ones, regardless of labels.

    Each true segment S is compared with the predicted segment S' of the largest intersection over
    union with it; the mean over true segments is weighted by their durations::

        sum_S |S| max_S' |S & S'| / |S | S'|  /  sum_S |S|

    Parameters
    ----------
    y_true, y_pred : array-like
        Labels per position or lists of segments, of one sequence or many (see the module).
    ignore_label : str, number or None
        Background whose segments are removed from both.

    Returns
    -------
    score : float
        From 0.0 to 1.0, which is best.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit together or no true segment is left.

    References
    ----------
    P. Arbelaez, M. Maire, C. Fowlkes, J. Malik: Contour detection and hierarchical image
    segmentation. IEEE TPAMI 33(5):898-916, 2011.

    Examples
    --------
    >>> from sklearn_api.metrics import covering
    >>> covering(list("aabb"), list("aaaa"))
    0.5
    """
    pairs = _read(y_true, y_pred, ignore_label)
    covered = total = 0.0
    for one, two in pairs:
        durations = one.stops - one.starts
        covered += float((durations * _best_overlap(one, two)).sum())
        total += int(durations.sum())
    if total == 0:
        raise ValueError(
            "`y_true` must hold at least one segment to divide by; got 0 "
            f"with ignore_label={ignore_label!r}."
        )
    return covered / total


def _read(y_true: Any, y_pred: Any, ignore_label: Any) -> list[tuple[Segmentation, Segmentation]]:
    pairs = read_pairs(y_true, y_pred)
    check_ignore_label(
        {label for pair in pairs for one in pair for label in one.labels}, ignore_label
    )
    return [(one.without(ignore_label), two.without(ignore_label)) for one, two in pairs]


def _edit_distance(true: list[Any], pred: list[Any]) -> int:
    """Levenshtein distance, one row of the table at a time."""
    index = {label: n for n, label in enumerate(dict.fromkeys([*true, *pred]))}
    target = np.array([index[label] for label in pred], dtype=np.int64)
    ramp = np.arange(len(pred) + 1)
    row = ramp
    for n, label in enumerate(true, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (target != index[label]))
        # Inserting costs 1 a step: a running minimum of what is left after taking the steps off.
        row = np.minimum.accumulate(np.append(n, best) - ramp) + ramp
    return int(row[-1])


def _positions(
    segmentation: Segmentation, index: dict[Any, int], length: int, name: str, i: int
) -> np.ndarray:
    """Label indices of shape (length,)."""
    expected = np.append(0, segmentation.stops)
    found = np.append(segmentation.starts, length)
    gaps = np.flatnonzero(expected != found)
    if len(gaps):
        a, b = expected[gaps[0]], found[gaps[0]]
        raise ValueError(
            f"Segments of `{name}` must cover positions 0 to {length} without a gap; got none "
            f"from {a} to {b} at sequence {i}."
        )
    codes = np.array([index[label] for label in segmentation.labels], dtype=np.int64)
    return np.repeat(codes, segmentation.stops - segmentation.starts)


def _best_overlap(true: Segmentation, pred: Segmentation) -> np.ndarray:
    """Largest intersection over union of every true segment, of shape (N,)."""
    best = np.zeros(len(true.labels))
    if len(true.labels) == 0 or len(pred.labels) == 0:
        return best
    # Between two cuts nothing begins or ends: each piece is the whole intersection of one pair.
    cuts = np.unique(np.concatenate([true.starts, true.stops, pred.starts, pred.stops]))
    i = np.searchsorted(true.starts, cuts[:-1], side="right") - 1
    j = np.searchsorted(pred.starts, cuts[:-1], side="right") - 1
    inside = (i >= 0) & (j >= 0)
    inside &= (cuts[:-1] < true.stops[i]) & (cuts[:-1] < pred.stops[j])
    i, j, common = i[inside], j[inside], np.diff(cuts)[inside]
    union = (true.stops - true.starts)[i] + (pred.stops - pred.starts)[j] - common
    np.maximum.at(best, i, common / union)
    return best

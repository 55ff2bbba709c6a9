"""One-to-one matching of points that lie within a tolerance of each other.

Points are rows of integers, increasing in every column: boundaries (one column) or segments (onset
and offset). Two points are compatible if they differ by at most the tolerance in every column. The
matching has as many pairs as possible and, among those, the smallest sum of differences. Exchanging
the partners of two crossing pairs never harms either, so some best matching keeps the order, and
dynamic programming finds it: with f[i, j] the best value for the first i true and j predicted
points,

    f[i, j] = max(f[i-1, j], f[i, j-1], f[i-1, j-1] + gain[i, j]).

Only points in one connected group of compatible pairs compete, so this runs per group: O(n log m)
if points are further apart than the tolerance, O(nm) in the worst case.
"""

from __future__ import annotations

import numpy as np


def match_in_order(
    true: np.ndarray, pred: np.ndarray, tolerance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match true with predicted points.

    Parameters
    ----------
    true : int64 ndarray of shape (n, d)
        Points, strictly increasing in every column.
    pred : int64 ndarray of shape (m, d)
        Points, strictly increasing in every column.
    tolerance : int
        Largest difference in any column.

    Returns
    -------
    true_index, pred_index : int64 ndarray of shape (number of pairs,)
        Rows of `true` and of `pred`, both increasing.
    """
    columns = range(true.shape[1])
    first = np.max([np.searchsorted(pred[:, c], true[:, c] - tolerance) for c in columns], axis=0)
    stop = np.min(
        [np.searchsorted(pred[:, c], true[:, c] + tolerance, side="right") for c in columns], axis=0
    )
    rows = np.flatnonzero(first < stop)
    if len(rows) == 0:
        return rows, rows
    first, stop = first[rows], stop[rows]
    # Both ends of the ranges increase, so a range that shares nothing with the one before it
    # shares nothing with any before it.
    heads = np.flatnonzero(np.concatenate([[True], first[1:] >= stop[:-1]]))
    tails = np.append(heads[1:], len(rows))
    lone = (tails - heads == 1) & (stop[tails - 1] - first[heads] == 1)
    pairs = [np.stack([rows[heads[lone]], first[heads[lone]]], axis=1)]
    for head, tail in zip(heads[~lone].tolist(), tails[~lone].tolist(), strict=True):
        i, j = rows[head:tail], np.arange(first[head], stop[tail - 1])
        a, b = _match_group(true[i], pred[j], tolerance)
        pairs.append(np.stack([i[a], j[b]], axis=1))
    matched = np.concatenate(pairs)
    matched = matched[np.argsort(matched[:, 0])]
    return matched[:, 0], matched[:, 1]


def _match_group(
    true: np.ndarray, pred: np.ndarray, tolerance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match points of one group by dynamic programming."""
    n, m = len(true), len(pred)
    # One more pair must outweigh any saving in distance.
    bonus = tolerance * true.shape[1] * min(n, m) + 1
    best = np.zeros(m + 1, dtype=np.int64)
    came_from = np.empty((n, m), dtype=np.int8)  # 0: skip true, 1: skip predicted, 2: pair
    for i in range(n):
        apart = np.abs(pred - true[i])
        gain = np.where(apart.max(axis=1) <= tolerance, bonus - apart.sum(axis=1), -1)
        paired = best[:-1] + gain
        row = np.maximum.accumulate(np.append(0, np.maximum(best[1:], paired)))
        came_from[i] = np.where(row[1:] == row[:-1], 1, np.where(row[1:] == best[1:], 0, 2))
        best = row
    pairs = []
    i, j = n - 1, m - 1
    while i >= 0 and j >= 0:
        if came_from[i, j] == 2:
            pairs.append((i, j))
            i, j = i - 1, j - 1
        elif came_from[i, j] == 1:
            j -= 1
        else:
            i -= 1
    found = np.array(pairs[::-1], dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]

"""Decoding by agreement: the segmentation whose segments are found again in most samples.

The most probable segmentation fails where boundaries are diffuse: a short segment whose start and
end may each lie at ten places is spread over a hundred segmentations, each less probable than the
one that leaves it out. Labels chosen position by position fail the other way: they flicker. Here a
segment is right if a true one of its label overlaps it by more than half of their union, and the
segmentation maximises

    2 sum_segments E[overlap] / (number of segments + E[number of true segments])

with the intersection over the union as the overlap of a segment that is right, and 0 for others:
the panoptic quality of expected counts. Expectations are means over samples of the posterior; no
two true segments, and no two predicted ones, overlap one by so much, so that they add up.
Candidates are all segments of the samples and
of the most probable segmentation; the best path through them is found by a max pass, and the ratio
maximised by Dinkelbach's iteration, as in `flash_semicrf.inference.minimum_risk`.

References
----------
A. Kirillov, K. He, R. Girshick, C. Rother and P. Dollár, Panoptic Segmentation, CVPR 2019.
V. Goel and W. J. Byrne, Minimum Bayes-risk automatic speech recognition, Computer Speech and
Language 14, 2000.
W. Dinkelbach, On nonlinear fractional programming, Management Science 13, 1967.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.arguments import check_number, check_positive_int
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import NEG_INF, Potentials, first_term
from flash_semicrf.problem.segments import SegmentTable, ViterbiResult, table_to_segments
from flash_semicrf.problem.validation import check_potentials

__all__ = ["consensus"]

_ITERATIONS = 100


class _Candidates(NamedTuple):
    """Distinct segments of one sequence, ordered by start; arrays of shape (N,)."""

    start: np.ndarray
    stop: np.ndarray
    label: np.ndarray
    times: np.ndarray  # samples that contain it
    right: np.ndarray  # probability that a true segment agrees with it
    overlap: np.ndarray  # expected intersection over union with one that does, 0 without any


def consensus(
    potentials: Potentials,
    num_samples: int = 64,
    backend: str = "auto",
    *,
    min_iou: float = 0.5,
    seed: int | torch.Generator | None = 0,
    constraints: Constraints | None = None,
) -> ViterbiResult:
    """Segmentation of each sequence with the largest expected overlap with the true one.

    Parameters
    ----------
    potentials : Potentials
    num_samples : int, default=64
        Samples of each sequence, from which probabilities are counted.
    backend : str
        As for `flash_semicrf.log_partition`.
    min_iou : float, default=0.5
        A segment is right if its intersection with a true one of its label is more than this part
        of their union; in [0.5, 1).
    seed : int, torch.Generator or None, default=0
        Of the samples; see `flash_semicrf.sample`.
    constraints : Constraints, optional
        Condition on known facts.

    Returns
    -------
    ViterbiResult
        Scores (B,) in float64: the expected quality, in [0, 1]. The score of a `Segment` is the
        probability that it is right.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.

    Examples
    --------
    A segment of label 1 that covers the middle of six positions, its ends unknown.

    >>> scores = torch.zeros(1, 6, 2)
    >>> scores[0, 2:4, 1] = 8.0
    >>> problem = Potentials(scores, torch.zeros(2, 2), torch.zeros(6, 2), torch.tensor([6]))
    >>> any(s.label == 1 for s in consensus(problem).segments[0])
    True
    """
    p = check_potentials(potentials)
    num_samples = check_positive_int("num_samples", num_samples)
    min_iou = check_number("min_iou", min_iou)
    if not 0.5 <= min_iou < 1:
        raise ValueError(f"`min_iou` must be in [0.5, 1); got {min_iou}.")
    drawn = sample_table(p, num_samples, seed, backend, constraints=constraints)
    _, best = viterbi_table(p, backend, constraints=constraints)
    allowed = _allowed(p)
    columns = [_columns(drawn, p.batch_size), _columns(best, p.batch_size)]
    found, scores = [], np.zeros(p.batch_size)
    for b in range(p.batch_size):
        candidates = _candidates(columns[0][b], columns[1][b], num_samples, min_iou)
        chosen, scores[b] = _best_path(candidates, num_samples, allowed)
        found.append(chosen)
    rows = torch.from_numpy(np.concatenate([x[:, :3] for x in found]).astype(np.int64))
    sequence = torch.repeat_interleave(torch.tensor([len(x) for x in found]))
    table = SegmentTable(sequence, *rows.unbind(1))
    right = torch.from_numpy(np.concatenate([x[:, 3] for x in found]))
    segments = table_to_segments(table, p.batch_size, right)
    return ViterbiResult(torch.from_numpy(scores).to(p.device), segments)


def _columns(table: SegmentTable, batch_size: int) -> list[np.ndarray]:
    """Segments (start, stop, label) of each sequence, of all its samples together."""
    rows = torch.stack(table, 1).cpu().numpy()
    owner = rows[:, 0] % batch_size
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, batch_size))
    return np.split(rows[order, 1:], bounds)


def _allowed(p: Potentials) -> np.ndarray:
    """Labels that may follow each other, with a first row for the start, bool (C + 1, C)."""
    pairs = p.transition > NEG_INF
    first = first_term(p) > NEG_INF
    pairs = pairs.any(0) if pairs.dim() == 3 else pairs
    first = first.any(0) if first.dim() == 2 else first
    return torch.cat([first[None], pairs]).cpu().numpy()


def _candidates(
    drawn: np.ndarray, best: np.ndarray, num_samples: int, min_iou: float
) -> _Candidates:
    rows, count = np.unique(np.concatenate([drawn, best]), axis=0, return_counts=True)
    _, of_best = np.unique(np.concatenate([rows, best]), axis=0, return_counts=True)
    count = count - (of_best - 1)  # the most probable segmentation is no sample
    right, overlap = np.zeros((2, len(rows)))
    for label in np.unique(rows[:, 2]):
        own = rows[:, 2] == label
        right[own], overlap[own] = _agreement(rows[own, 0], rows[own, 1], count[own], min_iou)
    return _Candidates(
        rows[:, 0], rows[:, 1], rows[:, 2], count, right / num_samples, overlap / num_samples
    )


def _agreement(
    start: np.ndarray, stop: np.ndarray, count: np.ndarray, min_iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """Number of sampled segments that agree with each, of one label and ordered by start, and the
    sum of their intersections over unions."""
    duration = stop - start
    # Two that agree start less than the shorter duration apart, and so than this one's.
    low = np.searchsorted(start, start - duration, side="right")
    high = np.searchsorted(start, stop, side="left")
    right, overlap = np.zeros((2, len(start)))
    size = high - low
    total = np.cumsum(size)
    first = 0
    while first < len(start):  # as many at a time as memory is cheap for
        last = max(first + 1, int(np.searchsorted(total, total[first] + (1 << 22))))
        own = np.repeat(np.arange(first, last), size[first:last])
        offset = np.arange(len(own)) - np.repeat(
            total[first:last] - size[first:last] - (total[first] - size[first]), size[first:last]
        )
        other = low[own] + offset
        shared = np.minimum(stop[own], stop[other]) - np.maximum(start[own], start[other])
        union = duration[own] + duration[other] - shared
        agrees = np.where(shared > min_iou * union, count[other], 0)
        right[first:last] = np.bincount(own - first, agrees, last - first)
        overlap[first:last] = np.bincount(own - first, agrees * (shared / union), last - first)
        first = last
    return right, overlap


def _best_path(
    candidates: _Candidates, num_samples: int, allowed: np.ndarray
) -> tuple[np.ndarray, float]:
    """Rows (start, stop, label, right) of the path of largest quality, and this."""
    expected = candidates.times.sum() / num_samples
    ratio = 0.0
    for _ in range(_ITERATIONS):
        path = _max_pass(candidates, 2 * candidates.overlap - ratio, allowed)
        found = 2 * candidates.overlap[path].sum() / (len(path) + expected)
        if found <= ratio * (1 + 1e-12):
            break
        ratio, chosen = found, path
    rows = np.stack([column[chosen] for column in candidates[:3]], 1)
    return np.column_stack([rows, candidates.right[chosen]]), float(ratio)


def _max_pass(candidates: _Candidates, reward: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Indices of the candidates on the path from the first position to the end."""
    start, stop, label = candidates[:3]
    length, num_labels = int(stop.max()), allowed.shape[1]
    value = np.full((length + 1, num_labels), -np.inf)
    came = np.full((length + 1, num_labels), -1)  # candidate that ends here
    before = np.full(len(start), -1)
    begins = np.flatnonzero(np.diff(start, prepend=-1))
    for first, last in zip(begins, [*begins[1:], len(start)], strict=True):
        s, labels = start[first], label[first:last]
        if s == 0:
            into = np.where(allowed[0, labels], 0.0, -np.inf)
        else:
            options = np.where(allowed[1:, labels], value[s][:, None], -np.inf)
            source = options.argmax(0)
            into = options[source, np.arange(len(labels))]
            before[first:last] = came[s, source]
        total = into + reward[first:last]
        for i, worth in enumerate(total.tolist(), int(first)):
            t, c = stop[i], label[i]
            if worth > value[t, c]:
                value[t, c], came[t, c] = worth, i
    path = []
    i = int(came[length, value[length].argmax()])
    while i >= 0:
        path.append(i)
        i = int(before[i])
    return np.array(path[::-1])

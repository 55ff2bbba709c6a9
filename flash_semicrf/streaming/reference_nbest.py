"""The n best segmentations by a dynamic program that keeps n of them per end and label.

Every (t, c) lists the n best segmentations of [0, t) that end in c, as extensions of those before
their last segments. Cost n·T·K·C² in plain Python: the oracle of the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials, first_term
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.reference import blank_and_upcast

__all__ = ["n_best"]


class _Path(NamedTuple):
    """Segmentation by its last segment, and the label and rank of the segmentation before it."""

    score: float
    duration: int
    source: int
    rank: int


_Lists: TypeAlias = list[list[list[_Path]]]
"""The best paths by end, label and rank."""


def n_best(potentials: Potentials, number: int) -> tuple[Tensor, SegmentTable]:
    """Best segmentations; ties: the shortest last segment, then the lowest label, and so on.

    Parameters
    ----------
    potentials : Potentials
    number : int
        Number n of segmentations per sequence.

    Returns
    -------
    scores : float64 Tensor of shape (B, n)
        In falling order; -inf if there are fewer.
    table : SegmentTable
        `sequence` is rank * B + b.
    """
    p = blank_and_upcast(potentials).to("cpu")
    scores = p.scores.new_full((p.batch_size, number), -torch.inf, dtype=torch.float64)
    walks: list[tuple[int, list[tuple[int, int, int]]]] = []
    for b in range(p.batch_size):
        lists = _lists(p, b, number)
        length = int(p.lengths[b])
        final = [0.0] * p.num_labels if p.final_scores is None else p.final_scores.tolist()
        best = _n_first(lists, length, 0, final, 0.0, number)
        for rank, path in enumerate(sorted(best, key=_order(lists, length))[:number]):
            scores[b, rank] = path.score
            walks.append((rank * p.batch_size + b, _walk(lists, length, path)))
    rows = [(index, *row) for index, walk in sorted(walks) for row in walk]
    columns = p.lengths.new_tensor(rows).reshape(-1, 4).T.contiguous()
    table = SegmentTable(*columns).to(potentials.device)
    return scores.to(potentials.device), table


def _n_first(
    lists: _Lists, start: int, duration: int, into: list[float], content: float, number: int
) -> list[_Path]:
    """Extensions of the paths that end before `start` by a segment."""
    return [
        _Path(path.score + weight + content, duration, source, rank)
        for source, weight in enumerate(into)
        for rank, path in enumerate(lists[start][source][:number])
        if path.score + weight + content > -math.inf
    ]


def _order(lists: _Lists, stop: int) -> Callable[[_Path], tuple[float, int, int, int, int]]:
    """Sort key of paths that end before `stop`: score, then the rule for ties."""

    def key(path: _Path) -> tuple[float, int, int, int, int]:
        if path.source < 0:
            return -path.score, path.duration, 0, 0, 0
        before = lists[stop - path.duration][path.source][path.rank]
        return -path.score, path.duration, before.duration, path.source, path.rank

    return key


def _lists(p: Potentials, b: int, number: int) -> _Lists:
    """The n best paths of every (t, c) of sequence b."""
    scores, bias = p.scores[b].tolist(), p.duration_bias.tolist()
    start, end = (None if x is None else x[b].tolist() for x in (p.start_scores, p.end_scores))
    by_duration = p.transition.expand(p.max_duration, p.num_labels, p.num_labels)
    into = by_duration.transpose(1, 2).tolist()  # [k - 1][label][source]
    spans = None if p.segment_scores is None else p.segment_scores[b].tolist()
    moves = None if p.transition_scores is None else p.transition_scores[b].mT.tolist()
    first = first_term(p).expand(p.max_duration, p.num_labels).tolist()
    lists: _Lists = [[[] for _ in range(p.num_labels)]]
    for t in range(1, int(p.lengths[b]) + 1):
        lists.append([])
        for c in range(p.num_labels):
            paths: list[_Path] = []
            inside = 0.0
            for k in range(1, min(t, p.max_duration) + 1):
                s = t - k
                inside += scores[s][c]
                content = inside + bias[k - 1][c]
                if start is not None:
                    content += start[s][c]
                if end is not None:
                    content += end[t - 1][c]
                if spans is not None:
                    content += spans[s][k - 1][c]
                if s == 0 and first[k - 1][c] + content > -math.inf:
                    paths.append(_Path(first[k - 1][c] + content, k, -1, 0))
                if s > 0:
                    arriving = into[k - 1][c]
                    if moves is not None:
                        arriving = [a + m for a, m in zip(arriving, moves[s][c], strict=True)]
                    paths += _n_first(lists, s, k, arriving, content, number)
            lists[t].append(sorted(paths, key=_order(lists, t))[:number])
    return lists


def _walk(lists: _Lists, length: int, last: _Path) -> list[tuple[int, int, int]]:
    """Segments (start, stop, label) of a path that leads to the last label."""
    rows = []
    t, label, rank = length, last.source, last.rank
    while t > 0:
        path = lists[t][label][rank]
        rows.append((t - path.duration, t, label))
        t, label, rank = t - path.duration, path.source, path.rank
    return rows[::-1]

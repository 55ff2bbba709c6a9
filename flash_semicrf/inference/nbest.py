"""The n best segmentations, exactly and in order.

The messages of the max pass are the best scores up to every end and label. The recursive
enumeration algorithm (Jiménez and Marzal 1999, "Computing the K shortest paths: a new algorithm and
an experimental comparison", WAE) finds each further segmentation from the position at which it
diverges from those before it. Beyond the pass it costs K·C for each end and label that it visits,
most of them on the best segmentation, and about n per segment of each further one; with a duration
tail also the durations between K and those of the best segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.inference.viterbi import check_feasible
from flash_semicrf.problem.constraints import Constraints, constrain, fold_table
from flash_semicrf.problem.potentials import Potentials, score_rows
from flash_semicrf.problem.segments import Segments, SegmentTable, table_to_segments
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.problem.validation import check_positive_int, check_potentials
from flash_semicrf.streaming import reference_nbest
from flash_semicrf.streaming.dispatch import choose

__all__ = ["NBestResult", "n_best", "n_best_table"]


class NBestResult(NamedTuple):
    """Best segmentations of a batch.

    Attributes
    ----------
    scores : Tensor of shape (B, n)
        In falling order; -inf where a sequence has fewer segmentations.
    segments : list of list of Segments
        Segmentations by sequence and rank, as many as exist.
    """

    scores: Tensor
    segments: list[list[Segments]]


def n_best(
    potentials: Potentials,
    n: int,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> NBestResult:
    """Find the n best segmentations of each sequence.

    They are distinct and ordered by falling probability: the first one is the result of
    `flash_semicrf.viterbi`.

    Parameters
    ----------
    potentials : Potentials
    n : int
        Largest number of segmentations per sequence, >= 1.
    backend : str
        As for `flash_semicrf.log_partition`; it runs the max pass. The search always runs on the
        CPU, on a copy of GPU tensors; "reference" runs a plain dynamic program.
    constraints : Constraints, optional
        Consider only segmentations that agree with known facts.

    Returns
    -------
    NBestResult
        Scores are float64. Of equal scores, the shortest last segment comes first, then the lowest
        label, and so on towards the start.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.

    Examples
    --------
    Scores of zero, K = 2, and one label: five segmentations tile four positions.

    >>> problem = Potentials(
    ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    ... )
    >>> found = n_best(problem, 6)
    >>> [[s.duration for s in segments] for segments in found.segments[0]]
    [[1, 1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2]]
    >>> found.scores[0].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, -inf]
    """
    p = check_potentials(potentials)
    scores, table = n_best_table(p, n, backend, constraints=constraints)
    count, ranks = scores.shape
    with torch.no_grad():
        rows = score_rows(p, table._replace(sequence=table.sequence % count))
    found = table_to_segments(table, ranks * count, rows)
    available = (scores > -torch.inf).sum(1).tolist()
    segments = [found[b::count][: available[b]] for b in range(count)]
    return NBestResult(scores, segments)


def n_best_table(
    potentials: Potentials,
    n: int,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> tuple[Tensor, SegmentTable]:
    """Results of `n_best` with the segments as tensors.

    Parameters and errors are those of `n_best`.

    Returns
    -------
    scores : float64 Tensor of shape (B, n)
    table : SegmentTable
        Its `sequence` is rank * B + b; without rows for segmentations that do not exist.
    """
    n = check_positive_int("n", n)
    given = check_potentials(potentials)
    p = constrain(given, constraints)
    chosen = choose(backend, p)
    with torch.no_grad():
        if chosen.name == "reference":
            scores, table = reference_nbest.n_best(unrolled(p), n)
        else:
            from flash_semicrf.streaming.cpu import nbest as search

            alpha = chosen.max_messages(p).to("cpu")
            scores, table = search.n_best(p.to("cpu"), alpha, n)
            scores, table = scores.to(p.device), table.to(p.device)
    check_feasible(scores[:, 0], constraints is not None)
    return scores, table if p is given else fold_table(table, given.num_labels)

"""Minimum-risk decoding: the segmentation with the largest expected accuracy.

The Viterbi segmentation is the most probable one as a whole, but another may be correct at more
positions or boundaries. Of all segmentations y that the model allows (durations, transitions and
scores that are not -inf), minimum-risk decoding selects, by the posterior marginals,

- ``"position"``: the one that maximises the expected number of correctly labelled positions,

      sum_t P(label of t = y_t),

  by a max pass over the position marginals (posterior-Viterbi: Fariselli, Martelli and Casadio
  2005, BMC Bioinformatics 6; Käll, Krogh and Sonnhammer 2005, Bioinformatics 21);

- ``"boundary"``: the one that maximises the F1 of expected counts of starts,

      2 sum_{starts (s, c) of y} P(a segment of c starts at s) / (|y| + E[number of segments]),

  where a start is correct if a segment of the same label starts there, or within a tolerance: then
  P is summed over the window, and segments that would have two starts in one are avoided. The ratio
  is maximised by the iteration of Dinkelbach (1967, "On nonlinear fractional programming",
  Management Science 13): the max pass finds the y that maximises numerator - lambda * denominator,
  whose ratio is the next lambda, until lambda stops growing. This is the F1 of expected counts, not
  the expected F1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import NEG_INF, Potentials, accumulator_dtype, explicit_start
from flash_semicrf.problem.segments import (
    SegmentTable,
    ViterbiResult,
    covered_positions,
    table_to_segments,
)
from flash_semicrf.problem.validation import check_choice, check_int, check_potentials

__all__ = ["minimum_risk"]

_TIE = 1e-7  # weight of boundaries, which decide between equal labels of positions
_ITERATIONS = 100
_AVOIDED = 10.0  # more than what a start can gain

Decoder: TypeAlias = Callable[[Potentials], tuple[Tensor, SegmentTable]]


def minimum_risk(
    potentials: Potentials,
    risk: Literal["position", "boundary"] = "position",
    backend: str = "auto",
    *,
    tolerance: int = 0,
    constraints: Constraints | None = None,
) -> ViterbiResult:
    """Segmentation of each sequence with the largest expected accuracy.

    Parameters
    ----------
    potentials : Potentials
    risk : {"position", "boundary"}
        "position" maximises the expected number of positions with the correct label. It does not
        depend on boundaries between segments of one label, which are set where a boundary has a
        probability above 1/2, at a loss of at most 2e-7 per position of the sequence. "boundary"
        maximises 2 E[correct starts] / (number of starts + E[number of true starts]); a start is
        correct if a segment of the same label starts there.
    backend : str
        As for `flash_semicrf.log_partition`.
    tolerance : int, default=0
        Positions by which a start may be off, >= 0, with "boundary". Segments of no more positions
        are avoided.
    constraints : Constraints, optional
        Condition on known facts, and consider only segmentations that agree with them.

    Returns
    -------
    ViterbiResult
        Scores (B,) in float64: the expected number of correct positions, or the F1. The score of a
        `Segment` is its expected number of correct positions, or the probability of its start.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.

    Examples
    --------
    Scores of zero, K = 2: the five segmentations of four positions are equally probable and have 3
    segments on average, so the F1 of four single positions is 2 * 3 / (4 + 3).

    >>> problem = Potentials(
    ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    ... )
    >>> result = minimum_risk(problem, "boundary")
    >>> len(result.segments[0]), round(float(result.scores), 6) == round(6 / 7, 6)
    (4, True)
    """
    check_choice("risk", risk, ("position", "boundary"))
    check_int("tolerance", tolerance)
    if tolerance < 0 or (tolerance and risk != "boundary"):
        raise ValueError(f'`tolerance` must be >= 0, and 0 but for "boundary"; got {tolerance}.')
    p = check_potentials(potentials)
    wide = accumulator_dtype(p.device)
    with torch.no_grad():
        marginals = segment_marginals(p, backend, counts=False, constraints=constraints)
        position, start = marginals.position.to(wide), marginals.start.to(wide)
        best_of = partial(viterbi_table, backend=backend, constraints=constraints)
        if risk == "position":
            scores, table, rows = _most_positions(_feasibility(p), position, start, best_of)
        else:
            expected = start.sum((1, 2))
            allowed, start = _with_tolerance(_feasibility(p), start, tolerance)
            scores, table, rows = _best_f1(allowed, start, expected, best_of)
    return ViterbiResult(scores, table_to_segments(table, p.batch_size, rows))


def _feasibility(p: Potentials) -> Potentials:
    """The problem whose segmentations all score 0, or -inf where they are forbidden."""
    wide = accumulator_dtype(p.device)
    # Of explicit initial scores: zeros of transitions would score the number of sources.
    return p.replace(
        **{
            name: torch.zeros_like(value, dtype=wide).masked_fill(value <= NEG_INF, -torch.inf)
            for name, value in explicit_start(p).parameters().items()
        }
    )


def _with_tolerance(
    allowed: Potentials, start: Tensor, tolerance: int
) -> tuple[Potentials, Tensor]:
    """Problem that avoids two starts in a window, and the probability of one in it (B, T, C)."""
    if not tolerance:
        return allowed, start
    longest = min(tolerance, allowed.max_duration)
    bias = allowed.duration_bias.clone()
    bias[:longest] -= _AVOIDED
    sums = torch.nn.functional.pad(start.cumsum(1), (0, 0, 1, 0))
    position = torch.arange(start.shape[1], device=start.device)
    low, high = (position - tolerance).clamp(min=0), position + tolerance + 1
    near = sums[:, high.clamp(max=start.shape[1])] - sums[:, low]
    return allowed.replace(duration_bias=bias), near.clamp(0.0, 1.0)


def _plus(allowed: Tensor | None, reward: Tensor) -> Tensor:
    return reward if allowed is None else allowed + reward


def _most_positions(
    allowed: Potentials, position: Tensor, start: Tensor, best_of: Decoder
) -> tuple[Tensor, SegmentTable, Tensor]:
    """Expected correct positions, segments, and expected correct positions of each segment."""
    problem = allowed.replace(
        scores=allowed.scores + position,
        start_scores=_plus(allowed.start_scores, _TIE * (2 * start - 1)),
    )
    _, table = best_of(problem)
    owner, covered, row = covered_positions(table)
    right = position[owner, covered, table.label[row]]
    rows = right.new_zeros(len(table.start)).index_add(0, row, right)
    return _by_sequence(rows, table, allowed.batch_size), table, rows


def _best_f1(
    allowed: Potentials, start: Tensor, expected: Tensor, best_of: Decoder
) -> tuple[Tensor, SegmentTable, Tensor]:
    """F1 of expected counts, segments, and the probability of the start of each segment."""
    count = allowed.batch_size
    best = torch.zeros_like(expected)
    for _ in range(_ITERATIONS):
        reward = 2 * start - best[:, None, None]
        problem = allowed.replace(start_scores=_plus(allowed.start_scores, reward))
        _, table = best_of(problem)
        rows = start[table.sequence, table.start, table.label]
        predicted = _by_sequence(torch.ones_like(rows), table, count)
        ratio = 2 * _by_sequence(rows, table, count) / (predicted + expected)
        # Of a sequence that has converged, the segmentation found last has the same ratio.
        converged = bool((ratio <= best * (1 + 1e-12)).all())
        best = torch.maximum(best, ratio)
        if converged:
            break
    return ratio, table, rows


def _by_sequence(rows: Tensor, table: SegmentTable, count: int) -> Tensor:
    """Sums over the segments of each sequence."""
    return rows.new_zeros(count).index_add(0, table.sequence, rows)

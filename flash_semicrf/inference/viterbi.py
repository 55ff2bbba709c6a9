"""Best segmentation of each sequence, found by a streaming backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_semicrf.inference.flags import validated
from flash_semicrf.inference.library import PARAMETERS, named, operator, values_of
from flash_semicrf.problem.complete_table import CompleteTable
from flash_semicrf.problem.constraints import Constraints, constrain, fold_table
from flash_semicrf.problem.flags import Validate, poisoned
from flash_semicrf.problem.potentials import Potentials, accumulator_dtype, score_rows
from flash_semicrf.problem.segments import (
    SegmentTable,
    ViterbiResult,
    table_to_segments,
)
from flash_semicrf.streaming.dispatch import choose, chosen_as

__all__ = ["best_segments", "check_feasible", "viterbi", "viterbi_of_checked", "viterbi_table"]


def viterbi(
    potentials: Potentials,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
    validate: Validate = "auto",
) -> ViterbiResult:
    """Best segmentation of each sequence.

    Ties go to the shortest last segment, then to the lowest label, and so on from the end.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        As for `flash_semicrf.log_partition`.
    constraints : Constraints, optional
        Consider only segmentations that agree with known facts.
    validate : {"auto", "values", "shapes"}, default="auto"
        As for `flash_semicrf.log_partition`.

    Returns
    -------
    ViterbiResult
        Scores (B,) in float64, and the segments of each sequence; their scores add up to that of
        the sequence. With ``validate="shapes"`` a sequence with a bad length or value has the score
        NaN and no segments.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.
    """
    p, bad = validated(potentials, backend, validate, constraints)
    with torch.no_grad():
        scores, table = viterbi_of_checked(p, backend, constraints, bad)
        rows = score_rows(p, table)
    return ViterbiResult(scores, table_to_segments(table, p.batch_size, rows))


def viterbi_table(
    potentials: Potentials,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
    validate: Validate = "auto",
) -> tuple[Tensor, SegmentTable]:
    """Results of `viterbi` with the segments as tensors.

    Parameters and errors are those of `viterbi`. On a GPU one read waits for the device, the last
    thing before the table is written: it has as many rows as there are segments.

    Returns
    -------
    scores : float64 Tensor of shape (B,)
    table : SegmentTable
    """
    p, bad = validated(potentials, backend, validate, constraints)
    return viterbi_of_checked(p, backend, constraints, bad)


def viterbi_of_checked(
    p: Potentials,
    backend: str,
    constraints: Constraints | None = None,
    bad: Tensor | None = None,
) -> tuple[Tensor, SegmentTable]:
    """`viterbi_table` of a problem that `flash_semicrf.inference.flags.validated` returned."""
    with torch.no_grad():
        constrained = constrain(p, constraints)
        name = choose(backend, constrained).name
        has_constraints = constraints is not None
        given = (constrained.known_range(), constrained.lengths, bad, *values_of(constrained))
        scores, *columns = best_segments(name, has_constraints, *given)
    table = SegmentTable(*columns)
    return scores, table if constrained is p else fold_table(table, p.num_labels)


def _best_segments(
    backend: str,
    has_constraints: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    p = named(parameters, lengths).with_known_range(known)
    chosen = chosen_as(backend, p)
    scores, table = chosen.viterbi(p)
    scores = poisoned(scores, bad)
    if not isinstance(table, CompleteTable):  # else every sequence has a segmentation: do not wait
        check_feasible(scores, has_constraints)
    if bad is not None and chosen.name != "triton":  # to which bad sequences have no positions
        kept = ~bad[table.sequence]
        table = SegmentTable(*(column[kept] for column in table))
    return (scores, *table)


def _fake_best_segments(
    backend: str,
    has_constraints: bool,
    known: Sequence[float],
    lengths: Tensor,
    bad: Tensor | None,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    p = named(parameters, lengths)
    number = torch.library.get_ctx().new_dynamic_size()
    rows = [p.scores.new_empty((number,), dtype=torch.int64) for _ in SegmentTable._fields]
    return (p.scores.new_empty(p.batch_size, dtype=accumulator_dtype(p.device)), *rows)


best_segments = operator(
    "best_segments(str backend, bool has_constraints, float[] known, Tensor lengths, "
    f"Tensor? bad, {PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _best_segments,
    _fake_best_segments,
)
"""Best scores (B,) and the columns of a `SegmentTable` (N,) of a checked problem, `backend` being
the name of what `choose` has returned for it."""


def check_feasible(scores: Tensor, constrained: bool = False) -> None:
    """Raise ValueError if the best score of a sequence is -inf; the message names the sequences."""
    infeasible = (scores == -torch.inf).nonzero()[:, 0].tolist()
    if infeasible:
        raise ValueError(
            f"No segmentation is feasible for sequences {infeasible}: every one meets a forbidden "
            "(-inf) score, transition or duration"
            + (", or breaks a constraint." if constrained else ".")
        )

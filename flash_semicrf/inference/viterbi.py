"""Best segmentation of each sequence, found by a streaming backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.constraints import Constraints, constrain, fold_table
from flash_semicrf.problem.potentials import Potentials, score_rows
from flash_semicrf.problem.segments import SegmentTable, ViterbiResult, table_to_segments
from flash_semicrf.problem.validation import check_potentials
from flash_semicrf.streaming.dispatch import choose

__all__ = ["check_feasible", "viterbi", "viterbi_of_checked", "viterbi_table"]


def viterbi(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
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

    Returns
    -------
    ViterbiResult
        Scores (B,) in float64, and the segments of each sequence; their scores add up to that of
        the sequence.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.
    """
    p = check_potentials(potentials)
    with torch.no_grad():
        scores, table = viterbi_of_checked(p, backend, constraints)
        rows = score_rows(p, table)
    return ViterbiResult(scores, table_to_segments(table, p.batch_size, rows))


def viterbi_table(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> tuple[Tensor, SegmentTable]:
    """Results of `viterbi` with the segments as tensors.

    Parameters and errors are those of `viterbi`.

    Returns
    -------
    scores : float64 Tensor of shape (B,)
    table : SegmentTable
    """
    return viterbi_of_checked(check_potentials(potentials), backend, constraints)


def viterbi_of_checked(
    p: Potentials, backend: str, constraints: Constraints | None = None
) -> tuple[Tensor, SegmentTable]:
    """`viterbi_table` of a checked problem."""
    with torch.no_grad():
        constrained = constrain(p, constraints)
        scores, table = choose(backend, constrained).viterbi(constrained)
    check_feasible(scores, constraints is not None)
    return scores, table if constrained is p else fold_table(table, p.num_labels)


def check_feasible(scores: Tensor, constrained: bool = False) -> None:
    """Raise ValueError if the best score of a sequence is -inf; the message names the sequences."""
    infeasible = (scores == -torch.inf).nonzero()[:, 0].tolist()
    if infeasible:
        raise ValueError(
            f"No segmentation is feasible for sequences {infeasible}: every one meets a forbidden "
            "(-inf) score, transition or duration"
            + (", or breaks a constraint." if constrained else ".")
        )

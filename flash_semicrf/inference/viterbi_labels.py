"""Best segmentation of each sequence, as tensors whose shapes do not depend on the values."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.library import (
    PARAMETERS,
    check_traced,
    constants_of,
    named,
    operator,
    own,
)
from flash_semicrf.inference.viterbi import viterbi_of_checked, viterbi_table
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.dense import table_to_dense
from flash_semicrf.problem.potentials import Potentials, accumulator_dtype
from flash_semicrf.problem.validation import check_potentials

__all__ = ["best_labels", "viterbi_labels"]


def viterbi_labels(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best segmentation of each sequence, as a label and a duration per position.

    The result of `viterbi` in a form that `torch.compile` and `torch.export` accept: no shape
    depends on the number of segments.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        As for `flash_semicrf.log_partition`.
    constraints : Constraints, optional
        Consider only segmentations that agree with known facts. Not in exported models.

    Returns
    -------
    scores : float64 Tensor of shape (B,)
        Of the best segmentations. Without gradient, as the other two.
    labels : int64 Tensor of shape (B, T)
        Label of the segment that covers each position; -1 after the end of the sequence.
    durations : int64 Tensor of shape (B, T)
        Number of positions of the segment that starts at each position; 0 where none starts.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it. A compiled or exported model raises errors of values when it runs.

    Examples
    --------
    >>> import torch
    >>> scores = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    >>> problem = Potentials(scores, torch.zeros(2, 2), torch.zeros(3, 2), torch.tensor([3]))
    >>> problem = problem.replace(start_scores=torch.full((1, 4, 2), -0.5))
    >>> _, labels, durations = viterbi_labels(problem)
    >>> labels, durations
    (tensor([[ 0,  0,  1, -1]]), tensor([[2, 0, 1, 0]]))
    """
    if torch.compiler.is_compiling() and constraints is None:
        check_traced(potentials, backend)
        given = (potentials.lengths, *constants_of(potentials))
        scores, labels, durations = best_labels(backend, *given)
        return scores, labels, durations
    scores, table = viterbi_table(potentials, backend, constraints=constraints)
    labels, durations = table_to_dense(table, *potentials.scores.shape[:2])
    return scores, labels, durations


def _best_labels(
    backend: str, lengths: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = check_potentials(named(parameters, lengths))
    scores, table = viterbi_of_checked(p, backend)
    labels, durations = table_to_dense(table, p.batch_size, p.num_positions)
    return own(scores), labels, durations


def _fake_best_labels(
    backend: str, lengths: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = named(parameters, lengths)
    labels, durations = (
        p.scores.new_empty((p.batch_size, p.num_positions), dtype=torch.int64) for _ in range(2)
    )
    scores = p.scores.new_empty((p.batch_size,), dtype=accumulator_dtype(p.device))
    return scores, labels, durations


best_labels = operator(
    f"best_labels(str backend, Tensor lengths, {PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    _best_labels,
    _fake_best_labels,
)
"""Best scores (B,), labels and durations (B, T) of a problem that is checked here."""

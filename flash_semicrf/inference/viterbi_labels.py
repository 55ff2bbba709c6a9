"""Best segmentation of each sequence, as tensors whose shapes do not depend on the values."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.operators import traced_viterbi
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.dense import table_to_dense
from flash_semicrf.problem.potentials import Potentials

__all__ = ["viterbi_labels"]


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
        return traced_viterbi(potentials, backend)
    scores, table = viterbi_table(potentials, backend, constraints=constraints)
    labels, durations = table_to_dense(table, *potentials.scores.shape[:2])
    return scores, labels, durations

"""Log of the partition function of each sequence, computed by a streaming backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.autograd import LogPartition, apply, needs_graph_of
from flash_semicrf.inference.flags import validated
from flash_semicrf.inference.operators import traced_log_partition
from flash_semicrf.problem.constraints import Constraints, constrain
from flash_semicrf.problem.flags import Validate, poisoned
from flash_semicrf.problem.potentials import NAMES, Potentials
from flash_semicrf.problem.precision import Precision, check_traced_precision
from flash_semicrf.streaming import reference
from flash_semicrf.streaming.dispatch import choose

__all__ = ["log_partition", "log_partition_of_checked"]


def log_partition(
    potentials: Potentials,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
    validate: Validate = "auto",
    precision: Precision = "auto",
) -> Tensor:
    """Log of the sum over all segmentations of exp(score).

    Parameters
    ----------
    potentials : Potentials
    backend : {"auto", "numba", "reference", ...}
        A key of `flash_semicrf.streaming.dispatch.BACKENDS`.
    constraints : Constraints, optional
        Sum only over the segmentations that agree with them. Values are then read in any case.
    validate : {"auto", "values", "shapes"}, default="auto"
        "values" reads lengths and values, and raises an error that names a bad one: a length
        outside [1, T], NaN, plus infinity. "shapes" reads nothing, so that on a GPU the call
        returns before the result is there. "auto" is "shapes" on CUDA devices, else "values".

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter; -inf, with gradient 0, if no segmentation is feasible.
        With ``validate="shapes"`` NaN, with gradient NaN, for a sequence with a bad length or value
        in it; for all of them if a value of a shared parameter is bad.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or the backend cannot run the problem; the message states the
        reason.

    Examples
    --------
    Scores of zero count segmentations: with K = 2 five of them tile four positions.

    >>> import torch
    >>> scores, lengths = torch.zeros(1, 4, 1), torch.tensor([4])
    >>> problem = Potentials(scores, torch.zeros(1, 1), torch.zeros(2, 1), lengths)
    >>> round(float(log_partition(problem).exp()), 6)
    5.0
    """
    if torch.compiler.is_compiling() and constraints is None:
        check_traced_precision(precision)
        return traced_log_partition(potentials, backend)
    p, bad = validated(potentials, backend, validate, constraints)
    return log_partition_of_checked(constrain(p, constraints), backend, bad, precision)


def log_partition_of_checked(
    p: Potentials, backend: str, bad: Tensor | None = None, precision: Precision = "auto"
) -> Tensor:
    """`log_partition` of a checked problem, NaN for sequences that are flagged as bad."""
    chosen = choose(backend, p, precision)
    if chosen.name == "reference":
        # Differentiable any number of times.
        return poisoned(reference.log_partition(p), bad)
    values = [getattr(p, name) for name in NAMES]
    if not needs_graph_of(*values):
        return poisoned(chosen.log_partition(p), bad)
    log_z: Tensor = apply(LogPartition, chosen, p.lengths, bad, *values)
    return log_z

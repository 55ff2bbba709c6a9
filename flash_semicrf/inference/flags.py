"""Validation at the public entry points: values are read, or flagged on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.flags import (
    Flagged,
    flag_values,
    reads_values,
    with_lengths_on_device,
)
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.validation import check_eager, check_form, check_potentials
from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = ["validated"]

_TRITON = TritonBackend()


def validated(
    potentials: Potentials, backend: str, validate: str, constraints: Constraints | None = None
) -> Flagged:
    """Check a problem as `flash_semicrf.problem.flags.Validate` says.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        The backend that will compute.
    validate : {"auto", "values", "shapes"}
    constraints : Constraints, optional
        With these, values are read in any case: what they do to a problem depends on values.

    Returns
    -------
    Flagged

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for `flash_semicrf.problem.validation.check_potentials`.
    """
    scores = getattr(potentials, "scores", None)
    device = scores.device if isinstance(scores, Tensor) else torch.device("cpu")
    if reads_values(validate, device) or constraints is not None:
        return Flagged(check_potentials(potentials), None)
    check_eager()
    p = check_form(potentials)
    lengths = with_lengths_on_device(p.lengths, p.num_positions, p.device)
    if lengths is not p.lengths:
        p = p.replace(lengths=lengths)
    may_run = backend == "triton" or (backend == "auto" and p.device.type == "cuda")
    if may_run and _TRITON.why_not(p) is None:
        return _TRITON.flagged(p)
    return flag_values(p)

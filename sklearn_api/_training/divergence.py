"""Numbers that leave the range of floating point in training: found, and named in one message."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_semicrf.problem.validation import extremes

__all__ = ["all_finite", "check_state", "diverged"]


def diverged(net: Any, what: str, training: bool = True) -> ValueError:
    """Error of a net whose training diverged.

    Parameters
    ----------
    net : SegmentationNet
    what : str
        What is not finite, in the singular.
    training : bool
        False where it was found in sequences that are held out.
    """
    where = "" if training else " of held-out sequences"
    return ValueError(
        f"Training diverged at epoch {len(net.history)}: {what}{where} is not finite. Lower "
        f"`learning_rate` (now {net.lr:g}) or scale `X`; large weights of samples and a large "
        f"`alpha` (now {net.alpha:g}) lengthen the steps, too."
    )


def all_finite(lengths: Tensor, *values: Tensor | None) -> bool:
    """Whether tensors (B, T, ...) are finite where they are no padding."""
    given = [value.detach() for value in values if value is not None]
    # One pass: a sum is finite only if all of its terms are. Where it is not, look closer: padding
    # may hold anything, and large terms may overflow.
    if bool(sum(value.sum() for value in given).isfinite()):
        return True
    position = torch.arange(given[0].shape[1], device=lengths.device)
    inside = position < lengths[:, None]
    return all(bool(value[inside].isfinite().all()) for value in given)


def check_state(net: Any) -> None:
    """Raise unless a net's parameters, and its optimiser's state, are finite.

    The squares of gradients that Adam keeps overflow long before gradients do, and its steps are 0
    from then on.
    """
    state = [value for kept in net.optimizer_.state.values() for value in kept.values()]
    state = [v for v in state if isinstance(v, Tensor) and v.is_floating_point() and v.dim()]
    parameters = [p.detach() for p in net.module_.parameters() if p.numel()]
    if bool(torch.nn.utils.get_total_norm([*parameters, *state], math.inf).isfinite()):
        return
    # A parameter may forbid by -inf.
    if not all(extremes(p)[1] < math.inf for p in parameters):
        raise diverged(net, "a parameter")
    if not all(bool(value.isfinite().all()) for value in state):
        raise diverged(net, "the optimiser's state")

"""Masks of allowed durations and transitions, from the arguments of the CRF heads."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flash_semicrf.problem.validation import check_data

__all__ = ["allowed_durations", "allowed_transitions"]


def allowed_durations(
    min_duration: int | Sequence[int] | Mapping[int, int], max_duration: int, num_classes: int
) -> Tensor | None:
    """Mask of the durations that minimum durations allow.

    Parameters
    ----------
    min_duration : int, sequence of C ints or dict of label to int
        Shortest duration, in positions, of all labels or of each; 1 for labels missing in a dict.
    max_duration, num_classes : int
        K and C.

    Returns
    -------
    bool Tensor of shape (K, C) or None
        Row k-1 is duration k; on the CPU. None if everything is allowed.

    Raises
    ------
    ValueError
        If a minimum is not an integer in 1..K, or a label, or the number of labels, is wrong.

    Examples
    --------
    >>> allowed_durations({1: 3}, max_duration=3, num_classes=2)
    tensor([[ True, False],
            [ True, False],
            [ True,  True]])
    """
    given: list[object]
    if isinstance(min_duration, Mapping):
        for label in min_duration:
            if label not in range(num_classes):
                raise ValueError(
                    f"`min_duration` must have keys in [0, C-1={num_classes - 1}]; got {label!r}."
                )
        given = [min_duration.get(label, 1) for label in range(num_classes)]
    elif not isinstance(min_duration, int) and hasattr(min_duration, "__len__"):
        check_data("min_duration", min_duration)
        given = min_duration.tolist() if hasattr(min_duration, "tolist") else list(min_duration)
        if len(given) != num_classes:
            raise ValueError(
                f"`min_duration` must have one entry per label, C={num_classes}; "
                f"got {len(given)} entries."
            )
    else:
        given = [min_duration] * num_classes
    shortest = []
    for label, value in enumerate(given):
        if not _is_int(value) or not 1 <= value <= max_duration:
            raise ValueError(
                f"`min_duration` must be an integer in [1, K={max_duration}]; "
                f"got {value!r} for label {label}."
            )
        shortest.append(operator.index(value))
    if max(shortest) == 1:
        return None
    # On the CPU, where a mask has data: the default device may be the meta device.
    duration = torch.arange(1, max_duration + 1, device="cpu")[:, None]
    return duration >= torch.tensor(shortest, device="cpu")


def _is_int(value: object) -> TypeGuard[int]:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def allowed_transitions(constraints: Tensor | ArrayLike | None, num_classes: int) -> Tensor | None:
    """Mask of allowed transitions, checked.

    Parameters
    ----------
    constraints : bool array-like of shape (C, C) or None
        ``[c_src, c_dst]`` is False where c_dst must not follow c_src.
    num_classes : int
        C.

    Returns
    -------
    bool Tensor of shape (C, C) or None
        A copy.

    Raises
    ------
    TypeError
        If the dtype is not bool.
    ValueError
        If the shape is wrong.
    """
    if constraints is None:
        return None
    check_data("transition_constraints", constraints)
    if isinstance(constraints, Tensor):
        allowed = constraints
    else:
        allowed = torch.as_tensor(constraints, device="cpu")
    if allowed.dtype != torch.bool:
        raise TypeError(f"`transition_constraints` must have dtype bool; got {allowed.dtype}.")
    if tuple(allowed.shape) != (num_classes, num_classes):
        raise ValueError(
            f"`transition_constraints` must have shape {(num_classes, num_classes)}; "
            f"got {tuple(allowed.shape)}."
        )
    return allowed.clone()

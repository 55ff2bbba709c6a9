"""The CRF head of a new model, and whether a model allows its training segments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flash_semicrf.duration import (
    DURATION_DISTRIBUTIONS,
    GeometricTail,
    create_duration_distribution,
)
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.nn.allowed import allowed_transitions
from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.single_positions import forbid_longer

__all__ = ["Durations", "build_head", "check_allowed", "resolve_device"]


def resolve_device(device: str) -> torch.device:
    """Device of a name; "auto" is CUDA where available.

    Raises
    ------
    ValueError
        For a name torch does not know, or a device that is not present.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be a torch device or 'auto'; got {device!r}.") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            here = "CUDA is not available here" if not count else f"there are {count} CUDA devices"
            raise ValueError(f"`device` is {device!r}, but {here}.")
        return resolved
    if resolved.type == "meta":
        raise ValueError("`device` must hold values; got 'meta', which holds shapes only.")
    try:
        torch.zeros(1, device=resolved)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` is {device!r}, which is not available here: {reason}"
        ) from error
    return resolved


class Durations(NamedTuple):
    """Parameters of `SemiCRFSegmenter` about durations."""

    duration_distribution: str | nn.Module | Callable[..., Any]
    duration_init: str
    duration_tail: str | float | None
    min_duration: int | dict[Any, int]


def build_head(
    table: SegmentTable,
    classes: np.ndarray,
    max_duration: int,
    hidden_size: int,
    options: Durations,
    *,
    transition_constraints: Any,
    boundary_scores: bool,
    single_classes: np.ndarray,
) -> SemiMarkovCRFHead:
    """Head for the labels of the training data, drawing initial weights from torch's global state.

    Parameters
    ----------
    table : SegmentTable
        Training segments; none is longer than `max_duration`, unless there is a duration tail.
    classes : ndarray of shape (C,)
    max_duration : int
    hidden_size : int
        Width of the encoder's output.
    options : Durations
    transition_constraints, boundary_scores
        Parameters of `SemiCRFSegmenter`.
    single_classes : integer array
        Classes whose segments all have duration 1.

    Returns
    -------
    SemiMarkovCRFHead
    """
    num_classes = len(classes)
    duration_distribution, duration_tail = options.duration_distribution, options.duration_tail
    # A distribution that is named starts from the training segments.
    durations = table.stop - table.start
    tail: str | float | GeometricTail | None = duration_tail
    if isinstance(duration_distribution, str) and options.duration_init == "empirical":
        distribution = DURATION_DISTRIBUTIONS[duration_distribution].from_segments(
            durations.clamp(max=max_duration), table.label, max_duration, num_classes
        )
        # The geometric distribution has its own rate.
        if duration_tail == "geometric" and duration_distribution != "geometric":
            tail = GeometricTail.from_segments(durations, table.label, max_duration, num_classes)
    else:
        distribution = create_duration_distribution(
            copy.deepcopy(duration_distribution), max_duration, num_classes
        )
    head = SemiMarkovCRFHead(
        num_classes,
        max_duration,
        hidden_size,
        duration_distribution=distribution,
        long_segments="error",
        min_duration=_min_duration(options.min_duration, max_duration, classes.tolist()),
        transition_constraints=_transitions(transition_constraints, table, num_classes),
        initial_scores=True,
        final_scores=True,
        boundary_scores=boundary_scores,
        duration_tail=tail,
    )
    forbid_longer(head, single_classes)
    return head


def _min_duration(
    given: int | dict[Any, int], max_duration: int, classes: list[Any]
) -> dict[int, int]:
    """Minimum durations with class indices for labels."""
    by_label = given if isinstance(given, dict) else dict.fromkeys(classes, given)
    for label, value in by_label.items():
        if label not in classes:
            raise ValueError(f"The labels of `min_duration` must be in {classes}; got {label!r}.")
        is_int = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_int or not 1 <= value <= max_duration:
            where = f" for label {label!r}" if isinstance(given, dict) else ""
            raise ValueError(
                f"`min_duration` must be an integer in [1, max_duration={max_duration}]; got "
                f"{value!r}{where}."
            )
    return {classes.index(label): value for label, value in by_label.items()}


def _transitions(given: Any, table: SegmentTable, num_classes: int) -> Tensor | None:
    """Boolean matrix of the transitions allowed, or None for all."""
    if given is None:
        return None
    if isinstance(given, str):
        allowed = torch.zeros(num_classes, num_classes, dtype=torch.bool)
        same = table.sequence[1:] == table.sequence[:-1]
        allowed[table.label[:-1][same], table.label[1:][same]] = True
        return allowed
    try:
        return allowed_transitions(np.asarray(given), num_classes)
    except TypeError as error:
        raise ValueError(str(error)) from error


def check_allowed(module: SegmentationModule, table: SegmentTable, classes: np.ndarray) -> None:
    """Raise if a model forbids a training segment, by its constraints or a duration of -inf.

    Parameters
    ----------
    module : SegmentationModule
    table : SegmentTable
    classes : ndarray of shape (C,)
        Names of the labels, for the message.
    """
    head = module.head
    duration = table.stop - table.start
    if head.duration_tail is not None:
        rate = head.duration_tail.detach().cpu()[table.label]
        beyond = (rate <= NEG_INF) & (duration > head.max_duration)
        if bool(beyond.any()):
            raise ValueError(
                "`duration_tail` must be above -inf for labels with segments longer than "
                f"max_duration={head.max_duration}; got {_first_segment(table, beyond, classes)}."
            )
    bias = head.duration_bias.detach().cpu()
    forbidden = bias[duration.clamp(max=head.max_duration) - 1, table.label] <= NEG_INF
    if head.allowed_transitions is not None:
        same = table.sequence[1:] == table.sequence[:-1]
        allowed = head.allowed_transitions.cpu()[table.label[:-1], table.label[1:]]
        forbidden[1:] |= same & ~allowed
    if bool(forbidden.any()):
        raise ValueError(
            "`y` must hold only segments that `min_duration`, `duration_distribution` and "
            "`transition_constraints` allow; got "
            f"{_first_segment(table, forbidden, classes)}."
        )


def _first_segment(table: SegmentTable, chosen: Tensor, classes: np.ndarray) -> str:
    """Label, place and duration of the first of the chosen segments, and the label before it."""
    n = int(chosen.nonzero()[0])
    start, stop = int(table.start[n]), int(table.stop[n])
    names = classes.tolist()
    before = f", after label {names[table.label[n - 1]]!r}" if start else ""
    return (
        f"label {names[table.label[n]]!r} at positions {start}..{stop - 1} (duration "
        f"{stop - start}{before}) in sequence {int(table.sequence[n])}"
    )

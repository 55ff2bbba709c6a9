"""From an estimator's parameters and its training data to a module and a net."""

from __future__ import annotations

import copy
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.duration import (
    DURATION_DISTRIBUTIONS,
    DurationDistribution,
    GeometricTail,
    create_duration_distribution,
)
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.nn.allowed import allowed_transitions
from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._model.single_positions import forbid_longer
from sklearn_api.encoders import Standardize, make_encoder

__all__ = ["build_module", "check_allowed", "resolve_device"]


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


def build_module(
    estimator: Any, sequences: Sequences, table: SegmentTable, max_duration: int, rng: PrivateRNG
) -> SegmentationModule:
    """Encoder and head as the estimator's parameters say, drawing initial weights from `rng`.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
        With ``classes_`` and ``n_features_in_`` set.
    sequences, table : training data
        `table` holds no segment longer than `max_duration`, unless there is a duration tail.
    max_duration : int
    rng : PrivateRNG

    Returns
    -------
    SegmentationModule
    """
    settings = {
        name: getattr(estimator, name)
        for name in ("hidden_size", "num_layers", "kernel_size", "dropout")
    }
    module_params = with_prefix(estimator, "module__")
    encoder = estimator.encoder
    standardize = None
    if isinstance(encoder, str) and encoder != "linear":
        standardize = Standardize.from_positions(sequences.values)
    with rng.use():
        module, hidden_dim = make_encoder(
            encoder, estimator.n_features_in_, settings, module_params
        )
        head = SemiMarkovCRFHead(
            len(estimator.classes_),
            max_duration,
            hidden_dim,
            duration_distribution=_durations(estimator, table, max_duration),
            long_segments="error",
            min_duration=_min_duration(estimator, max_duration),
            transition_constraints=_transitions(estimator, table),
            initial_scores=True,
            final_scores=True,
            boundary_scores=estimator.boundary_scores,
            duration_tail=_tail(estimator, table, max_duration),
        )
    forbid_longer(head, estimator._single_classes)
    return SegmentationModule(module, head, standardize).to(getattr(torch, estimator.dtype))


def with_prefix(estimator: Any, prefix: str) -> dict[str, Any]:
    params = estimator.get_params(deep=False)
    return {name[len(prefix) :]: v for name, v in params.items() if name.startswith(prefix)}


def _durations(estimator: Any, table: SegmentTable, max_duration: int) -> DurationDistribution:
    """Duration distribution, fitted to the training segments where it is named and asked for."""
    distribution = estimator.duration_distribution
    num_classes = len(estimator.classes_)
    if isinstance(distribution, str) and estimator.duration_init == "empirical":
        return DURATION_DISTRIBUTIONS[distribution].from_segments(
            (table.stop - table.start).clamp(max=max_duration),
            table.label,
            max_duration,
            num_classes,
        )
    return create_duration_distribution(copy.deepcopy(distribution), max_duration, num_classes)


def _tail(
    estimator: Any, table: SegmentTable, max_duration: int
) -> str | float | GeometricTail | None:
    """What the head takes as `duration_tail`, fitted to the training segments where that is asked.

    The geometric distribution has its own rate.
    """
    tail, distribution = estimator.duration_tail, estimator.duration_distribution
    empirical = isinstance(distribution, str) and estimator.duration_init == "empirical"
    if tail != "geometric" or not empirical or distribution == "geometric":
        return tail
    durations = table.stop - table.start
    return GeometricTail.from_segments(
        durations, table.label, max_duration, len(estimator.classes_)
    )


def _min_duration(estimator: Any, max_duration: int) -> int | dict[int, int]:
    """Minimum durations with class indices for labels."""
    given = estimator.min_duration
    classes = estimator.classes_.tolist()
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


def _transitions(estimator: Any, table: SegmentTable) -> Tensor | None:
    """Boolean matrix of the transitions allowed, or None for all."""
    given = estimator.transition_constraints
    num_classes = len(estimator.classes_)
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

"""Checks of user input, made once at the public entry points.

Every error message states the requirement, the value received and its index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_semicrf.problem.arguments import (
    check_floating_dtype,
    check_int,
    check_number,
    check_positive_int,
    check_tensor,
)
from flash_semicrf.problem.potentials import BY_SEQUENCE, NEG_INF, Potentials, ignored, score_rows
from flash_semicrf.problem.segments import SegmentTable

__all__ = [
    "DEVICE_CHECKS",
    "check_choice",
    "check_data",
    "check_eager",
    "check_columns",
    "check_finite_or_forbidden",
    "check_floating_dtype",
    "check_form",
    "check_form_of_labels",
    "check_form_of_lengths",
    "check_int",
    "check_labels",
    "check_lengths",
    "check_no_transform",
    "check_number",
    "check_positive_int",
    "check_potentials",
    "check_rows",
    "check_table",
    "check_tensor",
    "extremes",
    "forbids",
    "refuse",
    "check_gold",
]


DEVICE_CHECKS: dict[str, Callable[[Potentials], bool]] = {}
"""By type of device, a check of all values and lengths of a problem with correct shapes at once.

On a GPU, every value that is read on the host waits for the device, so one check is faster.
"""


_DURATIONS = "must have durations in [1, K={}]"


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"`{name}` must be one of {choices}; got {value!r}.")


def check_eager() -> None:
    """Raise RuntimeError under tracing, exporting or a transform of `torch.func`.

    A trace would contain the result for the example input as a constant, and a transform would not
    apply to the kernels. The functions that `torch.export` accepts do not call this while it traces
    them; see `flash_semicrf.inference.operators`.
    """
    if torch.jit._trace.is_tracing() or torch.compiler.is_exporting():
        raise RuntimeError(
            "flash_semicrf cannot be traced or exported: the result would hold the answer to the "
            "example input as a constant. Trace the encoder alone and call the CRF on its output. "
            "torch.export accepts log_partition and viterbi_labels without constraints, and of a "
            "head `forward`, `compute_loss` with labels per position, `decode` and `decode_labels`."
        )
    check_no_transform()


def check_no_transform() -> None:
    """Raise RuntimeError in a transform of `torch.func`, eager or traced."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "flash_semicrf does not support the transforms of torch.func (grad, vmap, jacrev, jvp, "
            "...): differentiate with torch.autograd.grad() or backward(), and put what vmap would "
            "map over on the batch axis."
        )


def check_data(name: str, value: object) -> None:
    """Raise ValueError for a tensor on the meta device, which has no data."""
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"`{name}` must hold data; got a tensor on the meta device.")


def extremes(value: Tensor) -> tuple[float, float]:
    """Smallest and largest entry of a tensor; NaN if any entry is NaN.

    Computed by numpy for CPU tensors: its calls on small arrays are faster than torch's.
    """
    if value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64):
        array = value.detach().numpy()
        return float(array.min()), float(array.max())
    low, high = torch.aminmax(value.detach())
    return float(low), float(high)


def check_finite_or_forbidden(name: str, value: Tensor) -> bool:
    """Whether any entry of a tensor forbids; ValueError for NaN and plus infinity.

    False for a tensor on the meta device, which has no data.
    """
    if value.numel() == 0 or value.is_meta:
        return False
    value = value.detach()
    low, high = extremes(value)
    if high < -forbids(value.dtype):
        return low <= forbids(value.dtype)
    bad = ~(value < -forbids(value.dtype))
    index = tuple(bad.nonzero()[0].tolist())
    got = float(value[index])
    wanted = f"below {-NEG_INF:g}" if math.isfinite(got) else "finite or -inf (forbidden)"
    raise ValueError(f"`{name}` must be {wanted}; got {got} at index {index}.")


@functools.cache
def forbids(dtype: torch.dtype) -> float:
    """`NEG_INF` rounded to a dtype: -9.99999968e37 in float32."""
    return float(torch.tensor(NEG_INF, dtype=dtype, device="cpu"))


def check_form_of_lengths(lengths: Tensor, batch_size: int) -> None:
    """Raise TypeError or ValueError unless `lengths` is an integer tensor of shape (B,)."""
    check_tensor("lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"`lengths` must have an integer dtype; got {lengths.dtype}.")
    if tuple(lengths.shape) != (batch_size,):
        raise ValueError(f"`lengths` must have shape ({batch_size},); got {tuple(lengths.shape)}.")


def check_lengths(lengths: Tensor, batch_size: int, num_positions: int) -> Tensor:
    """`lengths` as int64; TypeError or ValueError unless each is an integer in [1, T]."""
    check_form_of_lengths(lengths, batch_size)
    outside = (lengths < 1) | (lengths > num_positions)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"`lengths` must be in [1, T={num_positions}]; got {int(lengths[i])} at index {i}."
        )
    return lengths.long()


def check_form(potentials: Potentials) -> Potentials:
    """Problem with checked shapes, dtypes and devices; no value is read.

    Returns
    -------
    Potentials
        With half-precision parameters upcast to float32; `lengths` as they are.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for `check_potentials`, but for values.
    """
    p = potentials
    if not isinstance(p, Potentials):
        raise TypeError(f"`potentials` must be a Potentials; got {type(p).__name__}.")
    values = p.parameters()
    for name in ("scores", "transition", "duration_bias"):
        check_tensor(name, values.get(name))
    for name, value in values.items():
        check_tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"`{name}` must have a floating-point dtype; got {value.dtype}.")
    _check_shapes(p)
    check_data("scores", p.scores)
    device = p.device
    for name, value in values.items():
        if value.device != device:
            raise ValueError(
                f"`{name}` must be on the device of `scores`, {device}; got {value.device}."
            )
    check_form_of_lengths(p.lengths, p.batch_size)
    narrow = {n: v.float() for n, v in values.items() if v.itemsize < 4}
    return p.replace(**narrow) if narrow else p


def check_potentials(potentials: Potentials) -> Potentials:
    """Problem with checked shapes, dtypes, devices and values.

    Returns
    -------
    Potentials
        With `lengths` as int64 on the device of the scores, -inf for every value that forbids, and
        half-precision parameters upcast to float32.

    Raises
    ------
    TypeError
        If `potentials` is no Potentials, or a parameter no floating-point tensor.
    ValueError
        If a shape, device or length is wrong, or a value is NaN or plus infinity; the message names
        the argument and the index.
    RuntimeError
        Under `torch.jit.trace` and in transforms of `torch.func`; see `check_eager`.
    """
    check_eager()
    narrow = check_form(potentials)
    p, device = potentials, potentials.device
    allowed = DEVICE_CHECKS.get(device.type)
    if allowed is not None and p.lengths.device == device:
        checked = narrow.replace(lengths=p.lengths.long())
        if allowed(checked):
            return checked
    lengths = check_lengths(p.lengths, p.batch_size, p.num_positions).to(device)
    changed = {}
    for name, value in p.parameters().items():
        shown = value
        if name in BY_SEQUENCE:
            # Whatever these entries hold.
            shown = value.detach().masked_fill(ignored(p.replace(lengths=lengths), name), 0.0)
        if check_finite_or_forbidden(name, shown):
            # Compared in its own dtype: NEG_INF as a float32 is above NEG_INF as a float64.
            changed[name] = value = value.masked_fill(value <= NEG_INF, -math.inf)
        if value.itemsize < 4:
            changed[name] = value.float()
    return p.replace(lengths=lengths, **changed)


def _check_shapes(p: Potentials) -> None:
    if p.scores.dim() != 3 or 0 in p.scores.shape:
        raise ValueError(
            f"`scores` must have shape (B, T, C), each >= 1; got {tuple(p.scores.shape)}."
        )
    num_labels = p.num_labels
    bias = tuple(p.duration_bias.shape)
    if len(bias) != 2 or bias[0] < 1 or bias[1] != num_labels:
        raise ValueError(
            f"`duration_bias` must have shape (K, C={num_labels}) with K >= 1; got {bias}."
        )
    square = (num_labels, num_labels)
    if tuple(p.transition.shape) not in (square, (bias[0], *square)):
        raise ValueError(
            f"`transition` must have shape {square} or {(bias[0], *square)}; "
            f"got {tuple(p.transition.shape)}."
        )
    first = p.initial_scores
    by_duration = p.transition.dim() == 3 and first is not None and first.dim() == 2
    expected = {
        "start_scores": tuple(p.scores.shape),
        "end_scores": tuple(p.scores.shape),
        "initial_scores": bias if by_duration else (num_labels,),
        "final_scores": (num_labels,),
        "duration_tail": (num_labels,),
        "segment_scores": (*p.scores.shape[:2], *bias),
        "transition_scores": (*p.scores.shape[:2], *square),
    }
    for name, shape in expected.items():
        value = getattr(p, name)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}; got {tuple(value.shape)}.")


def check_labels(
    labels: Tensor,
    lengths: Tensor,
    num_positions: int,
    num_labels: int,
    ignore_index: int | None = None,
) -> None:
    """Raise an error unless `labels` (B, T) holds integers in 0..C-1 or `ignore_index`.

    Entries at and after `lengths` are not checked.

    Raises
    ------
    TypeError, ValueError
        Naming the requirement, the value and its index.
    """
    check_form_of_labels(labels, (len(lengths), num_positions))
    inside = torch.arange(num_positions, device=labels.device) < lengths.to(labels.device)[:, None]
    outside = inside & ((labels < 0) | (labels >= num_labels))
    if ignore_index is not None:
        check_int("ignore_index", ignore_index)
        outside &= labels != ignore_index
    if bool(outside.any()):
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"`labels` must be in [0, C-1={num_labels - 1}]; got {int(labels[index])} at "
            f"index {index}."
        )


def check_form_of_labels(labels: Tensor, shape: tuple[int, int]) -> None:
    """Raise TypeError or ValueError unless `labels` is an integer tensor of a shape (B, T)."""
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must have an integer dtype; got {labels.dtype}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"`labels` must have shape {shape}; got {tuple(labels.shape)}.")


def check_columns(table: SegmentTable, device: torch.device | None, name: str = "table") -> None:
    """Raise unless `table` has int64 columns of one length, on `device` unless that is None.

    Raises
    ------
    TypeError, ValueError
        Naming the column.
    """
    if not isinstance(table, SegmentTable):
        raise TypeError(f"`{name}` must be a SegmentTable; got {type(table).__name__}.")
    for column, value in table._asdict().items():
        check_tensor(f"{name}.{column}", value)
        if value.dtype != torch.int64:
            raise TypeError(f"`{name}.{column}` must have dtype int64; got {value.dtype}.")
        if tuple(value.shape) != (table.sequence.numel(),):
            raise ValueError(
                f"The columns of `{name}` must have one shape (N,); got "
                f"{tuple(table.sequence.shape)} for `sequence` and {tuple(value.shape)} for "
                f"`{column}`."
            )
        if device is not None and value.device != device:
            raise ValueError(
                f"`{name}.{column}` must be on the device of the scores, {device}; "
                f"got {value.device}."
            )


def check_rows(table: SegmentTable, potentials: Potentials) -> None:
    """Raise unless each row of `table` is a segment of allowed duration inside its sequence.

    Unlike for `check_table`, the rows need not tile the sequences.

    Raises
    ------
    TypeError, ValueError
        Naming the first invalid row.
    """
    p = potentials
    check_columns(table, p.device)
    sequence, start, stop, label = table
    known = (sequence >= 0) & (sequence < p.batch_size)
    duration = stop - start
    problems = {
        f"must have sequences in [0, B-1={p.batch_size - 1}]": ~known,
        _DURATIONS.format(p.max_duration): _wrong_durations(p, duration, label),
        f"must have labels in [0, C-1={p.num_labels - 1}]": (label < 0) | (label >= p.num_labels),
        "must lie inside their sequence": (start < 0)
        | (stop > p.lengths[torch.where(known, sequence, 0)]),
    }
    refuse(problems, table)


def _wrong_durations(p: Potentials, duration: Tensor, label: Tensor) -> Tensor:
    """Mask of rows for whose duration the model has no score."""
    too_long = duration > p.max_duration
    if p.unlimited is not None:
        too_long &= ~p.unlimited[label.clamp(0, p.num_labels - 1)]
    return (duration < 1) | too_long


def check_table(table: SegmentTable, potentials: Potentials) -> None:
    """Raise unless the rows of `table` tile every sequence of `potentials` with valid segments.

    Raises
    ------
    TypeError, ValueError
        Naming the first invalid row.
    """
    p = potentials
    check_columns(table, p.device)
    sequence, start, stop, label = table
    count = torch.bincount(sequence, minlength=p.batch_size)
    if len(count) != p.batch_size or bool((count == 0).any()):
        raise ValueError(
            f"`table` must hold segments of each of the {p.batch_size} sequences; it holds those "
            f"of {sorted(set(sequence.tolist()))}."
        )
    duration = stop - start
    first = torch.ones_like(start, dtype=torch.bool)
    first[1:] = sequence[1:] != sequence[:-1]
    expected_start = torch.where(first, 0, torch.roll(stop, 1))
    is_last = torch.roll(first, -1)
    problems = {
        _DURATIONS.format(p.max_duration): _wrong_durations(p, duration, label),
        f"must have labels in [0, C-1={p.num_labels - 1}]": (label < 0) | (label >= p.num_labels),
        "must tile each sequence without gap or overlap": (start != expected_start)
        | (is_last & (stop != p.lengths[sequence])),
    }
    refuse(problems, table)


def refuse(problems: dict[str, Tensor], table: SegmentTable, name: str = "Segments") -> None:
    """Raise ValueError for the first row that violates a requirement.

    Parameters
    ----------
    problems : dict of str to bool Tensor of shape (N,)
        By requirement ("must ..."), the rows that violate it.
    table : SegmentTable
    name : str, default="Segments"
        Name of the rows in the message.

    Raises
    ------
    ValueError
        If a row violates a requirement; the message names the segment.
    """
    for requirement, bad in problems.items():
        if bool(bad.any()):
            sequence, start, stop, label = (int(column[bad][0]) for column in table)
            raise ValueError(
                f"{name} {requirement}; got [{start}, {stop}) with label {label} in sequence "
                f"{sequence}."
            )


def check_gold(gold: Tensor, problem: Potentials, table: SegmentTable) -> None:
    """Raise ValueError if a gold segmentation is forbidden, as its loss would be infinite.

    Parameters
    ----------
    gold : Tensor of shape (B,)
        Scores of the gold segmentations.
    problem : Potentials
    table : SegmentTable
        The gold segments.

    Raises
    ------
    ValueError
        If the score of a sequence is -inf; the message names its first forbidden segment.
    """
    forbidden = gold.detach() <= NEG_INF
    if not bool(forbidden.any()):
        return
    index = int(forbidden.nonzero()[0])
    rows = score_rows(problem, table).detach()
    row = int(((rows <= NEG_INF) & (table.sequence == index)).nonzero()[0])
    start, stop = int(table.start[row]), int(table.stop[row])
    raise ValueError(
        "`labels` must be a segmentation that the model allows; in sequence "
        f"{index} the segment at positions {start}..{stop - 1} with label "
        f"{int(table.label[row])}, duration {stop - start}, has score -inf (check transition "
        "constraints, minimum durations and scores of -inf)."
    )

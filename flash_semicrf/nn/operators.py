"""Operators of PyTorch for what a head reads on the host: its input, and the gold labels.

``torch.ops.flash_semicrf``:

    checked_input       hidden states with zeros as padding, and lengths
    gold_labels         labels and durations per position of gold labels
    checked_gold        scores of the gold segmentations

In compiled and exported models they raise the errors that the head otherwise raises; see
`flash_semicrf.inference.operators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_semicrf.inference.autograd import named
from flash_semicrf.inference.operators import PARAMETERS, TAGS
from flash_semicrf.nn.inputs import blank_padding
from flash_semicrf.problem.dense import dense_to_table, score_dense, table_to_dense
from flash_semicrf.problem.potentials import NAMES, Potentials
from flash_semicrf.problem.segments import LongSegments, labels_to_table
from flash_semicrf.problem.validation import check_gold, check_labels

__all__ = ["checked_gold", "checked_input", "gold_labels", "traced_gold_score"]


@torch.library.custom_op("flash_semicrf::checked_input", mutates_args=(), tags=TAGS)
def checked_input(hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`flash_semicrf.nn.inputs.blank_padding`: new tensors (B, T, D) and (B,)."""
    blank, checked = blank_padding(hidden, lengths)
    blank = blank.clone() if blank is hidden else blank
    checked = checked.clone() if checked is lengths else checked
    return blank.contiguous(), checked.contiguous()


@checked_input.register_fake
def _(hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    long = hidden.new_empty(lengths.shape, dtype=torch.int64)
    return hidden.new_empty(hidden.shape), long


def _setup_input(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward_input(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None]:
    (lengths,) = ctx.saved_tensors
    padding = torch.arange(upstream.shape[1], device=upstream.device) >= lengths[:, None]
    return upstream.masked_fill(padding[..., None], 0.0), None


checked_input.register_autograd(_backward_input, setup_context=_setup_input)


@torch.library.custom_op("flash_semicrf::gold_labels", mutates_args=(), tags=TAGS)
def gold_labels(
    labels: Tensor,
    lengths: Tensor,
    unlimited: Tensor | None,
    num_labels: int,
    max_duration: int,
    long_segments: str,
) -> tuple[Tensor, Tensor]:
    """Labels and durations (B, T) of the maximal runs of checked labels (B, T).

    The other arguments are those of `flash_semicrf.problem.segments.labels_to_table`.
    """
    check_labels(labels, lengths, labels.shape[1], num_labels)
    treatment: LongSegments = "error" if long_segments == "error" else "split"
    table = labels_to_table(labels, lengths, max_duration, treatment, unlimited)
    return table_to_dense(table, labels.shape[0], labels.shape[1])


@gold_labels.register_fake
def _(
    labels: Tensor,
    lengths: Tensor,
    unlimited: Tensor | None,
    num_labels: int,
    max_duration: int,
    long_segments: str,
) -> tuple[Tensor, Tensor]:
    found, durations = (labels.new_empty(labels.shape, dtype=torch.int64) for _ in range(2))
    return found, durations


@torch.library.custom_op(
    "flash_semicrf::checked_gold",
    mutates_args=(),
    tags=TAGS,
    schema="(Tensor gold, Tensor labels, Tensor durations, Tensor lengths, "
    f"{PARAMETERS}) -> Tensor",
)
def checked_gold(
    gold: Tensor, labels: Tensor, durations: Tensor, lengths: Tensor, *parameters: Tensor | None
) -> Tensor:
    """Copy of the scores (B,) of gold segmentations; ValueError if the problem forbids one."""
    check_gold(gold, named(parameters, lengths), dense_to_table(labels, durations))
    return gold.clone()


@checked_gold.register_fake
def _(
    gold: Tensor, labels: Tensor, durations: Tensor, lengths: Tensor, *parameters: Tensor | None
) -> Tensor:
    return torch.empty_like(gold)


def _backward_gold(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return (upstream, None, None, None, *(None for _ in NAMES))


checked_gold.register_autograd(_backward_gold)


def traced_gold_score(problem: Potentials, labels: Tensor, long_segments: LongSegments) -> Tensor:
    """Scores of gold labels, in a model that is being compiled or exported.

    Parameters
    ----------
    problem : Potentials
    labels : integer Tensor of shape (B, T)
        Of checked form.
    long_segments : {"split", "error"}

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter.

    Raises
    ------
    ValueError
        When the program runs, if a label is out of range or the problem forbids a segmentation.
    """
    p = problem
    limits = (p.num_labels, p.max_duration, long_segments)
    found, durations = gold_labels(labels, p.lengths, p.unlimited, *limits)
    gold = score_dense(p, found, durations)
    parameters = [getattr(p, name) for name in NAMES]
    checked: Tensor = checked_gold(gold, found, durations, p.lengths, *parameters)
    return checked

"""Operators of PyTorch for what a head reads on the host: its input, and the gold labels.

``torch.ops.flash_semicrf``:

    checked_lengths     lengths of hidden states
    gold_labels         labels and durations per position of gold labels
    checked_gold        nothing, for gold segmentations that are allowed

They take the place of reads in compiled and exported models, and raise the errors that the head
otherwise raises; none has a gradient. See `flash_semicrf.inference.library`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.library import PARAMETERS, constants_of, named, operator
from flash_semicrf.nn.inputs import blank_padding
from flash_semicrf.problem.dense import dense_to_table, score_dense, table_to_dense
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import LongSegments, labels_to_table
from flash_semicrf.problem.validation import check_gold, check_labels

__all__ = ["checked_gold", "checked_lengths", "gold_labels", "traced_gold_score"]


def _checked_lengths(hidden: Tensor, lengths: Tensor) -> Tensor:
    _, checked = blank_padding(hidden, lengths)
    return checked.clone() if checked is lengths else checked


def _fake_checked_lengths(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden.new_empty(lengths.shape, dtype=torch.int64)


def _gold_labels(
    labels: Tensor,
    lengths: Tensor,
    unlimited: Tensor | None,
    num_labels: int,
    max_duration: int,
    long_segments: str,
) -> tuple[Tensor, Tensor]:
    check_labels(labels, lengths, labels.shape[1], num_labels)
    treatment: LongSegments = "error" if long_segments == "error" else "split"
    table = labels_to_table(labels, lengths, max_duration, treatment, unlimited)
    return table_to_dense(table, labels.shape[0], labels.shape[1])


def _fake_gold_labels(
    labels: Tensor,
    lengths: Tensor,
    unlimited: Tensor | None,
    num_labels: int,
    max_duration: int,
    long_segments: str,
) -> tuple[Tensor, Tensor]:
    found, durations = (labels.new_empty(labels.shape, dtype=torch.int64) for _ in range(2))
    return found, durations


def _checked_gold(
    gold: Tensor, labels: Tensor, durations: Tensor, lengths: Tensor, *parameters: Tensor | None
) -> Tensor:
    check_gold(gold, named(parameters, lengths), dense_to_table(labels, durations))
    return torch.zeros_like(gold)


def _fake_checked_gold(gold: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(gold)


checked_lengths = operator(
    "checked_lengths(Tensor hidden, Tensor lengths) -> Tensor",
    _checked_lengths,
    _fake_checked_lengths,
)
"""Lengths (B,), int64, of hidden states (B, T, D) whose values are checked inside them."""

gold_labels = operator(
    "gold_labels(Tensor labels, Tensor lengths, Tensor? unlimited, int num_labels, "
    "int max_duration, str long_segments) -> (Tensor, Tensor)",
    _gold_labels,
    _fake_gold_labels,
)
"""Labels and durations (B, T) of the maximal runs of checked labels (B, T).

The other arguments are those of `flash_semicrf.problem.segments.labels_to_table`."""

checked_gold = operator(
    f"checked_gold(Tensor gold, Tensor labels, Tensor durations, Tensor lengths, {PARAMETERS}) "
    "-> Tensor",
    _checked_gold,
    _fake_checked_gold,
)
"""Zeros (B,), to be added to the scores of gold segmentations; ValueError if the problem forbids
one."""


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
    given = (found, durations, p.lengths, *constants_of(p))
    checked: Tensor = gold + checked_gold(gold.detach(), *given)
    return checked

"""The loss of the head: the negative log-likelihood of what is known about segmentations."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.partial import partial_score
from flash_semicrf.nn.inputs import full_precision
from flash_semicrf.nn.operators import traced_gold_score
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.flags import Validate, poisoned, reads_values
from flash_semicrf.problem.gold import score_labels
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import LongSegments, SegmentTable, labels_to_table
from flash_semicrf.problem.validation import (
    check_choice,
    check_eager,
    check_form_of_labels,
    check_gold,
    check_labels,
    check_lengths,
    check_table,
)

__all__ = ["LossMixin", "Reduction"]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""Reduction of a loss over sequences."""


class LossMixin:
    """Methods of the head that compare its problem with labels."""

    num_classes: int
    max_duration: int
    long_segments: LongSegments
    validate: Validate
    _prepare: Any  # see `flash_semicrf.nn.decoding.DecodingMixin`, as for the other
    _run: Any

    @accepts_use_triton(3)
    def compute_loss(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        labels: Tensor | SegmentTable | Constraints,
        backend: str = "auto",
        reduction: Reduction = "mean",
        *,
        ignore_index: int | None = None,
    ) -> Tensor:
        """Compute the negative log-likelihood of gold segmentations or of known facts about them.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        labels : integer Tensor of shape (B, T), SegmentTable or Constraints
            Labels per position, whose maximal runs are the segments (entries at and after
            ``lengths`` are ignored); or the segments themselves, of which neighbours may have the
            same label; or other known facts (`flash_semicrf.Constraints`).
        reduction : {"mean", "sum", "none"}, default="mean"
            Over sequences.
        ignore_index : int, optional
            Value of unknown labels per position. A sequence with unknown labels is scored by the
            probability of all segmentations that agree with its known labels, as defined by
            `flash_semicrf.Constraints.from_labels`.

        Returns
        -------
        float64 Tensor of shape () or (B,)
            >= 0, in nats.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, or the model forbids the gold segmentation of a sequence, or
            all segmentations that agree with the known facts about it.
        """
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        with full_precision(hidden_states):
            _, problem, _, backend = self._prepare(hidden_states, lengths, backend)
            reads = reads_values(self.validate, problem.device) or backend in EDGE_BACKENDS
            reads = reads or torch.compiler.is_compiling()
            if not reads and isinstance(labels, Tensor) and ignore_index is None:
                return _reduced(self._loss_without_reads(labels, problem, backend), reduction)
            gold = self._gold_score(labels, problem, backend, ignore_index)
            loss = self._run(log_partition, problem, backend) - gold
        return _reduced(loss, reduction)

    def _loss_without_reads(self, labels: Tensor, problem: Potentials, backend: str) -> Tensor:
        """Loss of each sequence, NaN where a label, a length or a value is bad."""
        self._check_form_of_labels(labels, problem)
        score, forbidden, wrong = score_labels(problem, labels, self.long_segments)
        loss: Tensor = self._run(log_partition, problem, backend) - score
        return poisoned(poisoned(loss, forbidden, torch.inf), wrong | loss.isnan())

    def _gold_score(
        self,
        labels: Tensor | SegmentTable | Constraints,
        problem: Potentials,
        backend: str,
        ignore_index: int | None,
    ) -> Tensor:
        """Log of the sum of exp(score) over the segmentations that agree with the labels, (B,)."""
        if torch.compiler.is_compiling():
            if isinstance(labels, Tensor) and ignore_index is None:
                self._check_form_of_labels(labels, problem)
                return traced_gold_score(problem, labels, self.long_segments)
            check_eager()
        if not reads_values(self.validate, problem.device):  # nor the lengths, so far
            check_lengths(problem.lengths, problem.batch_size, problem.num_positions)
        if isinstance(labels, Constraints) or (
            isinstance(labels, Tensor) and ignore_index is not None
        ):
            long = self.long_segments
            # The sum over what agrees is as exact without an edge tensor.
            streaming = "auto" if backend in EDGE_BACKENDS else backend
            return partial_score(problem, labels, ignore_index, long, streaming)
        table = self._gold(labels, problem)
        gold = score_segments(problem, table)
        check_gold(gold, problem, table)
        return gold

    def _gold(self, labels: Tensor | SegmentTable, problem: Potentials) -> SegmentTable:
        if isinstance(labels, SegmentTable):
            check_table(labels, problem)
            return labels
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"`labels` must be a Tensor or a SegmentTable; got {type(labels).__name__}."
            )
        self._check_form_of_labels(labels, problem)
        check_labels(labels, problem.lengths, problem.num_positions, self.num_classes)
        limits = (self.max_duration, self.long_segments, problem.unlimited)
        return labels_to_table(labels, problem.lengths, *limits)

    def _check_form_of_labels(self, labels: Tensor, problem: Potentials) -> None:
        check_form_of_labels(labels, (problem.batch_size, problem.num_positions))
        if labels.device != problem.device:
            raise ValueError(
                f"`labels` must be on the device of `hidden_states`, {problem.device}; "
                f"got {labels.device}."
            )


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()

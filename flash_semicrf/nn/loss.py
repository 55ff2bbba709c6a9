"""The loss of the head: the negative log-likelihood of what is known, or another objective."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.partial import partial_score
from flash_semicrf.nn.inputs import full_precision
from flash_semicrf.nn.objectives import (
    LOSSES,
    Loss,
    boundary_loss,
    marginal_loss,
    softmax_margin_loss,
)
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
    check_number,
    check_table,
    check_tensor,
)

__all__ = ["LossMixin", "Reduction"]

Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""Reduction of a loss over sequences."""


class LossMixin:
    """Methods of the head that compare its problem with labels."""

    num_classes: int
    max_duration: int
    long_segments: LongSegments
    loss: Loss
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
        loss: Loss | None = None,
        weight: Tensor | None = None,
        cost: Tensor | float = 1.0,
        focus: float = 2.0,
    ) -> Tensor:
        """Compute the loss of gold segmentations: by default their negative log-likelihood.

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
        loss : {"likelihood", "marginal", "boundary", "softmax_margin", "focal"}, optional
            By default that of the head. "likelihood" is of the whole segmentation, and the only one
            that takes facts and unknown labels. The others are defined in
            `flash_semicrf.nn.objectives`.
        weight : Tensor of shape (B, T), optional
            Weights >= 0 of positions, for the losses that are sums over positions: not for
            "likelihood".
        cost : float or Tensor of shape (C, C), default=1.0
            ``cost[true, predicted]`` of a position, for "softmax_margin".
        focus : float, default=2.0
            By how much "focal" looks away from positions that are right already.

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
        chosen = self.loss if loss is None else loss
        check_choice("loss", chosen, LOSSES)
        if chosen != "likelihood":
            options = {"weight": weight, "cost": cost, "focus": focus}
            each = self._other_loss(chosen, hidden_states, lengths, labels, backend, options)
            return _reduced(each, reduction)
        if weight is not None:
            raise ValueError(
                '`weight` weighs positions: loss="likelihood", which is of whole segmentations, '
                'takes none. Use loss="marginal", or reduction="none" to weigh sequences.'
            )
        with full_precision(hidden_states):
            _, problem, _, backend = self._prepare(hidden_states, lengths, backend)
            reads = reads_values(self.validate, problem.device) or backend in EDGE_BACKENDS
            reads = reads or torch.compiler.is_compiling()
            if not reads and isinstance(labels, Tensor) and ignore_index is None:
                return _reduced(self._loss_without_reads(labels, problem, backend), reduction)
            gold = self._gold_score(labels, problem, backend, ignore_index)
            each = self._run(log_partition, problem, backend) - gold
        return _reduced(each, reduction)

    def _other_loss(
        self,
        loss: Loss,
        hidden_states: Tensor,
        lengths: Tensor,
        labels: Tensor | SegmentTable | Constraints,
        backend: str,
        options: dict[str, Any],
    ) -> Tensor:
        """A loss (B,) that needs the gold segments themselves, and values that are read."""
        if torch.compiler.is_compiling():
            check_eager()
        if isinstance(labels, Constraints):
            raise TypeError(f'loss="{loss}" needs labels or segments; got Constraints.')
        with full_precision(hidden_states):
            _, problem, _, backend = self._prepare(hidden_states, lengths, backend)
            if backend in EDGE_BACKENDS:
                backend = "auto"  # as exact, without an edge tensor
            check_lengths(problem.lengths, problem.batch_size, problem.num_positions)
            gold, weight = self._gold(labels, problem), options["weight"]
            check_gold(score_segments(problem, gold), problem, gold)
            if weight is not None:
                _check_weight(weight, problem)
            if loss == "boundary":
                return boundary_loss(problem, gold, weight, backend=backend)
            if loss == "softmax_margin":
                cost = _checked_cost(options["cost"], problem)
                return softmax_margin_loss(problem, gold, cost, weight, backend=backend)
            focus = check_number("focus", options["focus"], zero=True) if loss == "focal" else 0.0
            return marginal_loss(problem, gold, weight, focus=focus, backend=backend)

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


def _check_weight(weight: Tensor, problem: Potentials) -> None:
    shape = (problem.batch_size, problem.num_positions)
    check_tensor("weight", weight)
    if tuple(weight.shape) != shape or weight.device != problem.device:
        raise ValueError(
            f"`weight` must have shape {shape} on {problem.device}; got {tuple(weight.shape)} on "
            f"{weight.device}."
        )
    if bool((~(weight >= 0) | weight.isinf()).any()):
        raise ValueError("`weight` must be finite and >= 0.")


def _checked_cost(cost: Tensor | float, problem: Potentials) -> Tensor:
    """Costs (C, C), or a number, as a tensor on the problem's device."""
    labels = (problem.num_labels, problem.num_labels)
    costs = torch.as_tensor(cost, dtype=problem.dtype, device=problem.device)
    if tuple(costs.shape) not in ((), labels):
        raise ValueError(f"`cost` must be a number or have shape {labels}; got {costs.shape}.")
    if bool((~(costs >= 0) | costs.isinf()).any()):
        raise ValueError("`cost` must be finite and >= 0.")
    return costs


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()

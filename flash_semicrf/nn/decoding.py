"""Decoding and marginals of `flash_semicrf.nn.SemiMarkovCRFHead`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.exact import inference as edge_inference
from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.inference.viterbi_labels import viterbi_labels
from flash_semicrf.nn.inputs import check_traceback_length, full_precision
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.dense import score_dense, table_to_dense
from flash_semicrf.problem.flags import Validate, poisoned, reads_values
from flash_semicrf.problem.potentials import Potentials, score_rows, score_segments
from flash_semicrf.problem.precision import Precision
from flash_semicrf.problem.segments import ViterbiResult, table_to_segments

__all__ = ["DecodingMixin"]

Result = TypeVar("Result")

_OF_ANY_PRECISION = (log_partition, segment_marginals)


class DecodingMixin:
    """Methods of the head that use its problem and no labels."""

    edge_memory_threshold: float
    validate: Validate
    precision: Precision

    def _prepare(
        self, hidden_states: Tensor, lengths: Tensor, backend: str
    ) -> tuple[Potentials, Potentials, Tensor, str]:
        """Problem, centred problem, its offset, and name of the backend."""
        raise NotImplementedError

    @accepts_use_triton(2)
    def decode(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
        *,
        constraints: Constraints | None = None,
    ) -> Tensor:
        """Score of the best segmentation of each sequence.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        constraints : Constraints, optional
            Consider only segmentations that agree with known facts.

        Returns
        -------
        float64 Tensor of shape (B,)
            Differentiable along the best segmentation.

        Raises
        ------
        ValueError
            If an argument is invalid, or a sequence has no feasible segmentation.
        """
        with full_precision(hidden_states):
            problem, centered, _, backend = self._prepare(hidden_states, lengths, backend)
            if _is_traced(backend, constraints):
                _, labels, durations = viterbi_labels(centered, backend)
                return score_dense(problem, labels, durations)
            best, table = self._run(viterbi_table, centered, backend, constraints)
            score = score_segments(problem, table)
            # Bad sequences have no segments, whose scores would add up to 0.
            reads = reads_values(self.validate, problem.device)
            return poisoned(score, None if reads else best.isnan())

    @accepts_use_triton(2)
    def decode_labels(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
        *,
        constraints: Constraints | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best segmentation of each sequence, as a label and a duration per position.

        The result of `decode_with_traceback` in a form that `torch.compile` and `torch.export`
        accept.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        constraints : Constraints, optional
            Consider only segmentations that agree with known facts. Not in exported models.

        Returns
        -------
        scores : float64 Tensor of shape (B,)
            Of the best segmentations. Without gradient, as the other two.
        labels : int64 Tensor of shape (B, T)
            Label of the segment that covers each position; -1 after the end of the sequence.
        durations : int64 Tensor of shape (B, T)
            Number of positions of the segment that starts at each position; 0 where none starts.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, or a sequence has no feasible segmentation.
        """
        with _no_graph(), full_precision(hidden_states):
            _, centered, offset, backend = self._prepare(hidden_states, lengths, backend)
            if _is_traced(backend, constraints):
                scores, labels, durations = viterbi_labels(centered, backend)
            else:
                scores, table = self._run(viterbi_table, centered, backend, constraints)
                labels, durations = table_to_dense(table, *centered.scores.shape[:2])
            return scores + offset, labels, durations

    @accepts_use_triton(3)
    def decode_with_traceback(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        max_traceback_length: int | None = None,
        backend: str = "auto",
        *,
        constraints: Constraints | None = None,
    ) -> ViterbiResult:
        """Best segmentation of each sequence, with its segments.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        max_traceback_length : int, optional
            Raise ValueError for sequences longer than this, in positions. Decoding itself has no
            limit.
        constraints : Constraints, optional
            Consider only segmentations that agree with known facts.

        Returns
        -------
        ViterbiResult
            Scores and segments; the scores of a sequence's segments sum to its score.

        Raises
        ------
        ValueError
            If a sequence has no feasible segmentation, or is longer than the limit.
        """
        with torch.no_grad(), full_precision(hidden_states):
            prepared = self._prepare(hidden_states, lengths, backend)
            problem, centered, offset, backend = prepared
            check_traceback_length(max_traceback_length, problem.lengths)
            scores, table = self._run(viterbi_table, centered, backend, constraints)
            # Segment scores are those of the model, not of the centred problem.
            rows = score_rows(problem, table)
            segments = table_to_segments(table, problem.batch_size, rows)
            return ViterbiResult(scores + offset, segments)

    @accepts_use_triton(2)
    def marginals(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
        *,
        constraints: Constraints | None = None,
    ) -> SegmentMarginals:
        """Posterior marginals of each sequence.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        constraints : Constraints, optional
            Condition on known facts.

        Returns
        -------
        SegmentMarginals
            Probabilities that a position lies in, starts or ends a segment of label c, each of
            shape (B, T, C); expected counts of transitions and durations. Without gradient.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid.
        """
        with torch.no_grad(), full_precision(hidden_states):
            problem, _, _, backend = self._prepare(hidden_states, lengths, backend)
            return self._run(segment_marginals, problem, backend, constraints)

    def _run(
        self,
        entry: Callable[..., Result],
        problem: Potentials,
        backend: str,
        constraints: Constraints | None = None,
    ) -> Result:
        """Call a streaming entry point, or its namesake for the edge tensor."""
        if backend not in EDGE_BACKENDS:
            options: dict[str, str] = {"validate": self.validate}
            if entry in _OF_ANY_PRECISION:
                options["precision"] = self.precision
            return entry(problem, backend, constraints=constraints, **options)
        twin: Callable[..., Result] = getattr(edge_inference, entry.__name__)
        return twin(problem, backend, self.edge_memory_threshold, constraints=constraints)


def _no_graph() -> contextlib.AbstractContextManager[object]:
    """`torch.no_grad`; nothing in traces, where it would stay in force after an error."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.no_grad()


def _is_traced(backend: str, constraints: Constraints | None) -> bool:
    """Whether a call is being compiled or exported, and operators can take its place."""
    return torch.compiler.is_compiling() and constraints is None and backend not in EDGE_BACKENDS

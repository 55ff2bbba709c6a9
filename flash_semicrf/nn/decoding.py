"""Decoding and marginals of `flash_semicrf.nn.SemiMarkovCRFHead`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.exact import inference as edge_inference
from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.nn.inputs import check_traceback_length, full_precision
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.flags import Validate, poisoned, reads_values
from flash_semicrf.problem.potentials import Potentials, score_rows, score_segments
from flash_semicrf.problem.segments import ViterbiResult, table_to_segments

__all__ = ["DecodingMixin"]

Result = TypeVar("Result")


class DecodingMixin:
    """Methods of the head that use its problem and no labels."""

    edge_memory_threshold: float
    validate: Validate

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
            best, table = self._run(viterbi_table, centered, backend, constraints)
            score = score_segments(problem, table)
            # Bad sequences have no segments, whose scores would add up to 0.
            reads = reads_values(self.validate, problem.device)
            return poisoned(score, None if reads else best.isnan())

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
            return entry(problem, backend, constraints=constraints, validate=self.validate)
        twin: Callable[..., Result] = getattr(edge_inference, entry.__name__)
        return twin(problem, backend, self.edge_memory_threshold, constraints=constraints)

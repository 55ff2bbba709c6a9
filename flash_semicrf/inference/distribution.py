"""The distribution over segmentations as a `torch.distributions.Distribution`.

A batch of sequences is a batch of distributions; an event is the segmentation of one sequence.
Everything with a tensor form keeps the usual contract (`log_prob`, `entropy`, `batch_shape`, the
registered `torch.distributions.kl_divergence`); segmentations are passed as
`flash_semicrf.problem.segments.SegmentTable`, or as lists of `Segment`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from flash_semicrf.inference import information
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.nbest import NBestResult, n_best
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi
from flash_semicrf.problem.constraints import Constraints, constrain, unfold_table
from flash_semicrf.problem.potentials import Potentials, score_rows
from flash_semicrf.problem.segments import (
    Segment,
    SegmentTable,
    ViterbiResult,
    labels_to_table,
    segments_to_table,
)
from flash_semicrf.problem.validation import (
    check_columns,
    check_labels,
    check_positive_int,
    check_potentials,
    check_table,
)

__all__ = ["SemiCRFDistribution"]


class SemiCRFDistribution(Distribution):
    """Distribution over the segmentations of each sequence of a batch.

    P(segmentation) = exp(score - log Z).

    Parameters
    ----------
    potentials : Potentials
        `batch_shape` is (B,).
    backend : str, default="auto"
        As for `flash_semicrf.log_partition`; used by every method.
    validate_args : bool, optional
        As for every distribution of PyTorch; the problem is always checked, and events are checked
        by `log_prob`.
    constraints : Constraints, optional
        Condition on known facts: the distribution is restricted to the segmentations that agree
        with the constraints, and all others have probability 0.

    Attributes
    ----------
    potentials : Potentials
    constraints : Constraints or None

    Notes
    -----
    `event_shape` is (T,), that of labels per position; events of shorter sequences have padding.

    Examples
    --------
    >>> zeros = Potentials(
    ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    ... )
    >>> distribution = SemiCRFDistribution(zeros)
    >>> segments = [[Segment(0, 1, 0), Segment(2, 3, 0)]]
    >>> round(float(distribution.log_prob(segments).exp()), 6)
    0.2
    >>> round(float(distribution.entropy().exp()), 6)
    5.0
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = False

    def __init__(
        self,
        potentials: Potentials,
        backend: str = "auto",
        validate_args: bool | None = None,
        *,
        constraints: Constraints | None = None,
    ) -> None:
        self.potentials = check_potentials(potentials)
        self.constraints = constraints
        self._given = constrain(self.potentials, constraints)
        self._backend = backend
        self._log_partition: Tensor | None = None
        p = self.potentials
        shapes = torch.Size([p.batch_size]), torch.Size([p.num_positions])
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Labels of positions, 0..C-1."""
        return constraints.independent(
            constraints.integer_interval(0, self.potentials.num_labels - 1), 1
        )

    @property
    def log_partition(self) -> Tensor:
        """Log Z, float64 Tensor of shape (B,), differentiable in the parameters; computed once.

        A value computed under `torch.no_grad` is computed again when a graph needs it.
        """
        known = self._log_partition
        wanted = torch.is_grad_enabled() and any(
            value.requires_grad for value in self._given.parameters().values()
        )
        if known is None or (wanted and not known.requires_grad):
            known = self._log_partition = log_partition(self._given, self._backend)
        return known

    def _constant(self) -> Tensor:
        """Log Z without a gradient, which is not computed either."""
        with torch.no_grad():
            return self.log_partition.detach()

    def log_prob(self, value: Tensor | SegmentTable | Sequence[Sequence[Segment]]) -> Tensor:
        """Log-probability of segmentations.

        Parameters
        ----------
        value : int Tensor of shape (B, T), SegmentTable or lists of Segment
            Labels per position denote their maximal runs; padding is ignored. A table or lists may
            hold n * B segmentations, that of sequence b at index sample * B + b, as returned by
            `sample`.

        Returns
        -------
        float64 Tensor of shape (B,) or (n, B)
            In nats, differentiable in the parameters; -inf for segmentations that the problem or
            the constraints forbid.

        Raises
        ------
        TypeError, ValueError
            If `value` is not a segmentation of the sequences, or a segment is longer than K.
        """
        p = self.potentials
        table = self._table_of(value)
        copies = 1
        if len(table.sequence):
            copies = max(1, math.ceil((int(table.sequence[-1]) + 1) / p.batch_size))
        check_table(table, _shapes_of(p, copies))
        once = table._replace(sequence=table.sequence % p.batch_size)
        given = self._given
        # At most one of the labels that represent a segment's is allowed at its place.
        forms = unfold_table(once, p.num_labels, given.num_labels)
        rows = torch.stack([score_rows(given, form) for form in forms]).amax(0)
        scores = rows.new_zeros(copies * p.batch_size).index_add(0, table.sequence, rows)
        scores = scores.view(copies, p.batch_size)
        return (scores if copies > 1 else scores[0]) - self.log_partition

    def _table_of(self, value: Tensor | SegmentTable | Sequence[Sequence[Segment]]) -> SegmentTable:
        p = self.potentials
        if isinstance(value, SegmentTable):
            check_columns(value, None, "value")
            return value.to(p.device)
        if isinstance(value, Tensor):
            check_labels(value, p.lengths, p.num_positions, p.num_labels)
            labels = value.to(p.device)
            return labels_to_table(labels, p.lengths, p.max_duration, "error", p.unlimited)
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                "`value` must be labels in a Tensor, a SegmentTable or lists of Segment; got "
                f"{type(value).__name__}."
            )
        return segments_to_table(value, p.device)

    def entropy(self) -> Tensor:
        """Entropy (B,) in nats, exact and differentiable; see `flash_semicrf.entropy`."""
        return information.entropy(self._given, self._backend)

    @property
    def marginals(self) -> SegmentMarginals:
        """Posterior marginals and expected counts, without gradient."""
        return segment_marginals(self.potentials, self._backend, constraints=self.constraints)

    @property
    def mode(self) -> ViterbiResult:  # type: ignore[override]  # segmentations are no tensors
        """Most probable segmentation of each sequence; `scores` are its log-probabilities."""
        found = viterbi(self.potentials, self._backend, constraints=self.constraints)
        return ViterbiResult(found.scores - self._constant(), found.segments)

    def topk(self, k: int) -> NBestResult:
        """The k most probable segmentations of each sequence, by falling probability.

        Parameters
        ----------
        k : int

        Returns
        -------
        NBestResult
            Its scores (B, k) are log-probabilities, -inf where there are fewer segmentations.
        """
        found = n_best(self.potentials, k, self._backend, constraints=self.constraints)
        return NBestResult(found.scores - self._constant()[:, None], found.segments)

    def sample(  # type: ignore[override]  # segmentations are no tensors
        self,
        sample_shape: Sequence[int] | torch.Size = torch.Size(),  # noqa: B008 - as in torch
        seed: int | torch.Generator | None = None,
    ) -> SegmentTable:
        """Draw segmentations.

        Parameters
        ----------
        sample_shape : sequence of int
            Number of samples per sequence: the product of the axes, and one if there are none.
        seed : int, torch.Generator or None
            As for `flash_semicrf.inference.sampling.sample`, which returns `Segments`.

        Returns
        -------
        SegmentTable
            Its `sequence` is sample * B + b; it can be passed to `log_prob`.

        Raises
        ------
        ValueError
            If an axis is not a positive integer, or a sequence has no feasible segmentation.
        """
        shape = [check_positive_int("sample_shape", n) for n in sample_shape]
        return sample_table(
            self.potentials,
            math.prod(shape),
            seed,
            self._backend,
            constraints=self.constraints,
        )

    def sample_n(self, n: int) -> SegmentTable:  # type: ignore[override]  # as `sample`
        """Draw n segmentations of each sequence; see `sample`."""
        return self.sample((n,))

    def __repr__(self) -> str:
        p = self.potentials
        return (
            f"SemiCRFDistribution(batch_shape={tuple(self.batch_shape)}, T={p.num_positions}, "
            f"K={p.max_duration}, C={p.num_labels})"
        )


def _shapes_of(p: Potentials, copies: int) -> Potentials:
    """Problem with the shapes and lengths of `copies` of the batch, without storage of its own."""
    scores = p.scores[:1, :1].detach().expand(copies * p.batch_size, 1, -1)
    return p.replace(scores=scores, lengths=p.lengths.repeat(copies))


@register_kl(SemiCRFDistribution, SemiCRFDistribution)  # type: ignore[untyped-decorator]
def _kl_divergence(p: SemiCRFDistribution, q: SemiCRFDistribution) -> Tensor:
    if p.constraints is not q.constraints:
        raise ValueError("`p` and `q` must have the same `constraints`, one object, or none.")
    return information.kl_divergence(
        p.potentials, q.potentials, p._backend, constraints=p.constraints
    )

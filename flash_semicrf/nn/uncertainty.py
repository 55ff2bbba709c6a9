"""CRF head with boundary probabilities, entropy and an uncertainty-weighted loss.

All quantities are exact at any length and need no edge tensor: boundary and position probabilities
are marginals, and one forward-backward pass gives the entropy (see
`flash_semicrf.inference.information`).

References
----------
B. Settles and M. Craven, An Analysis of Active Learning Strategies for Sequence Labeling Tasks,
EMNLP 2008.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import accepts_use_triton
from flash_semicrf.exact.edges import check_edge_memory, edge_tensor
from flash_semicrf.exact.inference import EDGE_BACKENDS
from flash_semicrf.exact.semimarkov import SemiMarkov
from flash_semicrf.inference.information import categorical_entropy, entropy
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.nn.head import Reduction, SemiMarkovCRFHead
from flash_semicrf.nn.inputs import full_precision
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.validation import check_choice, check_number, check_potentials
from flash_semicrf.semirings import EntropySemiring

__all__ = ["UncertaintySemiMarkovCRFHead"]


class UncertaintySemiMarkovCRFHead(SemiMarkovCRFHead):
    """`SemiMarkovCRFHead` with boundary probabilities, entropy and an uncertainty-weighted loss.

    Parameters
    ----------
    *args, **kwargs
        Those of `SemiMarkovCRFHead`.

    Examples
    --------
    >>> import torch
    >>> crf = UncertaintySemiMarkovCRFHead(num_classes=3, max_duration=10)
    >>> scores, lengths = torch.zeros(2, 50, 3), torch.tensor([50, 30])
    >>> crf.compute_boundary_marginals(scores, lengths).shape
    torch.Size([2, 50])
    >>> entropy = crf.compute_entropy_streaming(scores, lengths)
    >>> bool(entropy[0] > entropy[1] > 0)
    True
    """

    @accepts_use_triton(4)
    def compute_boundary_marginals(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
        normalize: bool = True,
        *,
        use_streaming: bool | None = None,
    ) -> Tensor:
        """P(a segment starts at position t).

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.
        normalize : bool, default=True
            Divide the total weight (sum of exp(score)) of the segmentations with a boundary at t by
            Z, which gives its probability. If False, the logarithm of the weight is returned:
            log P + log Z, -inf for a position where no segment can start.
        use_streaming : bool, optional
            Deprecated, as in release 0.2.0: True is ``backend="streaming"``, False
            ``backend="exact"``.

        Returns
        -------
        Tensor of shape (B, T)
            Without gradient. Probabilities in the working dtype: 1 at position 0, 0 after the end
            of a sequence. Log-weights in float64, -inf after the end.
        """
        if use_streaming is not None:
            backend = _backend_of(use_streaming, backend)
        marginals = self.marginals(hidden_states, lengths, backend)
        boundary = marginals.boundary.clamp(max=1.0)
        if normalize:
            return boundary
        with torch.no_grad():
            partition: Tensor = self(hidden_states, lengths, backend)["partition"]
        return boundary.to(partition.dtype).log() + partition[:, None]

    @accepts_use_triton(3)
    def compute_position_marginals(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
    ) -> Tensor:
        """P(the segment that covers position t has label c).

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`.

        Returns
        -------
        Tensor of shape (B, T, C)
            In the working dtype, without gradient; 0 after the end of a sequence.
        """
        return self.marginals(hidden_states, lengths, backend).position

    @accepts_use_triton(3)
    def compute_entropy_streaming(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
    ) -> Tensor:
        """Entropy of the distribution over segmentations, exact at any length.

        Parameters
        ----------
        hidden_states, lengths, backend
            As for `forward`. "exact" and "binary_tree_sharded" sum the edge tensor in the entropy
            semiring, with the same result.

        Returns
        -------
        float64 Tensor of shape (B,)
            In nats; differentiable once, so that it can be part of a loss.

        Raises
        ------
        ValueError
            If a sequence has no feasible segmentation, or the edge tensor would be larger than
            `edge_memory_threshold`.
        """
        with full_precision(hidden_states):
            _, problem, _, backend = self._prepare(hidden_states, lengths, backend)
            if backend not in EDGE_BACKENDS:
                return entropy(problem, backend)
            p = check_potentials(problem)
            check_edge_memory(p, self.edge_memory_threshold)
            return SemiMarkov(EntropySemiring).sum(edge_tensor(p), p.lengths + 1)

    @accepts_use_triton(3)
    def compute_entropy_exact(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        backend: str = "auto",
    ) -> Tensor:
        """Alias of `compute_entropy_streaming`, which is exact: a name of release 0.2.0."""
        return self.compute_entropy_streaming(hidden_states, lengths, backend)

    @accepts_use_triton(5)
    def compute_loss_uncertainty_weighted(
        self,
        hidden_states: Tensor,
        lengths: Tensor,
        labels: Tensor | SegmentTable,
        uncertainty_weight: float = 1.0,
        focus_mode: Literal["high_uncertainty", "boundary_regions"] = "high_uncertainty",
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> Tensor:
        """Negative log-likelihood of each sequence times 1 + weight * uncertainty.

        Parameters
        ----------
        hidden_states, lengths, labels, reduction, backend
            As for `compute_loss`.
        uncertainty_weight : float, default=1.0
            >= 0; 0 gives `compute_loss`.
        focus_mode : {"high_uncertainty", "boundary_regions"}
            Definition of the uncertainty, a number from 0 to 1 for each sequence:

            - "high_uncertainty": the entropy of each position's label divided by log C, averaged
              over the sequence's positions (0 for one label);
            - "boundary_regions": the entropy of whether a segment starts at each position, in
              bits, averaged over the positions after the first, where one always starts (0 for
              one position).

        Returns
        -------
        float64 Tensor of shape () or (B,)
            In nats. The uncertainty is a weight: no gradient flows through it.

        Raises
        ------
        ValueError
            If an option is unknown, and as for `compute_loss`.
        """
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("focus_mode", focus_mode, ("high_uncertainty", "boundary_regions"))
        uncertainty_weight = check_number("uncertainty_weight", uncertainty_weight, zero=True)
        loss = self.compute_loss(hidden_states, lengths, labels, backend, "none")
        marginals = self.marginals(hidden_states, lengths, backend)
        measure = _label_uncertainty if focus_mode == "high_uncertainty" else _boundary_uncertainty
        uncertainty = measure(marginals, lengths.to(loss.device))
        loss = (1.0 + uncertainty_weight * uncertainty.to(loss.dtype)) * loss
        if reduction == "none":
            return loss
        return loss.mean() if reduction == "mean" else loss.sum()


def _backend_of(use_streaming: bool, backend: str) -> str:
    """Backend selected by the deprecated argument."""
    named = "streaming" if use_streaming else "exact"
    if backend not in ("auto", named):
        raise ValueError(f"`backend`={backend!r} contradicts `use_streaming`={use_streaming}.")
    warnings.warn(
        f'`use_streaming` is deprecated; pass backend="{named}".', DeprecationWarning, stacklevel=3
    )
    return named


def _label_uncertainty(marginals: SegmentMarginals, lengths: Tensor) -> Tensor:
    """Mean entropy of a position's label over log C, (B,)."""
    num_labels = marginals.position.shape[-1]
    if num_labels == 1:
        return torch.zeros_like(lengths, dtype=marginals.position.dtype)
    entropies = categorical_entropy(marginals.position)
    return (entropies.sum(1) / lengths / math.log(num_labels)).clamp(max=1.0)


def _boundary_uncertainty(marginals: SegmentMarginals, lengths: Tensor) -> Tensor:
    """Mean entropy of whether a segment starts at a position, in bits, (B,)."""
    chance = marginals.boundary[:, 1:].clamp(0.0, 1.0)
    entropies = categorical_entropy(torch.stack([chance, 1.0 - chance], -1))
    inside = torch.arange(1, marginals.boundary.shape[1], device=lengths.device) < lengths[:, None]
    total = torch.where(inside, entropies, 0.0).sum(1)
    return total / (lengths - 1).clamp(min=1) / math.log(2)

"""Posterior marginals of a segmentation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SegmentMarginals"]


class SegmentMarginals(NamedTuple):
    """Posterior probabilities of a batch of sequences, each of shape (B, T, C).

    Attributes
    ----------
    position : Tensor
        P(the segment that covers position t has label c); sums to 1 over labels.
    start : Tensor
        P(a segment of label c starts at position t).
    end : Tensor
        P(a segment of label c has its last position at t).
    """

    position: Tensor
    start: Tensor
    end: Tensor

    @property
    def boundary(self) -> Tensor:
        """P(some segment starts at position t), shape (B, T)."""
        return self.start.sum(-1)

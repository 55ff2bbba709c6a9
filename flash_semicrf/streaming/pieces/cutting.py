"""What a backend offers so that its long sequences can be cut."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.streaming.windows import Forward, Tangents, Windows

__all__ = ["Cutting", "Decoded", "Gradients"]

Gradients: TypeAlias = tuple[Tensor, dict[str, Tensor]]
Decoded: TypeAlias = tuple[Tensor, SegmentTable]


class Cutting(Protocol):
    """What a backend offers for sequences that are pieces, beside its operations on whole ones.

    `core` (N, 2) are the boundaries of each sequence at which its messages are handed out.
    """

    name: str

    def slots(self, potentials: Potentials, sums: bool) -> Slots | None:
        """What its device does at once, of log Z and gradients or of everything else; None if it
        takes no pieces of this problem."""

    def log_partition_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, Windows]:
        """Log Z (N,) and the messages of the forward pass."""

    def gradients_of_pieces(
        self, potentials: Potentials, wanted: set[str], core: Tensor, span: int
    ) -> tuple[Tensor, dict[str, Tensor], Windows]:
        """Log Z and gradients as of whole sequences, but those of parameters that sequences share
        are summed over the core: segments that end in it. Its bounds are multiples of `span`, or
        the end of a sequence."""

    def viterbi_of_pieces(
        self, potentials: Potentials, core: Tensor
    ) -> tuple[Tensor, SegmentTable, Windows]:
        """Best scores and segments, and the messages of the max pass."""

    def tangents_of_pieces(
        self, potentials: Potentials, direction: Potentials, wanted: set[str], core: Tensor
    ) -> Tangents:
        """As `tangents`, summed over the core as gradients are, and the messages of both passes
        with their derivatives."""

    def log_partition(self, potentials: Potentials) -> Tensor:
        """See `flash_semicrf.streaming.dispatch.Backend`, as for the others."""

    def gradients(self, potentials: Potentials, wanted: set[str]) -> Gradients:
        """Log Z and gradients."""

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Messages."""

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Derivatives of gradients."""

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass."""

    def viterbi(self, potentials: Potentials) -> Decoded:
        """Best segmentations."""

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Samples."""

    def forward(self, potentials: Potentials) -> Forward:
        """Messages of the forward pass, as `sample_from` takes them."""

    def sample_from(
        self, potentials: Potentials, forward: Forward, num_samples: int, seed: int
    ) -> SegmentTable:
        """Samples, from messages."""

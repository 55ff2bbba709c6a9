"""Backends for tests of what is done in pieces."""

from __future__ import annotations

from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = ["OnlyPieces"]


class OnlyPieces(TritonBackend):
    """Refuses sequences that are not pieces: a certificate that fails must not go unnoticed."""

    def log_partition(self, potentials):
        raise AssertionError("log Z was computed as a whole")

    def gradients(self, potentials, wanted):
        raise AssertionError("gradients were computed as a whole")

    def viterbi(self, potentials):
        raise AssertionError("decoded as a whole")

"""Backends for tests of what is done in pieces."""

from __future__ import annotations

from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = ["OnlyPieces"]

WHOLE = (170, 30_000)
"""Positions of the sequences of these tests."""


class OnlyPieces(TritonBackend):
    """Refuses sequences that are not pieces: a certificate that fails must not go unnoticed."""

    def log_partition(self, potentials):
        raise AssertionError("log Z was computed as a whole")

    def gradients(self, potentials, wanted):
        raise AssertionError("gradients were computed as a whole")

    def tangents(self, potentials, direction, wanted):
        raise AssertionError("derivatives of gradients were computed as a whole")

    def viterbi(self, potentials):
        raise AssertionError("decoded as a whole")

    def messages(self, potentials):
        self._check_short(potentials)
        return super().messages(potentials)

    def max_messages(self, potentials):
        self._check_short(potentials)
        return super().max_messages(potentials)

    def forward(self, potentials):
        self._check_short(potentials)
        return super().forward(potentials)

    def sample(self, potentials, num_samples, seed):
        raise AssertionError("samples were drawn from messages of the whole")

    @staticmethod
    def _check_short(potentials):
        assert potentials.num_positions not in WHOLE, "messages were computed as a whole"

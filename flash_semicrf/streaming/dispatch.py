"""Choice of the implementation: a table of backends in order of preference.

``"auto"`` selects the first backend that supports a problem. A backend selected by name runs, or an
error states why it does not support the problem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.validation import DEVICE_CHECKS, check_choice
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.cpu.values import values_are_allowed
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import SHORTEST
from flash_semicrf.streaming.reference import ReferenceBackend
from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = ["BACKENDS", "Backend", "choose", "record_backends"]


class Backend(Protocol):
    """Interface of a backend. Problems are checked; see `flash_semicrf.problem.validation`."""

    name: str

    def why_not(self, potentials: Potentials) -> str | None:
        """Reason why this backend cannot run the problem, or None if it can."""

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z (B,) in float64, -inf if nothing is feasible; memory O(KC) per sequence."""

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and its gradient with respect to every wanted parameter.

        Those of "scores", "start_scores" and "end_scores" have shape (B, T, C): they are the
        position, start and end marginals, and are available even if the problem has no such scores.
        Those of "segment_scores" and "transition_scores" have the shapes of these.
        The others have one gradient per sequence, (B, ...). Zero where log Z is -inf.
        """

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Log Z (B,), alpha and beta, both (B, T+1, C), all in float64.

        alpha_t(c) is the log-sum over the segmentations of ``[0, t)`` that end with label c
        (alpha_0 = 0, the free source). beta_t(c) is the log-sum over the continuations of such a
        segmentation, including `final_scores`, so that alpha_t + beta_t - log Z is the log of the
        end marginal. beta_0 and rows after the end of a sequence are arbitrary.
        """

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log Z, its derivative along a direction, and the derivative of its gradient.

        The problem has `initial_scores` (see `flash_semicrf.problem.potentials.explicit_start`);
        the direction is finite everywhere, with zeros as padding, and has the same parameters.

        Returns log Z (B,), ``mean`` (B,) = <direction, gradient> = E[score by the direction], and
        for every wanted parameter the Hessian of log Z times the direction, in the forms of
        `gradients` but all float64. Zero where log Z is -inf.
        """

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Best score alpha_t(c) of the segmentations of ``[0, t)`` that end in c, (B, T+1, C).

        alpha_0 = 0 does not enter the others: the transition term of the first segment is that of
        `messages`. In float64; rows after the end of a sequence are arbitrary.
        """

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best scores (B,) in float64 and segments; -inf and no rows if nothing is feasible."""

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations with the numbers of `flash_semicrf.streaming.streams`.

        `sequence` is sample * B + b; there are no rows if nothing is feasible.
        """


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (NumbaBackend(), TritonBackend(), ReferenceBackend())
}
"""Backends in order of preference."""

# The check of all values at once that validation uses on each type of device.
DEVICE_CHECKS.update(cpu=values_are_allowed, cuda=TritonBackend().values_are_allowed)

_record: ContextVar[list[str] | None] = ContextVar("flash_semicrf_backends", default=None)


def choose(name: str, potentials: Potentials) -> Backend:
    """Backend for a problem.

    Parameters
    ----------
    name : str
        "auto" or a key of `BACKENDS`.
    potentials : Potentials

    Returns
    -------
    Backend

    Raises
    ------
    ValueError
        If the name is unknown, or the backend does not support the problem; the message states the
        reason.
    """
    check_choice("backend", name, ("auto", *BACKENDS))
    if name == "auto":
        backend = next(b for b in BACKENDS.values() if b.why_not(potentials) is None)
    else:
        backend = BACKENDS[name]
        reason = backend.why_not(potentials)
        if reason is not None:
            raise ValueError(f'backend="{name}" cannot run this problem: {reason}.')
    record = _record.get()
    if record is not None:
        record.append(backend.name)
    if potentials.num_positions < SHORTEST or not isinstance(backend, NumbaBackend | TritonBackend):
        return backend
    return InPieces(backend)


@contextlib.contextmanager
def record_backends() -> Iterator[list[str]]:
    """Context that yields the list of names of the backends chosen inside it.

    Examples
    --------
    >>> with record_backends() as ran:
    ...     pass
    >>> ran
    []
    """
    names: list[str] = []
    token = _record.set(names)
    try:
        yield names
    finally:
        _record.reset(token)

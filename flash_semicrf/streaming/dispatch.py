"""Which implementation runs: one table of backends, asked in order of preference.

A backend says whether it supports a problem or why not. ``"auto"`` takes the first that does; a
backend named by the user runs or raises its reason.
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
from flash_semicrf.streaming.reference import ReferenceBackend
from flash_semicrf.streaming.triton.backend import TritonBackend

__all__ = ["BACKENDS", "Backend", "choose", "record_backends"]


class Backend(Protocol):
    """What a backend offers. Problems come checked; see `flash_semicrf.problem.validation`."""

    name: str

    def why_not(self, potentials: Potentials) -> str | None:
        """Reason why this backend cannot run the problem, or None."""

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z (B,) in float64, -inf where nothing is feasible; memory O(KC) per sequence."""

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and its gradient by every wanted parameter.

        Those of "scores", "start_scores" and "end_scores" (which are the position, start and end
        marginals, and may be asked for whether or not the problem has such scores) have shape
        (B, T, C); the others have one gradient per sequence, (B, ...). Zero where log Z is -inf.
        """

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Log Z (B,), alpha and beta, both (B, T+1, C), all in float64.

        alpha_t(c) is the log-sum of the segmentations of ``[0, t)`` that end in c (alpha_0 = 0, the
        free source), beta_t(c) that of what may follow one that does, `final_scores` included, so
        that alpha_t + beta_t - log Z is the log of the end marginal. beta_0 and rows after a
        sequence's end are arbitrary.
        """

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log Z, its derivative along a direction, and that of its gradient.

        The problem has `initial_scores` (see `flash_semicrf.problem.potentials.explicit_start`);
        the direction is finite everywhere, its padding 0, and gives all that the problem gives.

        Returns log Z (B,), ``mean`` (B,) = <direction, gradient> = E[score by the direction], and
        for every wanted parameter the Hessian of log Z times the direction, in the forms of
        `gradients` but all float64. Zero where log Z is -inf.
        """

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Best score alpha_t(c) of the segmentations of ``[0, t)`` that end in c, (B, T+1, C).

        alpha_0 = 0, and does not enter the others: the first segment's transition term is that of
        `messages`. In float64; rows after a sequence's end are arbitrary.
        """

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best scores (B,) in float64 and segments; -inf and no rows where nothing is feasible."""

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations with the numbers of `flash_semicrf.streaming.streams`.

        `sequence` is sample * B + b; no rows where nothing is feasible.
        """


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (NumbaBackend(), TritonBackend(), ReferenceBackend())
}
"""Backends in order of preference."""

# The one look at all values that the validation of a problem takes on each kind of device.
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
        For an unknown name, or one whose backend does not support the problem: with its reason.
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
    return backend


@contextlib.contextmanager
def record_backends() -> Iterator[list[str]]:
    """List the names of the backends chosen inside the ``with`` block.

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

"""A backend for problems with a duration tail, from one that has no kernels for it.

What the backend does itself it is asked to; the rest runs on the expanded problem of
`flash_semicrf.tail`, exactly, at the cost of three or four times the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from flash_semicrf.potentials import Potentials
from flash_semicrf.segments import SegmentTable
from flash_semicrf.tail import (
    expand,
    expand_direction,
    fold_gradients,
    fold_messages,
    fold_table,
)

if TYPE_CHECKING:
    from flash_semicrf.streaming.dispatch import Backend

__all__ = ["TailBackend", "with_tail"]

Gradients = dict[str, Tensor]


def with_tail(backend: Backend, potentials: Potentials) -> Backend:
    """The backend to run a problem on: itself, or a `TailBackend` where the problem has a tail."""
    return backend if potentials.duration_tail is None else TailBackend(backend)


class TailBackend:
    """Every operation of a backend, for problems with a tail.

    Parameters
    ----------
    backend : Backend
        Its ``takes_tail(operation, potentials)``, if it has that, says which it does itself.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = backend.name

    def __getattr__(self, operation: str) -> Callable:
        if operation not in _EXPANDED:
            raise AttributeError(operation)
        method = getattr(self.backend, operation)
        takes_tail = getattr(self.backend, "takes_tail", None)
        run = partial(_EXPANDED[operation], method)

        def call(potentials: Potentials, *args):
            if takes_tail is not None and takes_tail(operation, potentials):
                return method(potentials, *args)
            return run(potentials, *args)

        return call


def _log_partition(method: Callable, p: Potentials) -> Tensor:
    return method(expand(p))


def _gradients(method: Callable, p: Potentials, wanted: set[str]) -> tuple[Tensor, Gradients]:
    log_z, found = method(expand(p, end_marginals="end_scores" in wanted), _names(wanted))
    return log_z, fold_gradients(found, wanted, p.num_labels, p.max_duration)


def _tangents(
    method: Callable, p: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, Gradients]:
    ends = "end_scores" in wanted or direction.end_scores is not None
    problem, direction = expand(p, end_marginals=ends), expand_direction(direction, ends)
    log_z, mean, found = method(problem, direction, _names(wanted))
    return log_z, mean, fold_gradients(found, wanted, p.num_labels, p.max_duration)


def _names(wanted: set[str]) -> set[str]:
    """What the expanded problem is to be differentiated by."""
    rest = wanted - {"duration_tail"}
    return rest if rest == wanted else rest | {"duration_bias"}


def _messages(method: Callable, p: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    log_z, alpha, beta = method(expand(p))
    return log_z, fold_messages(alpha, p.num_labels), beta[..., : p.num_labels]


def _max_messages(method: Callable, p: Potentials) -> Tensor:
    return fold_messages(method(expand(p, "max")), p.num_labels, "max")


def _viterbi(method: Callable, p: Potentials) -> tuple[Tensor, SegmentTable]:
    scores, table = method(expand(p, "max"))
    return scores, fold_table(table, p.num_labels)


def _sample(method: Callable, p: Potentials, num_samples: int, seed: int) -> SegmentTable:
    return fold_table(method(expand(p), num_samples, seed), p.num_labels)


_EXPANDED = {
    "log_partition": _log_partition,
    "gradients": _gradients,
    "tangents": _tangents,
    "messages": _messages,
    "max_messages": _max_messages,
    "viterbi": _viterbi,
    "sample": _sample,
}

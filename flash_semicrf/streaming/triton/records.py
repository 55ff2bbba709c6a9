"""Records of tensors that kernels take as one argument, and a problem in that form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import Potentials

__all__ = [
    "Parameters",
    "Problem",
    "Sizes",
    "State",
    "form_of",
    "parameters_of",
    "power_of_two_above",
    "problem_of",
]


class Sizes(NamedTuple):
    """Lengths of the sequences, and the sizes of the batch."""

    lengths: Tensor  # (B,) int64
    T: int
    C: int
    K: int


class Problem(NamedTuple):
    """Scores by position."""

    scores: Tensor  # (B, T, C)
    start: Tensor | None  # (B, T, C), both or neither
    end: Tensor | None
    sizes: Sizes


class Parameters(NamedTuple):
    """Parameters that all sequences share, or a quantity for each; None where there is none."""

    transition: Tensor
    bias: Tensor
    initial: Tensor | None
    final: Tensor | None
    tail: Tensor | None


class State(NamedTuple):
    """Input of kernels in the log domain, or the derivatives of all of it."""

    parameters: Parameters
    prefixes: tuple  # `Prefixes`
    messages: tuple  # of the kind of transitions


def power_of_two_above(number: int) -> int:
    """Smallest power of two that is not below a positive number.

    Plain Python, as the ceilings are: Triton's own helpers take 10 microseconds a call.
    """
    return 1 << (number - 1).bit_length()


def problem_of(p: Potentials) -> Problem:
    """Contiguous tensors; zeros where only one of start and end scores is given."""
    scores = p.scores.contiguous()
    start, end = p.start_scores, p.end_scores
    if start is not None or end is not None:
        start, end = (
            torch.zeros_like(scores) if x is None else x.contiguous() for x in (start, end)
        )
    _, T, C = scores.shape
    return Problem(scores, start, end, Sizes(p.lengths.contiguous(), T, C, p.max_duration))


def form_of(p: Potentials) -> tuple[torch.dtype | None, ...]:
    """What kernels are compiled for: the dtype of each parameter, None where there is none.

    With start scores alone the problem's records have both, and likewise with end scores.
    """
    s, e = p.start_scores, p.end_scores
    i, f, t = p.initial_scores, p.final_scores, p.duration_tail
    return (
        p.scores.dtype,
        p.transition.dtype,
        p.duration_bias.dtype,
        None if s is None else s.dtype,
        None if e is None else e.dtype,
        None if i is None else i.dtype,
        None if f is None else f.dtype,
        None if t is None else t.dtype,
    )


def parameters_of(p: Potentials) -> Parameters:
    """Contiguous tensors; with transitions by duration, initial scores by duration, too."""
    initial = p.initial_scores
    if initial is not None and p.transition.dim() == 3:
        initial = initial.expand_as(p.duration_bias)
    given = (p.transition, p.duration_bias, initial, p.final_scores, p.duration_tail)
    return Parameters(*(x if x is None else x.contiguous() for x in given))

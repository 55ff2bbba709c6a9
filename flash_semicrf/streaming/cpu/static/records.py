"""Records that the kernels for static transitions share: a batch, and one sequence of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.parameters import Transition, Window
from flash_semicrf.streaming.cpu.parts import inlined_owning

__all__ = ["Batch", "Messages", "Output", "Rows", "Sequence", "messages_of", "sequence_of"]


class Batch(NamedTuple):
    """The arrays of a batch that kernels read.

    Attributes
    ----------
    scores : array of shape (B, T, C)
    start_scores, end_scores : arrays of shape (B, T, C)
        (B, 1, 1) zeros without boundary scores.
    has_boundary : bool
    lengths : int64 array of shape (B,)
    first, last : float64 arrays of shape (C,)
        What the first segment gets in place of a transition, and the last one at its end.
    window : Window
    forward, backward : Transition
    """

    scores: np.ndarray
    start_scores: np.ndarray
    end_scores: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    first: np.ndarray
    last: np.ndarray
    window: Window
    forward: Transition
    backward: Transition


class Rows(NamedTuple):
    """Messages of a batch; see `Messages`.

    Attributes
    ----------
    alpha, gamma, beta, eta : float64 arrays of shape (B, T, C)
    longer, longer_back : float64 arrays of shape (B, T, C)
        G of either pass; (B, 0, 0) where it is not kept.
    forward, backward : float64 arrays of shape (B, T + 1)
    total : float64 array of shape (B, 2)
        log Z = total.sum(1).
    """

    alpha: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eta: np.ndarray
    longer: np.ndarray
    longer_back: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    total: np.ndarray


class Sequence(NamedTuple):
    """One sequence as a pass reads it.

    Attributes
    ----------
    scores, opening, closing : arrays of shape (T, C)
        `opening` is added where a source is taken up, `closing` where an output is made: start and
        end scores, exchanged for the backward pass. Read only if `has_boundary`.
    has_boundary : bool
    length : int
    backward : bool
        Step 0 is at the end.
    """

    scores: np.ndarray
    opening: np.ndarray
    closing: np.ndarray
    has_boundary: bool
    length: int
    backward: bool


class Output(NamedTuple):
    """Where a pass writes its messages.

    Attributes
    ----------
    keep : bool
        Without it nothing is written.
    outputs, sources : float64 arrays of shape (T, C)
        Row p: alpha_{p+1} and gamma_p; backwards eta_p and beta_{p+1}; less their offset.
    longer : float64 array of shape (T, C)
        Row p: what `flash_semicrf.streaming.cpu.static.tail` calls G, of the same step as the
        outputs but less the offset of the step before. Empty (0, 0) where it is not wanted.
    offsets : float64 array of shape (T + 1,)
        Whole numbers to add to the messages of step 0..length.
    """

    keep: bool
    outputs: np.ndarray
    sources: np.ndarray
    longer: np.ndarray
    offsets: np.ndarray


class Messages(NamedTuple):
    """Messages of one sequence. Row p holds those of position p as `Output` has them.

    Attributes
    ----------
    alpha, gamma, beta, eta : float64 arrays of shape (T, C)
        alpha_{p+1}, gamma_p, beta_{p+1} and eta_p, less their offsets.
    forward, backward : float64 arrays of shape (T + 1,)
        Whole-number offsets of the two passes, by their step.
    length : int
    offset, value : float
        log Z = offset + value.
    """

    alpha: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    eta: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    length: int
    offset: float
    value: float


@inlined_owning
def sequence_of(batch, b, backward):
    """Sequence b of a `Batch`, in the direction of a pass."""
    start, end = batch.start_scores[b], batch.end_scores[b]
    opening, closing = (end, start) if backward else (start, end)
    length = batch.lengths[b]
    return Sequence(batch.scores[b], opening, closing, batch.has_boundary, length, backward)


@inlined_owning
def messages_of(batch, rows, b):
    """Messages of sequence b."""
    return Messages(
        rows.alpha[b],
        rows.gamma[b],
        rows.beta[b],
        rows.eta[b],
        rows.forward[b],
        rows.backward[b],
        batch.lengths[b],
        rows.total[b, 0],
        rows.total[b, 1],
    )

"""Records of the kernel for eight sequences at once: its parameters, scores, results, workspace."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = ["Lanes", "Model", "Places", "Sequences", "Sums", "places_of"]


class Model(NamedTuple):
    """Exponentials of what all sequences share; the peak of a label's durations is part of A.

    Attributes
    ----------
    rising, falling : float64 arrays of shape (C * K,)
        W by label, then by duration 1..K and K..1.
    transition : float64 array of shape (C * C,)
        exp(A[c', c]).
    first, last : float64 arrays of shape (C,)
        Of the first and the last segment, less their peaks.
    peaks : float
        Sum of those peaks.
    from_one : bool array of shape (C,)
        The durations allowed are 1..k for some k: what a source reaches, a later one does.
    """

    rising: np.ndarray
    falling: np.ndarray
    transition: np.ndarray
    first: np.ndarray
    last: np.ndarray
    peaks: float
    from_one: np.ndarray


class Sequences(NamedTuple):
    """Scores of a batch, flat.

    Attributes
    ----------
    scores, start_scores, end_scores : arrays of shape (B * T * C,)
        The last two of size 0 without boundary scores.
    has_boundary : bool
    lengths : int64 array of shape (B,)
    order : int64 array of shape (B,)
        Sequences by length: eight neighbours are done together.
    """

    scores: np.ndarray
    start_scores: np.ndarray
    end_scores: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    order: np.ndarray


class Sums(NamedTuple):
    """Results of `run_short`, for sequences that are certain.

    Attributes
    ----------
    log_z : float64 array of shape (B,)
    certain : bool array of shape (B,)
    position, start, end : arrays of shape (B * T * C,)
        Marginals; size 0 where they are not wanted.
    initial, final : float64 arrays of shape (B, C)
        Marginals of the first and the last label.
    duration : float64 array of shape (B, K, C)
    transition : float64 array of shape (B, C, C)
        Without the first segment's free source.
    """

    log_z: np.ndarray
    certain: np.ndarray
    position: np.ndarray
    start: np.ndarray
    end: np.ndarray
    initial: np.ndarray
    final: np.ndarray
    duration: np.ndarray
    transition: np.ndarray


class Places(NamedTuple):
    """Offsets in the workspace. Blocks have a row for each position, rows a vector per label."""

    row: int  # elements of a row
    step: int  # elements from an opening or closing row to the next; 0 without boundary scores
    factor: int  # block: exp(scores), then the position marginals
    opening: int  # block, or a row of ones: exp(start scores)
    closing: int  # the same of end scores
    source: int  # block: E
    output: int  # block: closing beta, then the end marginals
    sink: int  # block: opening eta, then the start marginals
    exponents: int  # a vector per boundary: scale of the backward pass
    peaks: int  # a vector per position
    frame: int
    sums: int
    incoming: int
    alpha: int
    weight: int
    inside: int
    zero: int  # vectors, from here on
    lowest: int
    highest: int
    top: int
    scale: int
    power: int
    posterior: int
    inverse: int
    offset: int
    astray: int
    duration: int  # C * K vectors, durations K..1
    transition: int  # C * C vectors
    size: int


def places_of(num_positions: int, num_labels: int, longest: int, has_boundary: bool) -> Places:
    """Offsets for sequences of up to `num_positions` positions and durations up to `longest`."""
    row = num_labels * LANES
    block = num_positions * row
    opening, closing = (block, block) if has_boundary else (0, row)
    vectors = [(num_positions + 1) * LANES, num_positions * LANES]
    sizes = [block, opening, closing, block, block, block, *vectors]
    sizes += [row] * 6 + [LANES] * 10 + [longest * row, num_labels * row]
    return Places(row, row if has_boundary else 0, *accumulate(sizes, initial=0))


class Lanes(NamedTuple):
    """Eight sequences of a group, the shortest first, and the workspace of a thread.

    Attributes
    ----------
    work : float64 array of shape (at.size,)
    at : Places
    sequences, lengths : int64 arrays of shape (8,)
        The last sequence again where there are fewer.
    stride, num_labels, longest : int
        T, C and K.
    """

    work: np.ndarray
    at: Places
    sequences: np.ndarray
    lengths: np.ndarray
    stride: int
    num_labels: int
    longest: int

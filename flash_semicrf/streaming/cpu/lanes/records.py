"""Records of the kernel for eight sequences at once: its parameters, scores, results, workspace."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from flash_semicrf.streaming.cpu.lanes.tiles import STEPS, WIDTH
from flash_semicrf.streaming.cpu.llvm import LANES

__all__ = [
    "Lanes",
    "Messages",
    "Model",
    "Places",
    "Sequences",
    "Sums",
    "multiple",
    "places_of",
]


class Model(NamedTuple):
    """Exponentials of what all sequences share; the peak of a label's durations is part of A.

    Attributes
    ----------
    window : float64 array of shape (C * (K + 1 + STEPS),)
        W by label, W_k at index k, zeros where there is no such duration.
    onward, back : float64 arrays of shape (C * padded C,)
        exp(A[c', c]) and its transpose, rows padded to a multiple of `WIDTH` labels.
    first, last : float64 arrays of shape (C,)
        Of the first and the last segment, less their peaks.
    first_peak, last_peak : float
    from_one : bool array of shape (C,)
        The durations allowed are 1..k for some k: what a source reaches, a later one does.
    """

    window: np.ndarray
    onward: np.ndarray
    back: np.ndarray
    first: np.ndarray
    last: np.ndarray
    first_peak: float
    last_peak: float
    from_one: np.ndarray


class Sequences(NamedTuple):
    """Scores of a batch, flat.

    Attributes
    ----------
    scores, opening, closing : arrays of shape (B * T * C,)
        The last two of size 0 without boundary scores.
    has_boundary : bool
    lengths : int64 array of shape (B,)
    order : int64 array of shape (B,)
        Sequences by length: eight neighbours are done together.
    core : int64 array of shape (B, 2)
        Boundaries between which positions count for what sequences share; multiples of `STEPS`, or
        the end.
    mirrored : bool
        To be read from their ends, as `opening`, `closing` and the model are; log Z alone.
    """

    scores: np.ndarray
    opening: np.ndarray
    closing: np.ndarray
    has_boundary: bool
    lengths: np.ndarray
    order: np.ndarray
    core: np.ndarray
    mirrored: bool


class Messages(NamedTuple):
    """Messages beside the bounds of cores, as `flash_semicrf.streaming.windows.Windows` has them.

    Attributes
    ----------
    alpha, beta : float64 arrays of shape (B, 2, K, C)
        Exponentials of messages, less their levels; 0 where there is none. Of size 0 where they
        are not wanted.
    alpha_level, beta_level : float64 arrays of shape (B, 2, K)
    """

    alpha: np.ndarray
    beta: np.ndarray
    alpha_level: np.ndarray
    beta_level: np.ndarray


class Sums(NamedTuple):
    """Results of `run_lanes`, for sequences that are certain.

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
    kept: int  # the same of output and sink; 0 for log Z alone
    before: int  # rows of sources before the first
    columns: int  # rows of sources
    padded: int  # C, rounded up to a multiple of WIDTH
    factor: int  # block: exp(scores)
    opening: int  # block, or a row of ones: exp(start scores)
    closing: int  # the same of end scores
    output: int  # block, or a row: closing beta
    sink: int  # block, or a row: opening eta
    exponents: int  # a vector per boundary: scale of the backward pass
    offsets: int  # a vector per boundary: what is taken out of the scores before it
    source: int  # `columns` rows: E
    far: int  # STEPS rows: sums over the sources before a block, then over all
    weight: int  # STEPS rows
    begun: int  # STEPS rows: sinks of a block
    start: int  # STEPS rows, as the next two: marginals of starts
    covered: int  # of positions
    end: int  # of ends
    ended: int  # STEPS + 1 rows: alpha q of the boundaries of a block
    frame: int
    incoming: int  # of `padded` vectors
    alpha: int
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
    peak: int
    total: int
    counted: int
    shift: int
    outweighed: int
    complete: int  # sum of the marginals of the last position
    duration: int  # C vectors for each of the durations 1..K, rounded up to STEPS
    transition: int  # C * C vectors
    size: int


def places_of(
    num_positions: int, num_labels: int, longest: int, has_boundary: bool, gradient: bool
) -> Places:
    """Offsets for sequences of up to `num_positions` positions and durations up to `longest`."""
    row = num_labels * LANES
    block = num_positions * row
    opening, closing = (block, block) if has_boundary else (0, row)
    kept = block if gradient else row
    before = multiple(longest, STEPS)
    columns = before + min(multiple(num_positions, STEPS), max(4 * before, 128))
    padded, vectors = multiple(num_labels, WIDTH), (num_positions + 1) * LANES
    sizes = [block, opening, closing, kept, kept, vectors, vectors, columns * row]
    sizes += [STEPS * row] * 6 + [(STEPS + 1) * row]
    sizes += [row, padded * LANES, row, row] + [LANES] * 16
    sizes += [before * row, num_labels * row]
    steps = (row, row if has_boundary else 0, row if gradient else 0)
    return Places(*steps, before, columns, padded, *accumulate(sizes, initial=0))


def multiple(number: int, of: int) -> int:
    """The number, rounded up."""
    return -(-number // of) * of


class Lanes(NamedTuple):
    """Eight sequences of a group, the shortest first, and the workspace of a thread.

    Attributes
    ----------
    work : float64 array of shape (at.size,)
    at : Places
    sequences, lengths : int64 arrays of shape (8,)
        The last sequence again where there are fewer.
    firsts : int64 array of shape (8,)
        Index of each one's first number in the array that is read or written.
    handed : bool array of shape (T + 1,)
        Boundaries at which a lane's messages are handed out.
    num_labels, longest : int
        C and K.
    """

    work: np.ndarray
    at: Places
    sequences: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    handed: np.ndarray
    num_labels: int
    longest: int

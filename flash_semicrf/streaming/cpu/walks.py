"""Samples of a batch, by threads, and their table; what both kinds of transitions share."""

from __future__ import annotations

import numpy as np
import torch

from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import Kernel, kernel
from flash_semicrf.streaming.cpu.parameters import array_of
from flash_semicrf.streaming.cpu.parts import inlined
from flash_semicrf.streaming.cpu.tasks import take
from flash_semicrf.streaming.streams import streams, uniform

__all__ = ["NEGLIGIBLE", "draw", "gather", "sample_walks", "table_of_walks"]

NEGLIGIBLE = -45.0
"""Log of a probability that is not added up: below the rounding of a sum near 1."""

_SHARE = 64  # samples of one task
_STEP, _COPY = 300.0, 10.0  # cost of a position of a walk; see `threads.position_cost`
_BUFFER = 2**25  # segments that there is room for at a time, eight bytes each

draw = inlined(uniform)
"""`flash_semicrf.streaming.streams.uniform`, compiled."""


@kernel
def _fill(queue, shares, lengths, counts, starts, labels, firsts, columns):
    """Write the segments of the samples of each task to their rows of the table."""
    task = take(queue)
    while task >= 0:
        b, first_sample, last_sample = shares[task]
        for j in range(first_sample, last_sample):
            number = counts[b, j]
            if number == 0:
                continue
            first = starts.shape[2] - number
            drawn, drawn_labels = starts[b, j, first:], labels[b, j, first:]
            rows = columns[:, firsts[j, b] : firsts[j, b] + number]
            owners, begins, ends, classes = rows[0], rows[1], rows[2], rows[3]
            owner = j * lengths.shape[0] + b
            for i in range(number):
                owners[i] = owner
                begins[i] = drawn[i]
                classes[i] = drawn_labels[i]
            for i in range(1, number):
                ends[i - 1] = drawn[i]
            ends[number - 1] = lengths[b]
        task = take(queue)


def sample_walks(
    p: Potentials, num_samples: int, seed: int, log_z: np.ndarray, walk: Kernel, given: tuple
) -> SegmentTable:
    """Walk on all threads, and gather the walks into a table.

    Parameters
    ----------
    p : Potentials
    num_samples, seed : int
    log_z : array of shape (B,)
        -inf where there is nothing to draw.
    walk : Kernel
        ``walk(queue, shares, *given, stream, counts, starts, labels)``: of each task i it draws the
        samples (sequence, first, last) in row i of `shares`, from the streams (2, num_samples, B),
        and writes their segments from the end of the rows of starts and labels
        (B, num_samples, T), and their number to counts (B, num_samples).
    given : tuple

    Returns
    -------
    SegmentTable
        `sequence` is sample * B + b.
    """
    stream = streams(seed, num_samples, p.batch_size)
    together = max(1, _BUFFER // (p.batch_size * p.num_positions))
    tables = []
    for first in range(0, num_samples, together):
        part = np.ascontiguousarray(stream[:, first : first + together])
        table = _walk_together(p, part, log_z, walk, given)
        tables.append(table._replace(sequence=table.sequence + first * p.batch_size))
    return (
        tables[0] if len(tables) == 1 else SegmentTable(*map(torch.cat, zip(*tables, strict=True)))
    )


def _walk_together(
    p: Potentials, stream: np.ndarray, log_z: np.ndarray, walk: Kernel, given: tuple
) -> SegmentTable:
    """The samples of some streams."""
    num_samples = stream.shape[1]
    lengths = array_of(p.lengths)
    shares = np.array(
        [
            (b, first, min(first + _SHARE, num_samples))
            for b in np.flatnonzero(log_z > -np.inf)
            for first in range(0, num_samples, _SHARE)
        ],
        dtype=np.int64,
    ).reshape(-1, 3)
    counts = np.zeros((p.batch_size, num_samples), dtype=np.int64)
    # Positions and labels fit 32 bits; untouched pages of these buffers cost nothing.
    starts, labels = np.empty((2, p.batch_size, num_samples, p.num_positions), dtype=np.int32)
    costs = (shares[:, 2] - shares[:, 1]) * lengths[shares[:, 0]] * _STEP
    found = (counts, starts, labels)
    threads.run(walk, np.arange(len(shares)), costs, (shares, *given, stream, *found))
    return gather(lengths, shares, counts, starts, labels)


def gather(
    lengths: np.ndarray,
    shares: np.ndarray,
    counts: np.ndarray,
    starts: np.ndarray,
    labels: np.ndarray,
) -> SegmentTable:
    """Table of the walks: the last `counts` entries of each row of starts and labels.

    Parameters
    ----------
    lengths : array of shape (B,)
    shares : int64 array of shape (N, 3)
        Tasks for threads, (sequence, first walk, last walk + 1), that cover all walks.
    counts : array of shape (B, M)
    starts, labels : arrays of shape (B, M, T)

    Returns
    -------
    SegmentTable
        `sequence` is walk * B + b; a walk without segments has no rows.
    """
    order = counts.T.ravel()
    firsts = (np.cumsum(order) - order).reshape(counts.T.shape)
    columns = np.empty((4, order.sum()), dtype=np.int64)  # one block: it may get huge pages
    costs = (shares[:, 2] - shares[:, 1]) * lengths[shares[:, 0]] * _COPY
    given = (shares, lengths, counts, starts, labels, firsts, columns)
    threads.run(_fill, np.arange(len(shares)), costs, given)
    return SegmentTable(*map(torch.from_numpy, columns))


def table_of_walks(
    starts: np.ndarray, labels: np.ndarray, counts: np.ndarray, lengths: np.ndarray
) -> SegmentTable:
    """Table of the last `counts` entries of each row of `starts` and `labels` (B, T)."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    used = np.arange(starts.shape[1]) >= starts.shape[1] - counts[:, None]
    start = starts[used]
    stop = np.empty_like(start)
    stop[:-1] = start[1:]
    stop[np.cumsum(counts)[counts > 0] - 1] = lengths[counts > 0]
    return SegmentTable(*map(torch.from_numpy, (sequence, start, stop, labels[used])))

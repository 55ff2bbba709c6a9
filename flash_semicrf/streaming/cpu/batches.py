"""Steps on the arrays of a whole batch that every kind of transitions takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_SEQUENCE, Potentials

__all__ = [
    "boundary_products",
    "chunk_bounds",
    "counted_chunks",
    "gradients_by_length",
    "groups_of",
    "sum_of_chunks",
    "whole_messages",
]

_MOST_PADDING = 4
"""Positions of a batch over those of its sequences; more are not computed together."""

_FEW = 1_000_000
"""Scores of a batch that are computed together whatever the padding."""


def whole_messages(rows: NamedTuple, lengths: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Log Z and messages with their offsets, from the rows that passes write."""
    batch_size, num_positions, num_labels = rows.alpha.shape
    alpha, beta = np.zeros((2, batch_size, num_positions + 1, num_labels))
    for b, length in enumerate(lengths):
        alpha[b, 1 : length + 1] = rows.alpha[b, :length] + rows.forward[b, 1 : length + 1, None]
        beta[b, 1 : length + 1] = rows.beta[b, :length] + rows.backward[b, length - 1 :: -1, None]
    return tuple(map(torch.from_numpy, (rows.total.sum(1), alpha, beta)))


def chunk_bounds(length: int, step: int, cuts: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Bounds of chunks of at most `step` positions, with none across a cut.

    As few as there can be, and between two cuts equal to a position: threads share them.

    Examples
    --------
    >>> chunk_bounds(10, 4, [5])
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    edges = sorted({0, length, *(int(cut) for cut in cuts)})
    bounds = []
    for first, stop in itertools.pairwise(edges):
        count = -(-(stop - first) // step)
        inner = [first + (stop - first) * i // count for i in range(count + 1)]
        bounds.extend(itertools.pairwise(inner))
    return bounds


def counted_chunks(chunks: np.ndarray, core: np.ndarray | None) -> np.ndarray | slice:
    """Index of the chunks (N, 3) that are in the core (B, 2) of their sequence; all without one."""
    if core is None:
        return slice(None)
    own = core[chunks[:, 0]]
    return np.flatnonzero((chunks[:, 1] >= own[:, 0]) & (chunks[:, 2] <= own[:, 1]))


def sum_of_chunks(parts: np.ndarray, chunks: np.ndarray, batch_size: int) -> np.ndarray:
    """Sums of the parts (N, ...) of each sequence's chunks, in their order, (B, ...)."""
    if len(chunks) == batch_size and (chunks[:, 1] == 0).all():
        return parts
    total = np.zeros((batch_size, *parts.shape[1:]))
    for sequence, part in zip(chunks[:, 0], parts, strict=True):
        total[sequence] += part
    return total


def groups_of(lengths: np.ndarray, num_positions: int) -> list[np.ndarray]:
    """Indices of the sequences in groups of similar lengths, if most of the batch is padding.

    Examples
    --------
    >>> [group.tolist() for group in groups_of(np.array([900, 20, 1000, 30, 25]), 1000)]
    [[0, 1, 2, 3, 4]]
    >>> [group.tolist() for group in groups_of(np.array([30, 20, 1000, 30, 25]), 1000)]
    [[1, 4, 0, 3], [2]]
    """
    if _MOST_PADDING * lengths.sum() >= len(lengths) * num_positions:
        return [np.arange(len(lengths))]
    order = np.argsort(lengths, kind="stable")
    starts, shortest = [], 0
    for i, length in enumerate(lengths[order]):
        if length > _MOST_PADDING * shortest:
            starts.append(i)
            shortest = length
    return np.split(order, starts[1:])


def gradients_by_length(
    p: Potentials,
    wanted: set[str],
    gradients: Callable[[Potentials, set[str]], tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`gradients` of sequences of similar lengths at a time: messages have a row for padding, too.

    See `flash_semicrf.streaming.dispatch.Backend`.
    """
    groups = groups_of(p.lengths.numpy(), p.num_positions)
    if len(groups) == 1 or p.scores.numel() < _FEW:
        return gradients(p, wanted)
    log_z = torch.empty(p.batch_size, dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for group in map(torch.from_numpy, groups):
        longest = int(p.lengths[group[-1]])
        named = p.parameters()
        rows = {name: named[name][group, :longest] for name in BY_SEQUENCE if name in named}
        log_z[group], parts = gradients(p.replace(lengths=p.lengths[group], **rows), wanted)
        for name, part in parts.items():
            by_sequence = name in BY_SEQUENCE
            positions = (p.num_positions,) if by_sequence else ()
            shape = (p.batch_size, *positions, *part.shape[1 + by_sequence :])
            if name not in found:  # by numpy: pages that stay zero are not written
                found[name] = torch.from_numpy(np.zeros(shape, part.numpy().dtype))
            whole = found[name]
            if by_sequence:
                whole[group, :longest] = part
            else:
                whole[group] = part
    return log_z, found


def boundary_products(
    start: np.ndarray, end: np.ndarray, lengths: np.ndarray, wanted: set[str]
) -> dict[str, np.ndarray]:
    """Products for the parameters by position, and for the final scores, from starts and ends.

    Parameters
    ----------
    start, end : arrays of shape (B, T, C)
        Derivatives of the marginals of starts and ends.
    lengths : array of shape (B,)
    wanted : set of str
    """
    found = {"start_scores": start, "end_scores": end}
    found["final_scores"] = end[np.arange(len(end)), lengths - 1]
    if "scores" in wanted:
        inside = start.copy()
        inside[:, 1:] -= end[:, :-1]
        np.cumsum(inside, 1, out=inside)
        inside[np.arange(start.shape[1]) >= lengths[:, None]] = 0.0
        found["scores"] = inside
    return found

"""Linear scan with a window of pending messages as its only state.

    alpha_n(c) = sum_k sum_c' edge[n-k, k, c, c'] * alpha_{n-k}(c')

in the semiring's sum and product. From node n every longer segment is pushed at once: entry k of
the window is what has arrived so far at node n+k. Each step is one product and one sum of size
(K-1)·C², and one sum of size (K-1)·C; the window has (K-1)·C entries. There is no recursion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import accumulator_dtype
from flash_semicrf.semirings.base import Element, Semiring

__all__ = ["block_length", "linear_scan", "message", "num_durations", "select_ends"]


def num_durations(edges: Tensor, lengths: Tensor) -> tuple[int, int]:
    """Number of steps to the last node of the longest sequence, and of durations that fit."""
    steps = int(lengths.max()) - 1
    return steps, min(edges.shape[-3] - 1, steps)


def block_length(steps: int) -> int:
    """Number of steps per call of ``Semiring.run``: about the square root of all."""
    return max(1, math.isqrt(steps))


def message(semiring: Semiring, element: Element, shape: tuple[int, ...], edges: Tensor) -> Tensor:
    """``semiring.full`` in the accumulator's dtype, so that sums of hundreds of steps stay exact.

    In float32 every step would round log Z again: marginals would be off by 1e-4 at N = 256.
    """
    like = edges.new_empty(0, dtype=accumulator_dtype(edges.device))
    return semiring.full(element, shape, like)


def select_ends(node: int, lengths: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """`value` (size, B, C) for the sequences whose last node is `node`, else `other`."""
    return torch.where((lengths == node + 1)[:, None], value, other)


def linear_scan(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over all paths.

    Parameters
    ----------
    semiring : Semiring
    edges : Tensor of shape (..., B, N-1, K, C, C)
        Potentials, with the leading axes that ``semiring.convert`` needs.
    lengths : int64 Tensor of shape (B,)
        Nodes of each sequence, in [1, N].

    Returns
    -------
    Tensor of shape (size, B)
    """
    steps, durations = num_durations(edges, lengths)
    shape = (edges.shape[-5], edges.shape[-1])
    zero = message(semiring, semiring.zero, shape, edges)
    alpha = message(semiring, semiring.one, shape, edges)
    final = select_ends(0, lengths, alpha, zero)
    ends = set((lengths - 1).tolist())
    if durations:
        window = zero[..., None, :].expand(*zero.shape[:-1], durations, zero.shape[-1])
        used = edges[..., :steps, 1 : durations + 1, :, :]
        start = 0
        for block in used.split(block_length(steps), -4):
            # A default argument: the block is called again, after the loop, when recomputed.
            def run_block(
                part: Tensor, alpha: Tensor, window: Tensor, final: Tensor, node: int = start
            ) -> tuple[Tensor, Tensor, Tensor]:
                for step in part.unbind(-4):
                    alpha, window = _push(semiring, step, alpha, window, zero)
                    node += 1
                    if node in ends:
                        final = select_ends(node, lengths, alpha, final)
                return alpha, window, final

            alpha, window, final = semiring.run(run_block, block, alpha, window, final)
            start += block.shape[-4]
    return semiring.sum(final, -1)


def _push(
    semiring: Semiring, step: Tensor, alpha: Tensor, window: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the segments that start at a node to the window; return the next message and window."""
    terms = semiring.mul(semiring.convert(step), alpha[..., None, None, :])
    window = semiring.plus(window, semiring.sum(terms, -1))
    return window[..., 0, :], torch.cat([window[..., 1:, :], zero[..., None, :]], -2)

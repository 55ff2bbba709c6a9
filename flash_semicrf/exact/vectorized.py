"""Vectorised scan: all edges that arrive at a node in one product, with messages kept.

    alpha_n(c) = sum over k, c' of edge[n-k, k, c, c'] * alpha_{n-k}(c')

Where the semiring has an `edge_gradient` (log, std), the gradient comes from the messages of a
second pass, from the end, and one sweep over the edges; only O(TC) is kept between the passes,
nothing of the size of the edges. Other semirings are differentiated by autograd, which keeps
windows of messages, O(TKC), and a copy of the edges sorted by the node of arrival.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_semicrf.exact.scan import block_length, message, num_durations, select_ends
from flash_semicrf.semirings.base import EdgeGradient, Semiring

__all__ = ["arrivals", "forward_messages", "vectorized_scan"]

_SWEEP = 2**18  # numbers of the gradient computed at a time: they stay in cache


def vectorized_scan(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over all paths; parameters and result as `flash_semicrf.exact.scan.linear_scan`."""
    if semiring.edge_gradient is not None:
        total: Tensor = _TwoPasses.apply(  # type: ignore[no-untyped-call]  # torch's
            semiring, edges, lengths
        )
        return total
    return _window_scan(semiring, edges, lengths)


def arrivals(semiring: Semiring, edges: Tensor, steps: int, durations: int) -> Tensor:
    """Edges by the node of their arrival: (..., B, durations, steps, C, C).

    Entry [k-1, n-1] is ``edge[n-k, k]``, and forbidden where n < k. Row k is shifted by k places
    by reading rows one shorter than they are.
    """
    rows = edges[..., :steps, 1 : durations + 1, :, :].transpose(-4, -3)
    forbidden = -math.inf if semiring.log_domain else 0.0
    rows = F.pad(rows, (0, 0, 0, 0, 0, durations), value=forbidden)
    width = steps + durations
    flat = rows.flatten(-4, -3)[..., : durations * (width - 1), :, :]
    shifted: Tensor = flat.unflatten(-3, (durations, width - 1))
    return shifted[..., :steps, :, :]


def _window_scan(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    steps, durations = num_durations(edges, lengths)
    shape = (edges.shape[-5], edges.shape[-1])
    zero = message(semiring, semiring.zero, shape, edges)
    alpha = message(semiring, semiring.one, shape, edges)
    final = select_ends(0, lengths, alpha, zero)
    ends = set((lengths - 1).tolist())
    if durations:
        older = zero[..., None, :].expand(*zero.shape[:-1], durations - 1, zero.shape[-1])
        window = torch.cat([alpha[..., None, :], older], -2)
        start = 0
        for block in arrivals(semiring, edges, steps, durations).split(block_length(steps), -3):
            # A default argument: the block is called again, after the loop, when recomputed.
            def run_block(
                part: Tensor, window: Tensor, final: Tensor, node: int = start
            ) -> tuple[Tensor, Tensor]:
                for step in part.unbind(-3):
                    terms = semiring.mul(semiring.convert(step), window[..., None, :])
                    alpha = semiring.sum(semiring.sum(terms, -1), -2)
                    window = torch.cat([alpha[..., None, :], window[..., :-1, :]], -2)
                    node += 1
                    if node in ends:
                        final = select_ends(node, lengths, alpha, final)
                return window, final

            window, final = semiring.run(run_block, block, window, final)
            start += block.shape[-3]
    return semiring.sum(final, -1)


def forward_messages(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the paths from the first node to each, by label: (size, B, N, C), without gradient.

    Rows after a sequence's last node are arbitrary.
    """
    edges = edges.detach().contiguous()
    steps, durations = num_durations(edges, lengths)
    batch, num_labels = edges.shape[-5], edges.shape[-1]
    shape = (batch, edges.shape[-4] + 1, num_labels)
    alpha = message(semiring, semiring.zero, shape, edges).clone()
    alpha[:, :, 0] = message(semiring, semiring.one, (batch, num_labels), edges)
    *front, by_node, by_duration, row, column = edges.stride()
    for node in range(1, steps + 1):
        count = min(node, durations)
        if not count:
            break
        # Sources in rising order are durations in falling order: a view, with a stride of both.
        step = edges.as_strided(
            (*edges.shape[:-4], count, num_labels, num_labels),
            (*front, by_node - by_duration, row, column),
            edges.storage_offset() + (node - count) * by_node + count * by_duration,
        )
        terms = semiring.mul(semiring.convert(step), alpha[:, :, node - count : node, None])
        alpha[:, :, node] = semiring.sum(semiring.sum(terms, -1), -2)
    return alpha


def _backward_messages(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the paths from each node to the last: (size, B, N + durations, C)."""
    steps, durations = num_durations(edges, lengths)
    batch, num_labels = edges.shape[-5], edges.shape[-1]
    shape = (batch, steps + 1 + durations, num_labels)
    beta = message(semiring, semiring.zero, shape, edges).clone()
    one = message(semiring, semiring.one, (batch, num_labels), edges)
    ends = set((lengths - 1).tolist())
    for node in range(steps, -1, -1):
        if node < steps and durations:
            step = semiring.convert(edges[..., node, 1 : durations + 1, :, :])
            after = beta[:, :, node + 1 : node + 1 + durations, :, None]
            beta[:, :, node] = semiring.sum(semiring.sum(semiring.mul(step, after), -2), -2)
        if node in ends:
            beta[:, :, node] = select_ends(node, lengths, one, beta[:, :, node])
    return beta


class _TwoPasses(torch.autograd.Function):
    """Total of all paths, and its gradient from messages before and after each edge."""

    @staticmethod
    def forward(ctx: Any, semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
        alpha = forward_messages(semiring, edges, lengths)
        index = (lengths - 1).view(1, -1, 1, 1).expand(len(alpha), -1, 1, alpha.shape[-1])
        total = semiring.sum(alpha.gather(2, index)[:, :, 0], -1)
        ctx.semiring = semiring
        ctx.save_for_backward(edges, lengths, alpha, total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        edges, lengths, alpha, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiable again
            again = _window_scan(ctx.semiring, edges, lengths)
            (gradient,) = torch.autograd.grad(again, edges, upstream, create_graph=True)
            return None, gradient, None
        steps, durations = num_durations(edges, lengths)
        gradient = torch.zeros_like(edges)
        if durations:
            beta = _backward_messages(ctx.semiring, edges, lengths)
            # (size, B, steps, durations, C): what comes after the edge of each node and duration.
            after = beta[:, :, 1:-1].unfold(2, durations, 1).transpose(-1, -2)
            derivative = ctx.semiring.edge_gradient
            _sweep(ctx.semiring, derivative, edges, alpha, after, total, upstream, gradient)
        return None, gradient, None


def _sweep(
    semiring: Semiring,
    derivative: EdgeGradient,
    edges: Tensor,
    alpha: Tensor,
    after: Tensor,
    total: Tensor,
    upstream: Tensor,
    gradient: Tensor,
) -> None:
    """Write the gradient of every edge that a path can take."""
    steps, durations = after.shape[2:4]
    rows = max(1, _SWEEP // (edges.shape[-5] * durations * edges.shape[-1] ** 2))
    for first in range(0, steps, rows):
        nodes = slice(first, min(first + rows, steps))
        part = (..., nodes, slice(1, durations + 1), slice(None), slice(None))
        found = derivative(
            alpha[:, :, nodes, None, None, :],
            semiring.convert(edges[part]),
            after[:, :, nodes, :, :, None],
            total[:, :, None, None, None, None],
        )
        gradient[part] = found * upstream[0, :, None, None, None, None]

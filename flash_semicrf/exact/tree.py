"""The binary tree: the transfer matrices of all steps multiplied in pairs, O(log N) deep.

The state at a node is its last M/C messages, M = C·min(K-1, N-1). A step's M x M matrix computes
the new message from them (top rows) and moves the others down by one (below). Multiplying two
costs M³ and, with a generic semiring, M³ numbers of memory: scans are cheaper almost everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.exact.scan import num_durations
from flash_semicrf.exact.vectorized import arrivals
from flash_semicrf.semirings.base import Semiring

__all__ = ["binary_tree", "close_tree", "multiply_pairs", "transfer_matrices", "tree_bytes"]


def tree_bytes(semiring: Semiring, edges: Tensor, lengths: Tensor) -> int:
    """Bytes of the first level: its matrices, their products and the terms of the products."""
    steps, durations = num_durations(edges, lengths)
    side = durations * edges.shape[-1]
    matrices = edges.shape[-5] * steps
    products = matrices // 2
    numbers = semiring.size * (matrices + products) * side**2
    return edges.element_size() * (
        numbers + (semiring.matmul_terms(products, side, side, side) if products else 0)
    )


def transfer_matrices(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Matrix of every step, (size, B, N-1, M, M); the identity after a sequence's last node."""
    steps, durations = num_durations(edges, lengths)
    num_labels = edges.shape[-1]
    side = durations * num_labels
    # (..., B, steps, C_dst, durations * C_src)
    top = arrivals(semiring, edges, steps, durations).movedim(-4, -2).flatten(-2)
    zero = semiring.full(semiring.zero, (side, side), edges)
    one = semiring.full(semiring.one, (side, side), edges)
    index = torch.arange(side, device=edges.device)
    identity = torch.where(index[:, None] == index, one, zero)
    shift = torch.where(index[:, None] == index + num_labels, one, zero)[:, num_labels:]
    shift = shift[:, None, None].expand(-1, edges.shape[-5], steps, -1, -1)
    matrices = torch.cat([semiring.convert(top), shift], -2)
    node = torch.arange(1, steps + 1, device=edges.device)
    inside = node < lengths[:, None]
    return torch.where(inside[..., None, None], matrices, identity[:, None, None])


def binary_tree(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over all paths; parameters and result as `flash_semicrf.exact.scan.linear_scan`."""
    steps, durations = num_durations(edges, lengths)
    batch, num_labels = edges.shape[-5], edges.shape[-1]
    if not durations:
        one = semiring.full(semiring.one, (batch, num_labels), edges)
        zero = semiring.full(semiring.zero, (batch, num_labels), edges)
        return semiring.sum(torch.where((lengths == 1)[:, None], one, zero), -1)
    x = transfer_matrices(semiring, edges, lengths)
    while x.shape[2] > 2:
        x = multiply_pairs(semiring, x)
    return close_tree(semiring, x, num_labels)


def multiply_pairs(semiring: Semiring, x: Tensor) -> Tensor:
    """Next level of the tree: products of later and earlier steps, and an unpaired last one."""
    even = x.shape[2] // 2 * 2
    product = semiring.matmul(x[:, :, 1:even:2], x[:, :, 0:even:2])
    return torch.cat([product, x[:, :, even:]], 2)


def close_tree(semiring: Semiring, x: Tensor, num_labels: int) -> Tensor:
    """Total (size, B) of one or two matrices (size, B, 1 or 2, M, M): from node 0 to the last."""
    first = x[:, :, 0, :, :num_labels]
    if x.shape[2] == 1:
        between = first[..., :num_labels, :]
    else:
        between = semiring.matmul(x[:, :, 1, :num_labels, :], first)
    return semiring.sum(semiring.sum(between, -1), -1)

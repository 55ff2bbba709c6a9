"""Every path through a small edge tensor, listed: the oracle of the exact engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def random_edges(
    *shape: int, forbid: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Normal potentials, a fraction `forbid` of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randn(shape, generator=generator, dtype=torch.float64)
    dead = torch.rand(shape, generator=generator) < forbid
    return edges.masked_fill(dead, -torch.inf).to(dtype)


def node_sequences(num_nodes: int, num_durations: int) -> Iterator[list[int]]:
    """Nodes that a path from 0 to the last may visit, with steps below `num_durations`."""
    for picked in itertools.product((False, True), repeat=max(num_nodes - 2, 0)):
        inner = [n for n, visited in enumerate(picked, start=1) if visited]
        nodes = [0, *inner, num_nodes - 1] if num_nodes > 1 else [0]
        if all(b - a < num_durations for a, b in itertools.pairwise(nodes)):
            yield nodes


def paths(num_nodes: int, num_durations: int, num_labels: int) -> Iterator[list[tuple[int, ...]]]:
    """Paths as lists of edges (n, k, c_dst, c_src); the label of node 0 is free.

    Of a sequence of one node there are no edges to list: one path for each label.
    """
    for nodes in node_sequences(num_nodes, num_durations):
        for labels in itertools.product(range(num_labels), repeat=len(nodes)):
            yield [
                (nodes[i], nodes[i + 1] - nodes[i], labels[i + 1], labels[i])
                for i in range(len(nodes) - 1)
            ]


def path_scores(edges: Tensor, num_nodes: int) -> Tensor:
    """Score of each of `paths`, (number of paths,), for one sequence's (N-1, K, C, C) edges."""
    listed = paths(num_nodes, *edges.shape[1:3])
    scores = [sum((edges[edge] for edge in path), edges.new_zeros(())) for path in listed]
    return torch.stack(scores) if scores else edges.new_zeros(0)

"""Edge tensor of a problem: the score of every segment and transition.

    edge[b, s, k, c, c'] = sum of scores[s .. s+k-1, c] + duration_bias[k-1, c] + transition[c', c]
                           (+ start_scores[s, c] + end_scores[s+k-1, c]
                            + segment_scores[s, k-1, c] + transition_scores[s, c', c])

and at s = 0, where there is no preceding segment, the first segment's transition term in the column
c' = 0 and -inf in the others, so that paths and segmentations correspond one to one. `final_scores`
are part of the edges that arrive at the end of a sequence. With a duration tail, K is max(K, T).
The tensor has T·(K+1)·C² entries per sequence, which restricts it to small problems.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import (
    BY_POSITION,
    NEG_INF,
    Potentials,
    accumulator_dtype,
    first_term,
    ignored,
)
from flash_semicrf.problem.unroll import unrolled

__all__ = ["check_edge_memory", "edge_bytes", "edge_tensor"]


def edge_bytes(potentials: Potentials) -> int:
    """Size of the edge tensor of a problem, in bytes."""
    return math.prod(_shape(potentials)) * accumulator_dtype(potentials.device).itemsize


def _shape(p: Potentials) -> tuple[int, ...]:
    longest = p.max_duration if p.duration_tail is None else max(p.max_duration, p.num_positions)
    return (p.batch_size, p.num_positions, longest + 1, p.num_labels, p.num_labels)


def check_edge_memory(potentials: Potentials, threshold: float) -> None:
    """Raise ValueError if the edge tensor would take more than `threshold` bytes."""
    size = edge_bytes(potentials)
    if size > threshold:
        shape = _shape(potentials)
        raise ValueError(
            f"An edge tensor of shape (B, T, K+1, C, C) = {shape} would take {size} bytes "
            f"({size / 1e9:.3g} GB), more than `edge_memory_threshold`={threshold:.3g}; use "
            'backend="streaming", which builds none.'
        )


def edge_tensor(potentials: Potentials) -> Tensor:
    """Edge tensor of a problem.

    Parameters
    ----------
    potentials : Potentials
        Checked; see `flash_semicrf.problem.validation.check_potentials`.

    Returns
    -------
    Tensor of shape (B, T, K+1, C, C)
        ``edge[b, n, k, c_dst, c_src]`` in float64 (float32 on devices without it), for
        ``potentials.lengths + 1`` nodes; -inf if a segment is forbidden, passes the end of its
        sequence or has k = 0. Differentiable in every parameter.

    Examples
    --------
    >>> from flash_semicrf import SemiMarkov
    >>> from flash_semicrf.semirings import EntropySemiring
    >>> p = Potentials(
    ...     torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    ... )
    >>> entropy = SemiMarkov(EntropySemiring).sum(edge_tensor(p), p.lengths + 1)
    >>> round(float(entropy.exp()), 4)  # five segmentations, equally probable
    5.0
    """
    p = unrolled(_widened(potentials))
    num_labels = p.num_labels
    content = _content(p)
    between = p.transition.transpose(-1, -2)  # (C_dst, C_src), or (K, C_dst, C_src)
    if p.transition_scores is not None:
        between = between + _read(p, "transition_scores")[:, 1:, None].transpose(-1, -2)
    later = content[:, 1:, ..., None] + between
    first = first_term(p)  # (C,), or (K, C)
    start = (content[:, :1] + first)[..., None]
    closed = torch.full_like(start, -math.inf).expand(*start.shape[:-1], num_labels - 1)
    edges = torch.cat([torch.cat([start, closed], -1), later], 1)
    unused = edges.new_full((*edges.shape[:2], 1, num_labels, num_labels), -math.inf)
    return torch.cat([unused, edges], 2)


def _widened(p: Potentials) -> Potentials:
    """Problem in the accumulator's dtype, with -inf for everything forbidden."""
    # Compared in its own dtype: NEG_INF as a float32 is above NEG_INF as a float64.
    dead = {name: value <= NEG_INF for name, value in p.parameters().items()}
    p = p.to(accumulator_dtype(p.device))
    return p.replace(**{n: v.masked_fill(dead[n], -math.inf) for n, v in p.parameters().items()})


def _content(p: Potentials) -> Tensor:
    """Score of every segment [s, s+k) without its transition, (B, T, K, C)."""
    length = p.lengths[:, None]
    position = torch.arange(p.num_positions, device=p.device)
    given = p.parameters().keys() & {*BY_POSITION, "segment_scores"}
    blank = {name: _read(p, name) for name in given}
    # Summed by growing every segment by one position: a difference of running sums would cancel,
    # and has no value where scores are infinite.
    sums = torch.zeros_like(blank["scores"])
    rows = []
    for k in range(1, p.max_duration + 1):
        sums = sums + _ahead(blank["scores"], k - 1)
        row = sums + p.duration_bias[k - 1]
        if "start_scores" in blank:
            row = row + blank["start_scores"]
        if "end_scores" in blank:
            row = row + _ahead(blank["end_scores"], k - 1)
        if "segment_scores" in blank:
            row = row + blank["segment_scores"][:, :, k - 1]
        if p.final_scores is not None:
            row = torch.where((position + k == length)[..., None], row + p.final_scores, row)
        rows.append(row.masked_fill((position + k > length)[..., None], -math.inf))
    return torch.stack(rows, 2)


def _read(p: Potentials, name: str) -> Tensor:
    """A parameter by sequence, 0 where it is ignored."""
    return p.parameters()[name].masked_fill(ignored(p, name), 0.0)


def _ahead(x: Tensor, offset: int) -> Tensor:
    """Entry t + offset at position t, zeros past the end."""
    shifted = x[:, offset:]
    return torch.nn.functional.pad(shifted, (0, 0, 0, x.shape[1] - shifted.shape[1]))

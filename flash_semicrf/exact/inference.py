"""Inference on the edge tensor, for small problems and as a check of the streaming functions.

Values, gradients and ties are those of `flash_semicrf.streaming`; time and memory grow as T·K·C².
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.exact.edges import check_edge_memory, edge_tensor
from flash_semicrf.exact.semimarkov import SemiMarkov
from flash_semicrf.exact.vectorized import forward_messages
from flash_semicrf.inference.marginals import SegmentMarginals, fold_marginals
from flash_semicrf.inference.viterbi import check_feasible
from flash_semicrf.problem.constraints import Constraints, constrain, fold_table
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.unroll import fold_durations
from flash_semicrf.problem.validation import check_potentials
from flash_semicrf.semirings import LogSemiring, MaxSemiring
from flash_semicrf.semirings.checkpoint import CheckpointShardSemiring

__all__ = ["EDGE_BACKENDS", "log_partition", "segment_marginals", "viterbi_table"]

EDGE_BACKENDS = ("exact", "binary_tree_sharded")
"""The vectorised scan; the binary tree with checkpointed products in shards."""


def log_partition(
    potentials: Potentials,
    backend: str,
    threshold: float,
    *,
    constraints: Constraints | None = None,
) -> Tensor:
    """Log Z from the edge tensor.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        One of `EDGE_BACKENDS`.
    threshold : float
        Largest size of the edge tensor, and of the first level of a tree, in bytes.
    constraints : Constraints, optional
        Sum only over the segmentations that agree with them.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable any number of times in every parameter.

    Raises
    ------
    ValueError
        If an argument is invalid, or more than `threshold` bytes would be needed: raised before
        anything is allocated.
    """
    p = constrain(check_potentials(potentials), constraints)
    check_edge_memory(p, threshold)
    return _sum(edge_tensor(p), p.lengths + 1, backend, threshold)


def _sum(edges: Tensor, nodes: Tensor, backend: str, threshold: float) -> Tensor:
    """Log Z (B,) of edge tensors."""
    if backend == "exact":
        return SemiMarkov(LogSemiring).sum(edges, nodes, use_vectorized=True)
    tree = SemiMarkov(CheckpointShardSemiring(LogSemiring), memory_limit=threshold)
    return tree.sum(edges, nodes, use_linear_scan=False)


def segment_marginals(
    potentials: Potentials,
    backend: str,
    threshold: float,
    *,
    constraints: Constraints | None = None,
) -> SegmentMarginals:
    """Posterior marginals from the gradient of `log_partition`.

    Parameters and errors are those of `log_partition`.

    Returns
    -------
    SegmentMarginals
        As `flash_semicrf.segment_marginals`.
    """
    num_labels = check_potentials(potentials).num_labels
    p = constrain(potentials, constraints)
    names = ("scores", "start_scores", "end_scores")
    given = {name: getattr(p, name) for name in names}
    leaves = {
        name: (torch.zeros_like(p.scores) if value is None else value.detach()).requires_grad_()
        for name, value in given.items()
    }
    check_edge_memory(p, threshold)
    with torch.enable_grad():
        edges = edge_tensor(p.replace(**leaves))
        log_z = _sum(edges, p.lengths + 1, backend, threshold)
        feasible = log_z[log_z > -torch.inf].sum()
        wanted = [*(leaves[name] for name in names), edges]
        position, start, end, counts = torch.autograd.grad(feasible, wanted)
    duration = counts[:, :, 1:].sum((1, -1))
    transition = counts[:, 1:, 1:].sum(1).transpose(-1, -2)  # the first segment follows nothing
    tail, duration = fold_durations(duration, p.max_duration)
    _, transition = fold_durations(transition, p.max_duration)
    transition = transition if p.transition.dim() == 3 else transition.sum(1)
    found = SegmentMarginals(position, start, end, transition, duration, tail)
    if p.segment_scores is not None:
        segments = counts[:, :, 1:].sum(-1)
        segments[:, :, p.max_duration - 1] = segments[:, :, p.max_duration - 1 :].sum(2)
        found = found._replace(segment=segments[:, :, : p.max_duration])
    if p.transition_scores is not None:
        change = counts.sum(2).transpose(-1, -2)
        change[:, 0] = 0.0
        found = found._replace(change=change)
    return found if p.num_labels == num_labels else fold_marginals(found, num_labels)


def viterbi_table(
    potentials: Potentials,
    backend: str,
    threshold: float,
    *,
    constraints: Constraints | None = None,
) -> tuple[Tensor, SegmentTable]:
    """Best segmentations from the edge tensor, by one max scan for either backend.

    Parameters
    ----------
    potentials, backend, threshold, constraints
        As for `log_partition`.

    Returns
    -------
    scores : float64 Tensor of shape (B,)
    table : SegmentTable

    Raises
    ------
    ValueError
        As for `log_partition`, and if a sequence has no feasible segmentation; the message names
        it.
    """
    num_labels = check_potentials(potentials).num_labels
    p = constrain(potentials, constraints)
    check_edge_memory(p, threshold)
    with torch.no_grad():
        edges = edge_tensor(p)
        alpha = forward_messages(MaxSemiring(), edges, p.lengths + 1)[0]
        everyone = torch.arange(p.batch_size, device=p.device)
        scores = alpha[everyone, p.lengths].amax(-1)
        check_feasible(scores, constraints is not None)
        rows = [
            row
            for b, length in enumerate(p.lengths.tolist())
            for row in _walk(edges[b], alpha[b], b, length)
        ]
    columns = torch.tensor(rows, dtype=torch.int64, device=p.device).reshape(-1, 4)
    return scores, fold_table(SegmentTable(*columns.unbind(1)), num_labels)


def _walk(
    edges: Tensor, alpha: Tensor, sequence: int, stop: int
) -> list[tuple[int, int, int, int]]:
    """Rows of one sequence. Ties: the shortest last segment, then the lowest label."""
    rows = []
    ranks = alpha[stop]  # ranks the label of the segment that ends at `stop`
    while stop > 0:
        longest = min(stop, edges.shape[1] - 1)
        durations = torch.arange(1, longest + 1, device=edges.device)
        # (durations, C_dst, C_src)
        terms = edges[stop - durations, durations] + alpha[stop - durations, None]
        tied = (ranks == ranks.max()).nonzero()[:, 0].tolist()
        # argmax returns the first of equal entries: the shortest duration.
        k, label = min((int(terms[:, c].amax(-1).argmax()) + 1, c) for c in tied)
        rows.append((sequence, stop - k, stop, label))
        ranks = terms[k - 1, label]
        stop -= k
    return rows[::-1]

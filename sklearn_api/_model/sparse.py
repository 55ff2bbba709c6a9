"""Mini-batches of sparse features, and the linear model's scores of them, never made dense.

A batch is a COO tensor of shape (B, T, D) whose padding holds no entries. Its product with the
weights of the head's projections is one sparse product of B * T rows; the gradient by the weights
is another one, with the transpose.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.potentials import Potentials, center_scores

__all__ = ["linear_layers", "pad_sparse", "problem_of_scores", "project_sparse"]


def pad_sparse(values: list[sp.csr_array]) -> tuple[Tensor, Tensor]:
    """Stack (T_i, D) CSR matrices into a (B, T, D) COO tensor; also return lengths (B,)."""
    lengths = np.array([value.shape[0] for value in values])
    rows = sp.vstack(values, format="csr").tocoo()
    rows.sum_duplicates()
    offsets = np.cumsum(lengths) - lengths
    row, column = rows.row.astype(np.int64), rows.col.astype(np.int64)
    sequence = np.repeat(np.arange(len(values)), lengths)[row]
    indices = np.stack([sequence, row - offsets[sequence], column])
    order = np.lexsort(indices[::-1])
    x = torch.sparse_coo_tensor(
        torch.from_numpy(indices[:, order]),
        torch.from_numpy(rows.data[order]),
        (len(values), int(lengths.max()), rows.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )
    return x, torch.from_numpy(lengths)


def linear_layers(head: SemiMarkovCRFHead) -> list[nn.Linear]:
    """The projections of a head, whose weights are multiplied with sparse features.

    Raises
    ------
    TypeError
        For a module that does more than multiply by its weights: another class, adapters, hooks,
        pruning or a parametrization.
    """
    layers = []
    for name in ("projection", "boundary_projection"):
        layer = getattr(head, name)
        if layer is None:
            continue
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            raise TypeError(
                f"`{name}` must be a plain nn.Linear, without hooks or pruning, for sparse X, "
                f"which is multiplied with its weights; got {type(layer).__name__}. Pass dense X."
            )
        layers.append(layer)
    return layers


def project_sparse(head: SemiMarkovCRFHead, x: Tensor) -> Tensor:
    """Scores by a head's projections.

    Parameters
    ----------
    head : SemiMarkovCRFHead
    x : COO Tensor of shape (B, T, D)

    Returns
    -------
    Tensor of shape (B, T, C), or (B, T, 3C) with boundary scores
        Scores of labels, starts and ends; differentiable in the projections.
    """
    layers = linear_layers(head)
    count, length, width = x.shape
    sequence, position, column = x.indices()
    rows = torch.sparse_coo_tensor(
        torch.stack([sequence * length + position, column]),
        x.values(),
        (count * length, width),
        is_coalesced=True,
        check_invariants=False,
    )
    scores = []
    for layer in layers:
        product = torch.sparse.mm(rows, layer.weight.T)
        scores.append(product if layer.bias is None else product + layer.bias)
    return torch.cat(scores, -1).view(count, length, -1)


def problem_of_scores(head: SemiMarkovCRFHead, scores: Tensor, lengths: Tensor) -> Potentials:
    """The centred problem of scores that `project_sparse` returns."""
    parts = scores.split(head.num_classes, -1)
    problem = head.potentials_of_scores(parts[0], lengths, *parts[1:])
    return problem.replace(scores=center_scores(problem.scores, lengths)[0])

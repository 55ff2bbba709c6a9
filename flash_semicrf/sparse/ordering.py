"""Bandwidth of matrices, and orderings of their rows that reduce it.

No ordering reduces the bandwidth below half of the largest number of neighbours of a state: a state
with transitions to all others, such as the start of a segment to every duration, keeps the matrix
wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.problem.validation import check_positive_int, check_tensor
from flash_semicrf.sparse.banded import BandedMatrix

__all__ = [
    "apply_permutation",
    "measure_effective_bandwidth",
    "rcm_ordering_from_adjacency",
    "snake_ordering",
]


def measure_effective_bandwidth(adj: Tensor | BandedMatrix, fill_value: float | None = None) -> int:
    """Largest distance from the main diagonal at which there is an entry.

    Parameters
    ----------
    adj : Tensor of shape (n, n) or (batch, n, n), or BandedMatrix
        For a batch, the bandwidth that covers the entries of all its matrices.
    fill_value : float, optional
        Value of absent entries. By default the `fill` of a BandedMatrix; for a Tensor, all values
        <= NEG_INF if there are any, else 0.

    Returns
    -------
    int
        0 for a diagonal matrix and for one without entries.

    Raises
    ------
    TypeError, ValueError
        If `adj` is not a Tensor or BandedMatrix, or the matrices are not square.

    Examples
    --------
    >>> adj = torch.eye(5)
    >>> measure_effective_bandwidth(adj)
    0
    >>> adj[0, 4] = 1
    >>> measure_effective_bandwidth(adj)
    4
    """
    if isinstance(adj, BandedMatrix):
        offset = torch.arange(-adj.ld, adj.lu + 1, device=adj.data.device)
        row = torch.arange(adj.size, device=adj.data.device)
        column = row[:, None] + offset
        fill = adj.fill if fill_value is None else fill_value
        present = _present(adj.data, fill) & (column >= 0) & (column < adj.size)
        outside = _present(adj.data.new_tensor(adj.fill), fill)
        if adj.data.numel() and bool(outside) and min(adj.lu, adj.ld) < adj.size - 1:
            return adj.size - 1
        distance = offset.abs().expand_as(present)
    else:
        _check_square("adj", adj)
        present = _present(adj, fill_value)
        row = torch.arange(adj.shape[-1], device=adj.device)
        distance = (row[:, None] - row).abs().expand_as(present)
    return int((distance * present).max()) if present.numel() else 0


def _check_square(name: str, matrix: Tensor) -> None:
    check_tensor(name, matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"`{name}` must have shape (n, n) or (batch, n, n); got {tuple(matrix.shape)}."
        )


def _present(value: Tensor, fill_value: float | None) -> Tensor:
    """Mask of the entries of a matrix; see `measure_effective_bandwidth`."""
    if fill_value is None:
        fill_value = NEG_INF if bool((value <= NEG_INF).any()) else 0.0
    return value > NEG_INF if fill_value <= NEG_INF else value != fill_value


def snake_ordering(K: int, C: int) -> Tensor:
    """Ordering of the states of K durations and C labels that alternates short and long durations.

    The durations are 0, K-1, 1, K-2, ..., each with all its labels. This reduces the bandwidth of a
    matrix whose entries lie near the antidiagonal, where k1 + k2 is near K - 1: durations that
    together fill a span become neighbours. It cannot reduce that of a matrix in which some duration
    is combined with all others.

    Parameters
    ----------
    K, C : int
        Number of durations and of labels, >= 1.

    Returns
    -------
    int64 Tensor of shape (K * C,)
        States in their new order; k * C + c is the state of duration index k and label c.

    Raises
    ------
    ValueError
        If K or C is not a positive integer.

    Examples
    --------
    >>> snake_ordering(5, 1)
    tensor([0, 4, 1, 3, 2])
    >>> snake_ordering(3, 2)
    tensor([0, 1, 4, 5, 2, 3])
    """
    check_positive_int("K", K)
    check_positive_int("C", C)
    i = torch.arange(K)
    duration = torch.where(i % 2 == 0, i // 2, K - 1 - i // 2)
    return (duration[:, None] * C + torch.arange(C)).flatten()


def rcm_ordering_from_adjacency(adj: Tensor) -> tuple[Tensor, bool]:
    """Reverse Cuthill-McKee ordering of the states, by SciPy.

    A heuristic: the result need not have the smallest bandwidth, nor a smaller one than before.

    Parameters
    ----------
    adj : Tensor of shape (n, n) or (batch, n, n)
        States i and j are neighbours where (i, j) or (j, i) has an entry in any matrix of the
        batch, as defined for `measure_effective_bandwidth`.

    Returns
    -------
    permutation : int64 Tensor of shape (n,)
        States in their new order.
    success : bool
        False if SciPy cannot be imported; the order is then that of `adj`.

    Raises
    ------
    TypeError, ValueError
        If `adj` is not a Tensor, or the matrices are not square.

    References
    ----------
    E. Cuthill and J. McKee, Reducing the Bandwidth of Sparse Symmetric Matrices, 1969.
    A. George, Computer Implementation of the Finite Element Method, 1971: the reversal.

    Examples
    --------
    >>> ring = torch.eye(6).roll(1, 0)
    >>> measure_effective_bandwidth(ring)
    5
    >>> perm, success = rcm_ordering_from_adjacency(ring)
    >>> measure_effective_bandwidth(apply_permutation(ring, perm))
    2
    """
    _check_square("adj", adj)
    n = adj.shape[-1]
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError:
        return torch.arange(n, device="cpu"), False
    if n == 0:
        return torch.arange(0, device="cpu"), True
    present = _present(adj.detach(), None).reshape(-1, n, n).any(0)
    graph = csr_array((present | present.T).cpu().numpy())
    order = reverse_cuthill_mckee(graph, symmetric_mode=True)
    return torch.from_numpy(order.astype("int64")), True


def apply_permutation(potentials: Tensor, perm: Tensor) -> Tensor:
    """Reorder rows and columns of matrices: ``result[i, j] = matrix[perm[i], perm[j]]``.

    Parameters
    ----------
    potentials : Tensor of shape (batch, n, n)
        Any number of batch axes is allowed.
    perm : int64 Tensor of shape (n,)
        Every index from 0 to n-1 once.

    Returns
    -------
    Tensor of the shape of `potentials`
        Differentiable.

    Raises
    ------
    TypeError, ValueError
        If the matrices are not square, or `perm` is not a permutation of their rows.

    Examples
    --------
    >>> matrix = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> apply_permutation(matrix, torch.tensor([1, 0]))
    tensor([[3., 2.],
            [1., 0.]])
    """
    _check_square("potentials", potentials)
    check_tensor("perm", perm)
    n = potentials.shape[-1]
    perm = perm.to(potentials.device)
    if tuple(perm.shape) != (n,) or not torch.equal(
        perm.sort().values, torch.arange(n, device=perm.device, dtype=perm.dtype)
    ):
        raise ValueError(
            f"`perm` must hold every index in [0, n-1={n - 1}] once; got {perm.tolist()}."
        )
    return potentials[..., perm[:, None], perm[None, :]]

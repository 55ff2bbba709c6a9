"""The features of all positions as one matrix, dense or CSR, and its products on all threads."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from flash_semicrf.streaming.cpu import threads
from flash_semicrf.streaming.cpu.jit import kernel_of_loops
from flash_semicrf.streaming.cpu.tasks import take

__all__ = ["FeatureMatrix", "identical_columns", "stack_rows"]

_ENTRIES = 1 << 15
"""Entries of a sparse matrix that a thread multiplies at a time."""

_ENTRY = 10.0
"""Cost of an entry and a column; see `flash_semicrf.streaming.cpu.threads.position_cost`."""


def stack_rows(values: list[Any]) -> Any:
    """Stack the (T_i, D) matrices of sequences: an ndarray, or a CSR matrix of sparse ones."""
    if sp.issparse(values[0]):
        return values[0].tocsr() if len(values) == 1 else sp.vstack(values, format="csr")
    return np.concatenate(values)


def identical_columns(columns: sp.csc_matrix, seed: int = 0) -> np.ndarray:
    """Number the distinct columns of a sparse matrix.

    Columns are distinguished by two sums of random 64-bit numbers, one for each of their entries:
    two different columns are taken for one with a probability of 2^-128.

    Parameters
    ----------
    columns : CSC matrix of shape (N, D)
        Without explicit zeros; its indices are sorted.

    Returns
    -------
    int64 ndarray of shape (D,)
        Equal for columns that are equal.
    """
    rng = np.random.default_rng(seed)
    bits = _mixed(columns.data.astype(np.float64).view(np.uint64))
    ends = np.zeros((len(columns.data) + 1, 2), dtype=np.uint64)
    for i in range(2):
        row = rng.integers(2**64, size=columns.shape[0], dtype=np.uint64)
        ends[1:, i] = np.cumsum(_mixed(row[columns.indices] + bits), dtype=np.uint64)
    sums = ends[columns.indptr[1:]] - ends[columns.indptr[:-1]]
    keys = np.ascontiguousarray(sums).view([("a", np.uint64), ("b", np.uint64)]).ravel()
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spread the bits of 64-bit numbers, so that different terms have different sums."""
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return x ^ (x >> np.uint64(29))


class FeatureMatrix:
    """Features of all training positions, with products for a linear model and its gradient.

    Columns of a sparse matrix that are equal in training, as those of words seen once are, get
    equal weights from an L2 penalty. They are merged: g columns x of weight w each, with penalty
    g w^2, are one column sqrt(g) x of weight v = sqrt(g) w, with penalty v^2. The optimum is the
    same, with fewer variables.

    Parameters
    ----------
    rows : ndarray or CSR matrix of shape (N, D)

    Attributes
    ----------
    num_columns : int
        Columns D' after merging.
    multiplicity : ndarray of shape (D',)
        Columns merged into each.
    squares : float64 ndarray of shape (D',)
        Sum of the squares of each column.
    """

    def __init__(self, rows: Any) -> None:
        self.sparse = sp.issparse(rows)
        self.shape = rows.shape
        if not self.sparse:
            self.rows, self.num_columns = rows, rows.shape[1]
            self.column = np.arange(self.num_columns)
            self.multiplicity = np.ones(self.num_columns)
            self.squares = np.square(rows, dtype=np.float64).sum(0)
            return
        columns = rows.tocsc(copy=True)
        columns.sum_duplicates()
        columns.eliminate_zeros()
        self.column = _by_first_row(columns, identical_columns(columns))
        self.multiplicity = np.bincount(self.column).astype(float)
        self.num_columns = len(self.multiplicity)
        first = np.zeros(self.num_columns, dtype=np.int64)
        first[self.column[::-1]] = np.arange(len(self.column))[::-1]
        scale = np.sqrt(self.multiplicity).astype(rows.dtype)
        merged = columns[:, first] @ sp.diags_array(scale).tocsc()
        merged = sp.csc_matrix(merged, dtype=rows.dtype)
        squared = merged.copy()
        squared.data = np.square(squared.data, dtype=np.float64)
        self.squares = np.asarray(squared.sum(0)).ravel()
        self._rows = _Rows.of(merged.tocsr())
        self._transposed = _Rows.of(merged.T.tocsr())

    def reduced(self, rows: Any) -> FeatureMatrix:
        """Other rows (N, D) of the same columns, for weights of these merged columns.

        Only its `product` is of use.
        """
        other = copy.copy(self)
        other.shape = rows.shape
        if not self.sparse:
            other.rows = rows
            return other
        shares = (1 / np.sqrt(self.multiplicity))[self.column].astype(rows.dtype)
        where = (np.arange(len(self.column)), self.column)
        merge = sp.csr_matrix((shares, where), (len(self.column), self.num_columns))
        other._rows = _Rows.of(sp.csr_matrix(rows @ merge, dtype=rows.dtype))
        return other

    def product(self, weights: np.ndarray) -> np.ndarray:
        """X @ W: (D', P) to (N, P)."""
        if not self.sparse:
            return self.rows @ weights
        out = np.empty((self.shape[0], weights.shape[1]), weights.dtype)
        return _product(self._rows, weights, out)

    def transposed_product(self, values: np.ndarray, out: np.ndarray) -> None:
        """Write X.T @ G: (N, P) to (D', P)."""
        if self.sparse:
            _product(self._transposed, values, out)
        else:
            np.matmul(self.rows.T, values, out=out)

    def merge(self, weights: np.ndarray) -> np.ndarray:
        """Weights (D', P) of the merged columns that stand for those (D, P) of all columns."""
        if not self.sparse:
            return weights
        merged = np.zeros((self.num_columns, weights.shape[1]), weights.dtype)
        np.add.at(merged, self.column, weights)
        return merged / np.sqrt(self.multiplicity)[:, None].astype(weights.dtype)

    def expand(self, weights: np.ndarray) -> np.ndarray:
        """Weights (D, P) of all columns, from those (D', P) of the merged ones."""
        if not self.sparse:
            return weights
        shared = weights / np.sqrt(self.multiplicity)[:, None].astype(weights.dtype)
        return shared[self.column]


def _by_first_row(columns: sp.csc_matrix, number: np.ndarray) -> np.ndarray:
    """Number the distinct columns by the row they first occur in.

    Most columns are rare, and a product then finds those of neighbouring rows side by side.
    """
    occurs = np.flatnonzero(np.diff(columns.indptr))
    first = np.full(int(number.max(initial=-1)) + 1, columns.shape[0])
    first[number[occurs]] = columns.indices[columns.indptr[occurs]]
    rank = np.empty_like(first)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[number]


class _Rows(NamedTuple):
    """A CSR matrix, and the first row of each of the blocks that it is multiplied by."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    cuts: np.ndarray

    @staticmethod
    def of(matrix: sp.csr_matrix) -> _Rows:
        """Cut into blocks with about `_ENTRIES` entries."""
        targets = np.arange(_ENTRIES, matrix.nnz, _ENTRIES)
        inner = np.searchsorted(matrix.indptr, targets)
        cuts = np.unique(np.concatenate([[0], inner, [matrix.shape[0]]]))
        return _Rows(matrix.indptr, matrix.indices, matrix.data, cuts)


@kernel_of_loops
def _multiply(queue, rows, dense, out):
    """Task i writes rows ``cuts[i]`` to ``cuts[i + 1]`` of the product."""
    block = take(queue)
    while block >= 0:
        for i in range(rows.cuts[block], rows.cuts[block + 1]):
            total = out[i]
            total[:] = 0
            for j in range(rows.indptr[i], rows.indptr[i + 1]):
                value, row = rows.data[j], dense[rows.indices[j]]
                for k in range(len(total)):
                    total[k] += value * row[k]
        block = take(queue)


def _product(rows: _Rows, dense: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write the product of a matrix with a dense one; no element depends on the threads."""
    costs = np.diff(rows.indptr[rows.cuts]) * (_ENTRY * dense.shape[1])
    threads.run(_multiply, np.arange(len(costs)), costs, (rows, np.ascontiguousarray(dense), out))
    return out

"""Compact storage of matrices over states, and orderings that narrow them; see docs/sparse.md."""

from flash_semicrf.sparse.banded import BandedMatrix
from flash_semicrf.sparse.block_triangular import BlockTriangularMatrix, block_triang_matmul
from flash_semicrf.sparse.ordering import (
    apply_permutation,
    measure_effective_bandwidth,
    rcm_ordering_from_adjacency,
    snake_ordering,
)

__all__ = [
    "BandedMatrix",
    "BlockTriangularMatrix",
    "apply_permutation",
    "block_triang_matmul",
    "measure_effective_bandwidth",
    "rcm_ordering_from_adjacency",
    "snake_ordering",
]

"""Matrices over (duration, label) states stored by the blocks of short durations.

A block holds the C x C label pairs of two durations. Of the K x K blocks, those whose durations
together fit into a span of positions are stored: K (K + 1) / 2 of them for span = K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flash_semicrf.problem.validation import check_positive_int, check_tensor
from flash_semicrf.semirings import Semiring
from flash_semicrf.semirings.base import as_semiring, components

__all__ = ["BlockTriangularMatrix", "block_triang_matmul"]

_Products: TypeAlias = tuple[tuple[int, int], list[int], list[int]]
"""A block of a product, and the blocks of both factors that contribute to it."""


@dataclass(eq=False)
class BlockTriangularMatrix:
    """Square matrices over K x C states, stored by a part of their C x C blocks.

    The state of duration index k and label c is row (and column) ``k * C + c`` of the dense form.
    Indices k count from 0, and `from_dense` keeps the blocks with ``k1 + k2 < span``: for
    durations 1..K that is ``(k1 + 1) + (k2 + 1) <= span + 1``.

    Parameters
    ----------
    values : Tensor of shape (batch, num_blocks, C, C)
        Any number of batch axes is allowed. With a semiring of several components, their axis comes
        first, as its ``convert`` returns it: (size, batch, num_blocks, C, C).
    block_indices : int64 Tensor of shape (num_blocks, 2)
        The (k1, k2) of each block, both in 0..K-1; no pair occurs twice.
    K, C : int
        Number of durations and of labels.

    Raises
    ------
    TypeError, ValueError
        If shapes and numbers do not agree, or an index is out of range or repeated.

    Examples
    --------
    >>> dense = torch.randn(2, 12, 12)
    >>> matrix = BlockTriangularMatrix.from_dense(dense, K=4, C=3, span=4)
    >>> matrix.values.shape  # 10 of the 16 blocks
    torch.Size([2, 10, 3, 3])
    >>> matrix.block_indices.tolist()[:5]
    [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    """

    values: Tensor
    block_indices: Tensor
    K: int
    C: int

    def __post_init__(self) -> None:
        check_positive_int("K", self.K)
        check_positive_int("C", self.C)
        check_tensor("values", self.values)
        check_tensor("block_indices", self.block_indices)
        count = self.block_indices.shape[0] if self.block_indices.dim() == 2 else -1
        if tuple(self.block_indices.shape) != (count, 2):
            raise ValueError(
                f"`block_indices` must have shape (num_blocks, 2); "
                f"got {tuple(self.block_indices.shape)}."
            )
        if tuple(self.values.shape[-3:]) != (count, self.C, self.C):
            raise ValueError(
                f"`values` must have shape (batch, {count}, {self.C}, {self.C}) for {count} blocks "
                f"of C={self.C} labels; got {tuple(self.values.shape)}."
            )
        seen = set()
        for i, pair in enumerate(map(tuple, self.block_indices.tolist())):
            if not (0 <= min(pair) and max(pair) < self.K) or pair in seen:
                raise ValueError(
                    f"`block_indices` must be different pairs in [0, K-1={self.K - 1}]; "
                    f"got {pair} at index {i}."
                )
            seen.add(pair)

    @classmethod
    def from_dense(
        cls, dense: Tensor, K: int, C: int, span: int, duration_mask: Tensor | None = None
    ) -> BlockTriangularMatrix:
        """Matrices with the blocks ``k1 + k2 < span`` of dense square matrices.

        Parameters
        ----------
        dense : Tensor of shape (batch, K * C, K * C)
            Entries in other blocks are ignored.
        K, C, span : int
            Number of durations, of labels, and bound of k1 + k2; each >= 1.
        duration_mask : bool Tensor of shape (K, K), optional
            Store only the blocks where it is True.

        Returns
        -------
        BlockTriangularMatrix

        Raises
        ------
        TypeError, ValueError
            If the shapes do not agree, or K, C or span is < 1.
        """
        for name, value in (("K", K), ("C", C), ("span", span)):
            check_positive_int(name, value)
        check_tensor("dense", dense)
        if dense.dim() < 2 or tuple(dense.shape[-2:]) != (K * C, K * C):
            raise ValueError(
                f"`dense` must have shape (batch, {K * C}, {K * C}) for K={K} and C={C}; "
                f"got {tuple(dense.shape)}."
            )
        k = torch.arange(K, device=dense.device)
        stored = k[:, None] + k[None, :] < span
        if duration_mask is not None:
            check_tensor("duration_mask", duration_mask)
            if duration_mask.dtype != torch.bool or tuple(duration_mask.shape) != (K, K):
                raise ValueError(
                    f"`duration_mask` must be a bool Tensor of shape ({K}, {K}); got "
                    f"{duration_mask.dtype} of shape {tuple(duration_mask.shape)}."
                )
            stored = stored & duration_mask.to(dense.device)
        indices = stored.nonzero()
        blocks = dense.unflatten(-1, (K, C)).unflatten(-3, (K, C)).transpose(-3, -2)
        return cls(blocks[..., indices[:, 0], indices[:, 1], :, :], indices, K, C)

    def to_dense(self, semiring: Semiring | type[Semiring] | None = None) -> Tensor:
        """Dense matrices with all blocks.

        Parameters
        ----------
        semiring : Semiring, optional
            Its `zero` is the value of blocks that are not stored; 0.0 by default.

        Returns
        -------
        Tensor of shape (batch, K * C, K * C)
        """
        K, C = self.K, self.C
        batch = self.values.shape[:-3]
        zero = components(0.0 if semiring is None else _fitting(semiring, self).zero)
        blocks = self.values.new_empty((*batch, K * K, C, C))
        for component, value in zip(blocks if len(zero) > 1 else [blocks], zero, strict=True):
            component.fill_(value)
        position = self.block_indices[:, 0] * K + self.block_indices[:, 1]
        blocks = blocks.index_copy(len(batch), position.to(self.values.device), self.values)
        dense: Tensor = blocks.unflatten(-3, (K, K)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
        return dense


def block_triang_matmul(
    left: BlockTriangularMatrix,
    right: BlockTriangularMatrix,
    semiring: Semiring | type[Semiring],
    span: int,
) -> BlockTriangularMatrix:
    """Multiply two matrices over a semiring, computing only the blocks that fit into a span.

    Block (k1, k2) is the sum of left (k1, k) times right (k, k2) over all k for which both are
    stored.

    Parameters
    ----------
    left, right : BlockTriangularMatrix
        With the same K and C, and batch axes that broadcast.
    semiring : Semiring or subclass
        One of `flash_semicrf.semirings`, or a user-defined one.
    span : int
        Blocks with ``k1 + k2 < span`` are computed. A block without any contribution, which equals
        the zero of the semiring, is not stored.

    Returns
    -------
    BlockTriangularMatrix
        Differentiable, with blocks in the order of (k1, k2).

    Raises
    ------
    ValueError
        If K or C differ, span is < 1, or values lack the axis of the components of the semiring.

    Examples
    --------
    >>> from flash_semicrf.semirings import StdSemiring
    >>> ones = BlockTriangularMatrix.from_dense(torch.ones(1, 3, 3), K=3, C=1, span=2)
    >>> ones.to_dense()[0]
    tensor([[1., 1., 0.],
            [1., 0., 0.],
            [0., 0., 0.]])
    >>> block_triang_matmul(ones, ones, StdSemiring, span=3).to_dense()[0]
    tensor([[2., 1., 0.],
            [1., 1., 0.],
            [0., 0., 0.]])
    """
    check_positive_int("span", span)
    for name in ("K", "C"):
        if getattr(left, name) != getattr(right, name):
            raise ValueError(
                f"`right` must have the {name}={getattr(left, name)} of `left`; "
                f"got {getattr(right, name)}."
            )
    C, device = left.C, left.values.device
    semiring = _fitting(semiring, left, right)
    lead = (None,) if semiring.size == 1 else ()
    products = _group_products(left.block_indices, right.block_indices, span)
    parts, indices = [], []
    for terms in products:
        pairs, in_left, in_right = (
            torch.tensor(x, device=device) for x in zip(*terms, strict=True)
        )
        # The terms of a block side by side: (C, m C) times (m C, C).
        a = left.values[..., in_left, :, :].transpose(-3, -2).flatten(-2)
        b = right.values[..., in_right, :, :].flatten(-3, -2)
        product = semiring.matmul(a[lead], b[lead])
        parts.append(product[0] if lead else product)
        indices.append(pairs)
    if not parts:
        batch = torch.broadcast_shapes(left.values.shape[:-3], right.values.shape[:-3])
        parts = [left.values.new_zeros(*batch, 0, C, C)]
        indices = [torch.zeros(0, 2, dtype=torch.int64, device=device)]
    found = torch.cat(indices)
    order = (found[:, 0] * left.K + found[:, 1]).argsort()
    return BlockTriangularMatrix(torch.cat(parts, -3)[..., order, :, :], found[order], left.K, C)


def _fitting(semiring: Semiring | type[Semiring], *matrices: BlockTriangularMatrix) -> Semiring:
    """Instance of the semiring; ValueError unless the matrices have an axis for its components."""
    semiring = as_semiring(semiring)
    for matrix in matrices:
        shape = tuple(matrix.values.shape)
        if semiring.size > 1 and (len(shape) < 5 or shape[0] != semiring.size):
            raise ValueError(
                f"`values` must have shape (size={semiring.size}, batch, num_blocks, C, C) for "
                f"{type(semiring).__name__}; got {shape}."
            )
    return semiring


def _group_products(left: Tensor, right: Tensor, span: int) -> list[list[_Products]]:
    """Products of which each block is the sum, as ``((k1, k2), left blocks, right blocks)``.

    Blocks with equally many products are in one list, so that they are computed at once.
    """
    by_source: dict[int, list[tuple[int, int]]] = {}
    for j, (k, k2) in enumerate(right.tolist()):
        by_source.setdefault(k, []).append((k2, j))
    terms: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for i, (k1, k) in enumerate(left.tolist()):
        for k2, j in by_source.get(k, ()):
            if k1 + k2 < span:
                in_left, in_right = terms.setdefault((k1, k2), ([], []))
                in_left.append(i)
                in_right.append(j)
    groups: dict[int, list[_Products]] = {}
    for pair, (in_left, in_right) in terms.items():
        groups.setdefault(len(in_left), []).append((pair, in_left, in_right))
    return list(groups.values())

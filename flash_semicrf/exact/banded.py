"""The binary tree with the lowest levels multiplied as banded matrices.

A product of bands of widths v and w takes M·v·w multiplications in place of M³, and is v + w - 1
wide: the tree starts banded, in the ordering of the states that is the narrowest, and continues
with dense matrices from the level at which the band is too wide to save time. If a model allows
every duration and transition, its step matrix has a full row of blocks, which no ordering makes
narrow: time is saved only with constraints (labels in a fixed order, few durations).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.exact.scan import num_durations
from flash_semicrf.exact.tree import binary_tree, close_tree, multiply_pairs, transfer_matrices
from flash_semicrf.semirings.base import Semiring, components
from flash_semicrf.sparse import (
    BandedMatrix,
    apply_permutation,
    rcm_ordering_from_adjacency,
    snake_ordering,
)

__all__ = ["banded_levels", "banded_tree"]

_PAYS_BELOW = 0.25
"""Share of M² that the product of two widths may have, by measurement on a CPU."""


def banded_tree(semiring: Semiring, edges: Tensor, lengths: Tensor) -> Tensor:
    """Sum over all paths; parameters and result as `flash_semicrf.exact.scan.linear_scan`.

    Raises
    ------
    ValueError
        For a semiring whose values have several components.
    """
    if semiring.size != 1:
        raise ValueError(
            "`use_banded`=True needs a semiring with values of size 1; "
            f"{type(semiring).__name__} has {semiring.size}."
        )
    total, _ = _run(semiring, edges, lengths)
    return total


def banded_levels(semiring: Semiring, edges: Tensor, lengths: Tensor) -> int:
    """Number of levels with banded matrices; 0 if `banded_tree` equals the plain tree."""
    return _run(semiring, edges, lengths)[1]


def _run(semiring: Semiring, edges: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
    _, durations = num_durations(edges, lengths)
    if not durations:
        return binary_tree(semiring, edges, lengths), 0
    num_labels = edges.shape[-1]
    x = transfer_matrices(semiring, edges, lengths)
    (zero,) = components(semiring.zero)
    present = (x.detach() != zero).flatten(0, 2).any(0)
    order, lu, ld = _narrowest(present, durations, num_labels)
    levels = 0
    if x.shape[2] > 2 and _pays(lu + ld + 1, len(order)):
        band = BandedMatrix.from_dense(apply_permutation(x[0], order), lu, ld, zero)
        while band.data.shape[1] > 2 and _pays(band.lu + band.ld + 1, band.size):
            band = _multiply_pairs(semiring, band)
            levels += 1
        x = apply_permutation(band.to_dense(), order.argsort())[None]
    while x.shape[2] > 2:
        x = multiply_pairs(semiring, x)
    return close_tree(semiring, x, num_labels), levels


def _pays(width: int, size: int) -> bool:
    return width**2 < _PAYS_BELOW * size**2


def _narrowest(present: Tensor, durations: int, num_labels: int) -> tuple[Tensor, int, int]:
    """Ordering with the narrowest band, and its numbers of diagonals above and below."""
    size = len(present)
    reverse_cuthill_mckee, _ = rcm_ordering_from_adjacency(present.float())
    with torch.device("cpu"):
        given = torch.arange(size)
        snake = snake_ordering(durations, num_labels)
    by_label = given.view(durations, num_labels).T.flatten()
    orders = [given, by_label, snake, reverse_cuthill_mckee]
    found = []
    for order in orders:
        row, column = apply_permutation(present, order).nonzero().unbind(1)
        offset = torch.cat([column - row, row.new_zeros(1)])  # of the diagonal, which may be empty
        found.append((order, int(offset.max()), -int(offset.min())))
    return min(found, key=lambda each: each[1] + each[2])


def _multiply_pairs(semiring: Semiring, band: BandedMatrix) -> BandedMatrix:
    """Next level of the tree: products of later and earlier steps, and an unpaired last one."""
    even = band.data.shape[1] // 2 * 2
    later = BandedMatrix(band.data[:, 1:even:2], band.lu, band.ld, band.fill)
    earlier = BandedMatrix(band.data[:, 0:even:2], band.lu, band.ld, band.fill)
    product = later.multiply(earlier, semiring)
    if even == band.data.shape[1]:
        return product
    odd_one = BandedMatrix(band.data[:, even:], band.lu, band.ld, band.fill).to_dense()
    rest = BandedMatrix.from_dense(odd_one, product.lu, product.ld, product.fill)
    return BandedMatrix(
        torch.cat([product.data, rest.data], 1), product.lu, product.ld, product.fill
    )

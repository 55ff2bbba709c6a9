"""Square matrices stored as their diagonals, and their products over a semiring.

A product of n x n matrices with w1 and w2 stored diagonals takes n w1 w2 multiplications and has
at most w1 + w2 - 1 diagonals. This is cheaper than n^3 while the bands are narrow, and they widen
with every product. Band storage: Golub and Van Loan, *Matrix Computations*, section 1.2.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_semicrf.problem.arguments import check_tensor
from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.semirings import LogSemiring, MaxSemiring, Semiring
from flash_semicrf.semirings.base import as_semiring, components

__all__ = ["BandedMatrix"]


@dataclass(eq=False)
class BandedMatrix:
    """Square matrices stored by the diagonals near the main one.

    Parameters
    ----------
    data : Tensor of shape (batch, n, lu + ld + 1)
        Row by row: **column d is diagonal d - ld**, ``data[b, i, d] = matrix[b, i, i + d - ld]``.
        Column 0 is the lowest diagonal, column ld the main one, the last the highest. Where
        i + d - ld is not in 0..n-1 there is no such entry and the value is ignored. Any number of
        batch axes is allowed.
    lu, ld : int
        Number of diagonals above and below the main one.
    fill : float
        The value of every entry outside the bands.

    Raises
    ------
    ValueError
        If `lu` or `ld` is negative, or `data` has not lu + ld + 1 columns.

    Examples
    --------
    >>> dense = torch.randn(2, 10, 10)
    >>> banded = BandedMatrix.from_dense(dense, lu=2, ld=2)
    >>> banded.data.shape
    torch.Size([2, 10, 5])
    >>> torch.equal(banded.to_dense(), dense.tril(2).triu(-2))
    True
    """

    data: Tensor
    lu: int
    ld: int
    fill: float = 0.0

    def __post_init__(self) -> None:
        _check_bands(self.lu, self.ld)
        check_tensor("data", self.data)
        columns = self.lu + self.ld + 1
        if self.data.dim() < 2 or self.data.shape[-1] != columns:
            raise ValueError(
                f"`data` must have shape (batch, n, lu + ld + 1 = {columns}); "
                f"got {tuple(self.data.shape)}."
            )

    @classmethod
    def from_dense(cls, dense: Tensor, lu: int, ld: int, fill: float = 0.0) -> BandedMatrix:
        """Matrices with the diagonals -ld..lu of dense square matrices.

        Parameters
        ----------
        dense : Tensor of shape (batch, n, n)
        lu, ld : int
            Number of diagonals to keep above and below the main one. Entries outside are ignored;
            `measure_effective_bandwidth` determines how many diagonals hold all entries.
        fill : float, default=0.0
            Value of the entries outside in the result.

        Returns
        -------
        BandedMatrix

        Raises
        ------
        ValueError
            If the matrices are not square, or `lu` or `ld` is negative.
        TypeError
            If `dense` is not a Tensor.
        """
        _check_bands(lu, ld)
        check_tensor("dense", dense)
        if dense.dim() < 2 or dense.shape[-1] != dense.shape[-2]:
            raise ValueError(f"`dense` must have shape (batch, n, n); got {tuple(dense.shape)}.")
        n = dense.shape[-1]
        column, inside = _columns(n, lu, ld, dense.device)
        row = torch.arange(n, device=dense.device)[:, None]
        data = dense[..., row, column.clamp(0, max(n - 1, 0))]
        return cls(data.masked_fill(~inside, fill), lu, ld, fill)

    @property
    def size(self) -> int:
        """Number of rows, n."""
        return self.data.shape[-2]

    def to_dense(self) -> Tensor:
        """Matrices as a Tensor of shape (batch, n, n)."""
        row = torch.arange(self.size, device=self.data.device)
        column = row[None, :] - row[:, None] + self.ld
        inside = (column >= 0) & (column <= self.lu + self.ld)
        dense = self.data[..., row[:, None], column.clamp(0, self.lu + self.ld)]
        return dense.masked_fill(~inside, self.fill)

    def transpose(self) -> BandedMatrix:
        """Transposed matrices, with `lu` and `ld` exchanged."""
        n, lu, ld = self.size, self.ld, self.lu
        row, inside = _columns(n, lu, ld, self.data.device)
        old_diagonal = torch.arange(lu + ld, -1, -1, device=self.data.device)
        data = self.data[..., row.clamp(0, max(n - 1, 0)), old_diagonal]
        return BandedMatrix(data.masked_fill(~inside, self.fill), lu, ld, self.fill)

    def multiply(self, other: BandedMatrix, semiring: Semiring | type[Semiring]) -> BandedMatrix:
        """Product over a semiring: entry (i, j) is the sum over k of ``self[i, k] * other[k, j]``.

        Parameters
        ----------
        other : BandedMatrix
            Of the same size, with batch axes that broadcast.
        semiring : Semiring or subclass
            With values of one component.

        Returns
        -------
        BandedMatrix
            `lu` and `ld` are the sums of those of both, at most n - 1, and `fill` is the zero of
            the semiring. Differentiable.

        Raises
        ------
        ValueError
            If the sizes differ, the values of the semiring have several components, or the `fill`
            of a matrix is not the zero of the semiring: otherwise the product would be dense.
        """
        semiring = as_semiring(semiring)
        if semiring.size != 1:
            raise ValueError(f"`semiring` must have values of size 1; got {semiring.size}.")
        if self.size != other.size:
            raise ValueError(f"`other` must have n = {self.size} rows; got {other.size}.")
        (zero,) = components(semiring.zero)
        for name, matrix in (("self", self), ("other", other)):
            if matrix.fill != zero and not max(matrix.fill, zero) <= NEG_INF:
                raise ValueError(
                    f"`{name}` must have the zero of {type(semiring).__name__}, {zero}, as its "
                    f"`fill`; got {matrix.fill}."
                )
        return _multiply(self, other, semiring)

    def multiply_log(self, other: BandedMatrix) -> BandedMatrix:
        """Product in the log semiring: ``logsumexp_k(self[i, k] + other[k, j])``.

        The same as `multiply` with a `LogSemiring`. Both need a `fill` of -inf (or <= NEG_INF).

        Examples
        --------
        >>> step = torch.full((1, 4, 4), -torch.inf)
        >>> step[:, range(4), range(4)] = 0.0  # stay
        >>> step[:, range(3), range(1, 4)] = 0.0  # or move on by one
        >>> step = BandedMatrix.from_dense(step, lu=1, ld=0, fill=-torch.inf)
        >>> step.multiply_log(step).to_dense().exp()[0]  # ways to get there in two steps
        tensor([[1., 2., 1., 0.],
                [0., 1., 2., 1.],
                [0., 0., 1., 2.],
                [0., 0., 0., 1.]])
        """
        return self.multiply(other, LogSemiring)

    def multiply_max(self, other: BandedMatrix) -> BandedMatrix:
        """Product in the max semiring: ``max_k(self[i, k] + other[k, j])``.

        The same as `multiply` with a `MaxSemiring`. Both need a `fill` of -inf (or <= NEG_INF).
        """
        return self.multiply(other, MaxSemiring)


def _check_bands(lu: int, ld: int) -> None:
    for name, value in (("lu", lu), ("ld", ld)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 0:
            raise ValueError(f"`{name}` must be an integer >= 0; got {value!r}.")


def _columns(n: int, lu: int, ld: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrix column of each entry of (n, lu + ld + 1) data, and whether it exists."""
    offset = torch.arange(-ld, lu + 1, device=device)
    column = torch.arange(n, device=device)[:, None] + offset
    return column, (column >= 0) & (column < n)


def _multiply(left: BandedMatrix, right: BandedMatrix, semiring: Semiring) -> BandedMatrix:
    n, width = left.size, left.lu + left.ld + 1
    (zero,) = components(semiring.zero)
    # Row i of left meets rows i - ld .. i + lu of right: (1, ..., n, width, diagonals of right).
    rows = pad(_values(right, zero), (0, width, left.ld, left.lu), value=zero)
    rows = rows.unfold(-2, width, 1).transpose(-1, -2)
    terms = semiring.mul(_values(left, zero)[..., None], rows)
    # Entry (k, d) belongs to diagonal k + d of the product. Each row of terms has `width` columns
    # to spare: read again with rows shorter by one, row k lies k columns further to the right.
    columns = terms.shape[-1]
    terms = terms.flatten(-2)[..., :-width].unflatten(-1, (width, columns - 1))
    data = semiring.sum(terms, -2)[0]
    # Diagonals beyond the corners hold nothing.
    lu, ld = left.lu + right.lu, left.ld + right.ld
    kept_lu, kept_ld = min(lu, max(n - 1, 0)), min(ld, max(n - 1, 0))
    data = data[..., ld - kept_ld : data.shape[-1] - (lu - kept_lu)]
    return BandedMatrix(data, kept_lu, kept_ld, zero)


def _values(matrix: BandedMatrix, zero: float) -> Tensor:
    """Values of the entries, with the zero of the semiring for forbidden and absent ones."""
    _, inside = _columns(matrix.size, matrix.lu, matrix.ld, matrix.data.device)
    absent = ~inside
    if zero <= NEG_INF:
        absent = absent | (matrix.data <= NEG_INF)
    return matrix.data.masked_fill(absent, zero)[None]

"""Banded matrices against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.semirings import EntropySemiring, StdSemiring
from flash_semicrf.sparse import BandedMatrix
from flash_semicrf.testing import assert_close

BANDS = st.tuples(st.integers(0, 4), st.integers(0, 4))


def dense_log(a: Tensor, b: Tensor) -> Tensor:
    """Product of dense matrices in the log semiring."""
    return (a[..., None] + b[..., None, :, :]).logsumexp(-2)


def dense_max(a: Tensor, b: Tensor) -> Tensor:
    """Product of dense matrices in the max semiring."""
    return (a[..., None] + b[..., None, :, :]).amax(-2)


def draw_banded(
    n: int, lu: int, ld: int, *, batch: int = 2, seed: int = 0, forbid: float = 0.0, scale=1.0
) -> BandedMatrix:
    """Random log potentials inside the bands, forbidden outside."""
    generator = torch.Generator().manual_seed(seed)
    dense = scale * torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    dead = torch.rand(batch, n, n, generator=generator) < forbid
    dense = dense.masked_fill(dead, -math.inf)
    return BandedMatrix.from_dense(dense, lu, ld, fill=-math.inf)


@given(st.integers(1, 7), BANDS, st.sampled_from([0.0, -2.5, -math.inf]))
def test_from_dense_keeps_the_bands_and_forgets_the_rest(n, bands, fill):
    lu, ld = bands
    dense = torch.randn(2, n, n)
    found = BandedMatrix.from_dense(dense, lu, ld, fill).to_dense()
    offset = torch.arange(n) - torch.arange(n)[:, None]
    inside = (offset <= lu) & (offset >= -ld)
    assert torch.equal(found, torch.where(inside, dense, fill))


def test_columns_hold_the_diagonals_that_the_docstring_names():
    dense = torch.arange(25.0).reshape(1, 5, 5)
    data = BandedMatrix.from_dense(dense, lu=1, ld=2, fill=-1).data
    assert data.shape == (1, 5, 4)
    for i in range(5):
        for d in range(4):
            column = i + d - 2
            assert data[0, i, d] == (dense[0, i, column] if 0 <= column < 5 else -1)


@given(st.integers(1, 7), BANDS)
def test_transpose_is_that_of_the_dense_matrix(n, bands):
    banded = draw_banded(n, *bands, forbid=0.1)
    turned = banded.transpose()
    assert (turned.lu, turned.ld) == (banded.ld, banded.lu)
    assert torch.equal(turned.to_dense(), banded.to_dense().mT)
    assert torch.equal(turned.transpose().data, banded.data)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@given(n=st.integers(1, 8), left=BANDS, right=BANDS, forbid=st.sampled_from([0.0, 0.4]))
def test_products_equal_the_dense_ones(scale, n, left, right, forbid):
    a = draw_banded(n, *left, forbid=forbid, scale=scale)
    b = draw_banded(n, *right, seed=1, forbid=forbid, scale=scale)
    for product, expected in (
        (a.multiply_log(b), dense_log(a.to_dense(), b.to_dense())),
        (a.multiply_max(b), dense_max(a.to_dense(), b.to_dense())),
    ):
        assert product.lu == min(left[0] + right[0], n - 1)
        assert product.ld == min(left[1] + right[1], n - 1)
        assert product.data.shape == (2, n, product.lu + product.ld + 1)
        assert product.fill == -math.inf
        assert_close(product.to_dense(), expected)


@given(n=st.integers(1, 8), left=BANDS, right=BANDS)
def test_product_over_another_semiring(n, left, right):
    dense = torch.randn(2, 3, n, n, dtype=torch.float64)
    a, b = (
        BandedMatrix.from_dense(m, *bands) for m, bands in zip(dense, (left, right), strict=True)
    )
    product = a.multiply(b, StdSemiring())
    assert product.fill == 0
    assert_close(product.to_dense(), a.to_dense() @ b.to_dense())


def test_long_products_stay_right_while_the_bands_grow_and_fill_the_matrix():
    factor = draw_banded(6, 1, 1, forbid=0.2)
    banded, dense = factor, factor.to_dense()
    for _ in range(7):
        banded, dense = banded.multiply_log(factor), dense_log(dense, factor.to_dense())
        assert_close(banded.to_dense(), dense)
    assert banded.data.shape == (2, 6, 11)


def test_products_never_make_a_dense_matrix():
    n = 200_000  # 320 GB each if they did
    step = BandedMatrix(torch.zeros(1, n, 2), lu=1, ld=0, fill=-math.inf)
    product = step.multiply_log(step).multiply_log(step)
    assert product.data.shape == (1, n, 4)
    assert_close(product.data[0, 1234].exp(), torch.tensor([1.0, 3.0, 3.0, 1.0]))
    assert product.transpose().multiply_max(step).data.shape == (1, n, 5)


def test_values_where_the_matrix_has_no_entry_are_ignored():
    clean = draw_banded(5, 2, 3)
    row = torch.arange(5)[:, None]
    column = row + torch.arange(-3, 3)
    missing = (column < 0) | (column >= 5)
    dirty = BandedMatrix(clean.data.masked_fill(missing, math.nan), 2, 3, -math.inf)
    assert torch.equal(dirty.to_dense(), clean.to_dense())
    assert torch.equal(dirty.transpose().to_dense(), clean.transpose().to_dense())
    product = dirty.multiply_log(dirty)
    assert torch.equal(product.to_dense(), clean.multiply_log(clean).to_dense())


def test_batch_axes_broadcast():
    left, right = draw_banded(4, 1, 0, batch=3), draw_banded(4, 0, 2, batch=1, seed=1)
    assert_close(left.multiply_log(right).to_dense(), dense_log(left.to_dense(), right.to_dense()))
    more = BandedMatrix(left.data.expand(2, 3, 4, 2), 1, 0, -math.inf)
    assert torch.equal(more.multiply_max(right).to_dense()[1], left.multiply_max(right).to_dense())
    single = BandedMatrix(left.data[0], 1, 0, -math.inf)
    assert torch.equal(single.to_dense(), left.to_dense()[0])


def test_neg_inf_counts_as_forbidden():
    exact = draw_banded(5, 1, 1, forbid=0.3)
    finite = BandedMatrix(exact.data.clamp(min=NEG_INF), 1, 1, NEG_INF)
    assert torch.equal(finite.multiply_log(finite).data, exact.multiply_log(exact).data)
    assert torch.equal(finite.multiply_max(finite).data, exact.multiply_max(exact).data)


@pytest.mark.parametrize("operation", ["multiply_log", "multiply_max"])
def test_gradients(operation):
    a, b = (draw_banded(4, lu, ld, batch=1, seed=lu) for lu, ld in ((1, 2), (2, 0)))
    weight = torch.randn(1, 4, 4, dtype=torch.float64)

    def product(x: Tensor, y: Tensor) -> Tensor:
        left, right = BandedMatrix(x, 1, 2, -math.inf), BandedMatrix(y, 2, 0, -math.inf)
        dense = getattr(left, operation)(right).transpose().to_dense()
        return (dense.masked_fill(dense == -math.inf, 0) * weight).sum()

    inputs = [m.data.clamp(min=-9).requires_grad_() for m in (a, b)]
    torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("operation", ["multiply_log", "multiply_max"])
def test_what_is_forbidden_has_gradient_zero(operation):
    data = torch.full((1, 3, 2), -math.inf, dtype=torch.float64)
    data[0, 0, 1] = 0.5
    data.requires_grad_()
    matrix = BandedMatrix(data, lu=0, ld=1, fill=-math.inf)
    product = getattr(matrix, operation)(matrix).data
    product.sum().backward()
    expected = torch.zeros(1, 3, 2, dtype=torch.float64)
    expected[0, 0, 1] = 2
    assert torch.equal(data.grad, expected)


def test_from_dense_is_differentiable():
    dense = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: BandedMatrix.from_dense(x, 2, 1).data, dense)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BandedMatrix(torch.zeros(1, 4, 3), 1, 2), r"`data`.*lu \+ ld \+ 1 = 4.*4, 3\)"),
        (lambda: BandedMatrix(torch.zeros(3), 1, 1), r"`data` must have shape .*\(3,\)"),
        (lambda: BandedMatrix(torch.zeros(1, 4, 3), -1, 3), "`lu` must be an integer >= 0; got -1"),
        (lambda: BandedMatrix(torch.zeros(1, 4, 3), 1, 1.0), "`ld` must be an integer >= 0"),
        (lambda: BandedMatrix.from_dense(torch.zeros(1, 3, 4), 1, 1), r"`dense`.*\(1, 3, 4\)"),
        (lambda: BandedMatrix.from_dense(torch.zeros(1, 3, 3), 1, True), "`ld` must be an integer"),
    ],
)
def test_what_makes_no_banded_matrix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_products_refuse_other_sizes_and_fills():
    a, zero_filled = draw_banded(4, 1, 1), BandedMatrix(torch.zeros(2, 4, 3), 1, 1)
    with pytest.raises(ValueError, match="`other` must have n = 4 rows; got 5"):
        a.multiply_log(draw_banded(5, 1, 1))
    with pytest.raises(ValueError, match="`other` must have the zero of MaxSemiring, -inf, as its"):
        a.multiply_max(zero_filled)
    with pytest.raises(ValueError, match="`self` must have the zero of LogSemiring.*got 0.0"):
        zero_filled.multiply_log(a)
    with pytest.raises(ValueError, match="`self` must have the zero of StdSemiring, 0.0"):
        a.multiply(zero_filled, StdSemiring)
    with pytest.raises(ValueError, match="`semiring` must have values of size 1; got 2"):
        a.multiply(a, EntropySemiring)

"""Block-triangular matrices against dense ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_semicrf.semirings import (
    EntropySemiring,
    KMaxSemiring,
    LogSemiring,
    MaxSemiring,
    StdSemiring,
)
from flash_semicrf.sparse import BlockTriangularMatrix, block_triang_matmul
from flash_semicrf.testing import assert_close

SEMIRINGS = {"log": LogSemiring, "max": MaxSemiring, "std": StdSemiring}
ZEROS = {"log": -math.inf, "max": -math.inf, "std": 0.0}


def in_span(K: int, C: int, span: int) -> Tensor:
    """Which entries of the dense matrix lie in blocks with k1 + k2 < span."""
    k = torch.arange(K * C) // C
    return k[:, None] + k[None, :] < span


def dense_product(a: Tensor, b: Tensor, name: str) -> Tensor:
    """Product of dense matrices."""
    if name == "std":
        return a @ b
    terms = a[..., None] + b[..., None, :, :]
    return terms.logsumexp(-2) if name == "log" else terms.amax(-2)


@given(K=st.integers(1, 5), C=st.integers(1, 3), span=st.integers(1, 9))
def test_from_dense_keeps_the_blocks_of_the_span(K, C, span):
    dense = torch.randn(2, K * C, K * C)
    matrix = BlockTriangularMatrix.from_dense(dense, K, C, span)
    assert torch.equal(matrix.to_dense(), dense.where(in_span(K, C, span), torch.tensor(0.0)))
    expected = [[i, j] for i in range(K) for j in range(K) if i + j < span]
    assert matrix.block_indices.tolist() == expected
    assert matrix.values.shape == (2, len(expected), C, C)


def test_blocks_have_the_layout_that_the_docstring_names():
    dense = torch.randn(2, 12, 12)
    matrix = BlockTriangularMatrix.from_dense(dense, K=4, C=3, span=4)
    assert matrix.values.shape == (2, 10, 3, 3)
    for block, (k1, k2) in zip(matrix.values.unbind(1), matrix.block_indices.tolist(), strict=True):
        for c1 in range(3):
            for c2 in range(3):
                assert torch.equal(block[:, c1, c2], dense[:, k1 * 3 + c1, k2 * 3 + c2])


@pytest.mark.parametrize("name", SEMIRINGS)
def test_blocks_that_are_not_stored_are_zero(name):
    dense = torch.randn(1, 4, 4)
    matrix = BlockTriangularMatrix.from_dense(dense, K=2, C=2, span=1)
    found = matrix.to_dense(SEMIRINGS[name])
    assert torch.equal(found, dense.where(in_span(2, 2, 1), torch.tensor(ZEROS[name])))


def test_duration_mask_drops_blocks():
    dense = torch.randn(1, 6, 6)
    mask = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    matrix = BlockTriangularMatrix.from_dense(dense, K=3, C=2, span=3, duration_mask=mask)
    assert matrix.block_indices.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    kept = torch.kron(mask, torch.ones(2, 2)).bool() & in_span(3, 2, 3)
    assert torch.equal(matrix.to_dense(), dense * kept)


@pytest.mark.parametrize("name", SEMIRINGS)
@given(
    K=st.integers(1, 4),
    C=st.integers(1, 3),
    spans=st.tuples(*[st.integers(1, 6)] * 3),
    masked=st.booleans(),
)
def test_product_is_the_dense_one_inside_the_span(name, K, C, spans, masked):
    mask = torch.rand(K, K) > 0.4 if masked else None
    left, right = (
        BlockTriangularMatrix.from_dense(
            torch.randn(2, K * C, K * C, dtype=torch.float64), K, C, span, mask
        )
        for span in spans[:2]
    )
    product = block_triang_matmul(left, right, SEMIRINGS[name], spans[2])
    zero = torch.tensor(ZEROS[name], dtype=torch.float64)
    dense = dense_product(*(m.to_dense(SEMIRINGS[name]) for m in (left, right)), name)
    assert_close(product.to_dense(SEMIRINGS[name]), dense.where(in_span(K, C, spans[2]), zero))
    assert product.block_indices.tolist() == sorted(product.block_indices.tolist())


@pytest.mark.parametrize("semiring", [KMaxSemiring(3), EntropySemiring()], ids=["kmax", "entropy"])
def test_values_of_several_components(semiring):
    K, C = 3, 2
    dense = torch.randn(2, 2, K * C, K * C, dtype=torch.float64)
    left, right = (
        BlockTriangularMatrix.from_dense(semiring.convert(m), K, C, span=K) for m in dense
    )
    a, b = (m.to_dense(semiring) for m in (left, right))
    assert a.shape == (semiring.size, 2, K * C, K * C)
    expected = semiring.matmul(a, b)
    found = block_triang_matmul(left, right, semiring, span=2 * K).to_dense(semiring)
    assert_close(found.nan_to_num(neginf=-1e9), expected.nan_to_num(neginf=-1e9))

    plain = BlockTriangularMatrix.from_dense(dense[0], K, C, span=K)
    with pytest.raises(
        ValueError, match=rf"`values` must have shape \(size={semiring.size}, batch"
    ):
        block_triang_matmul(plain, plain, semiring, K)


def test_no_block_meets_another():
    left = BlockTriangularMatrix(torch.randn(2, 1, 3, 3), torch.tensor([[0, 1]]), K=2, C=3)
    product = block_triang_matmul(left, left, LogSemiring, span=2)
    assert product.values.shape == (2, 0, 3, 3)
    assert torch.equal(product.to_dense(LogSemiring), torch.full((2, 6, 6), -math.inf))


def test_batch_axes_broadcast():
    many = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    left = BlockTriangularMatrix.from_dense(many, 2, 2, 2)
    right = BlockTriangularMatrix.from_dense(many[0, 0], 2, 2, 2)
    product = block_triang_matmul(left, right, StdSemiring, 4).to_dense()
    assert_close(product, left.to_dense() @ right.to_dense())


@pytest.mark.parametrize("name", SEMIRINGS)
def test_gradients(name):
    a, b = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6, dtype=torch.float64)

    def product(x: Tensor, y: Tensor) -> Tensor:
        left, right = (BlockTriangularMatrix.from_dense(m, 3, 2, 3) for m in (x, y))
        return (block_triang_matmul(left, right, SEMIRINGS[name], 3).to_dense() * weight).sum()

    torch.autograd.gradcheck(product, (a, b))


def test_what_is_forbidden_has_gradient_zero():
    dense = torch.full((1, 4, 4), -math.inf, dtype=torch.float64)
    dense[0, 0, 0] = 0.5
    dense.requires_grad_()
    matrix = BlockTriangularMatrix.from_dense(dense, 2, 2, 2)
    product = block_triang_matmul(matrix, matrix, LogSemiring, 2).to_dense(LogSemiring)
    product[0, 0, 0].backward()
    assert product[0, 0, 0] == 1
    assert dense.grad[0, 0, 0] == 2
    assert dense.grad.sum() == 2


INDICES = torch.tensor([[0, 0], [0, 1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BlockTriangularMatrix(torch.zeros(1, 3, 2, 2), INDICES, 2, 2),
            r"`values` must have shape \(batch, 2, 2, 2\) .*got \(1, 3, 2, 2\)",
        ),
        (
            lambda: BlockTriangularMatrix(torch.zeros(1, 2, 2, 2), INDICES[:1], 2, 2),
            r"`values` must have shape \(batch, 1, 2, 2\) .*got \(1, 2, 2, 2\)",
        ),
        (
            lambda: BlockTriangularMatrix(torch.zeros(1, 2, 2, 2), INDICES + 1, 2, 2),
            r"`block_indices` .*\[0, K-1=1\]; got \(1, 2\) at index 1",
        ),
        (
            lambda: BlockTriangularMatrix(torch.zeros(1, 2, 2, 2), INDICES[[1, 1]], 2, 2),
            r"`block_indices` must be different pairs .*got \(0, 1\) at index 1",
        ),
        (
            lambda: BlockTriangularMatrix(torch.zeros(1, 2, 2, 2), torch.zeros(2), 2, 2),
            r"`block_indices` must have shape \(num_blocks, 2\); got \(2,\)",
        ),
        (
            lambda: BlockTriangularMatrix.from_dense(torch.zeros(1, 5, 5), 2, 2, 2),
            r"`dense` must have shape \(batch, 4, 4\).*got \(1, 5, 5\)",
        ),
        (
            lambda: BlockTriangularMatrix.from_dense(torch.zeros(1, 4, 4), 2, 2, 0),
            "`span` must be an integer >= 1; got 0",
        ),
        (
            lambda: BlockTriangularMatrix.from_dense(
                torch.zeros(1, 4, 4), 2, 2, 2, torch.ones(2, 2)
            ),
            "`duration_mask` must be a bool Tensor of shape .*got torch.float32",
        ),
    ],
)
def test_what_makes_no_block_triangular_matrix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_product_refuses_other_numbers_of_states():
    matrix = BlockTriangularMatrix.from_dense(torch.zeros(1, 4, 4), 2, 2, 2)
    other = BlockTriangularMatrix.from_dense(torch.zeros(1, 4, 4), 4, 1, 2)
    with pytest.raises(ValueError, match="`right` must have the K=2 of `left`; got 4"):
        block_triang_matmul(matrix, other, LogSemiring, 2)
    with pytest.raises(ValueError, match="`span` must be an integer >= 1; got -1"):
        block_triang_matmul(matrix, matrix, LogSemiring, -1)

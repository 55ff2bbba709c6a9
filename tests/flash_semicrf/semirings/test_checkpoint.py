"""Checkpointing: the same results from memory that grows with the root of the length."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import SemiMarkov
from flash_semicrf.semirings import KMaxSemiring, LogSemiring, checkpoint
from flash_semicrf.semirings.checkpoint import CheckpointSemiring, CheckpointShardSemiring
from tests.flash_semicrf.edge_paths import random_edges


def saved_bytes(semiring, num_nodes):
    """Bytes that the linear scan keeps for its backward pass, beside the edges themselves."""
    edges = random_edges(1, num_nodes - 1, 3, 2, 2).requires_grad_()
    kept = 0

    def pack(tensor):
        nonlocal kept
        # A view of the edges costs nothing; other views are counted as if they did.
        if tensor.untyped_storage().data_ptr() != edges.untyped_storage().data_ptr():
            kept += tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        SemiMarkov(semiring).sum(edges, use_linear_scan=True)
    return kept


@pytest.mark.parametrize("inner", [LogSemiring(), KMaxSemiring(2)])
def test_kept_memory_grows_with_the_root_of_the_length(inner):
    short, long = (saved_bytes(CheckpointSemiring(inner), n) for n in (501, 2001))
    assert short > 0
    assert long < 2.3 * short  # four times the length


def test_plain_scan_keeps_memory_in_proportion_to_the_length():
    short, long = (saved_bytes(LogSemiring(), n) for n in (501, 2001))
    assert 3.9 * short < long < 4.1 * short
    assert short > 10 * saved_bytes(CheckpointSemiring(LogSemiring), 501)


def test_recomputing_a_block_takes_the_memory_of_one_block():
    lengths = []

    class Counting(CheckpointSemiring):
        def run(self, function, *tensors):
            lengths.append(tensors[0].shape[-4])
            return super().run(function, *tensors)

    edges = random_edges(1, 2000, 3, 1, 1).requires_grad_()
    SemiMarkov(Counting(LogSemiring)).sum(edges, use_linear_scan=True).sum().backward()
    assert sum(lengths) == 2000
    assert max(lengths) == 44  # the root of 2000


def test_shards_hold_no_more_than_they_may():
    sizes = []

    class Counting(LogSemiring):
        def matmul(self, a, b):
            sizes.append(self.mul(a[..., :, :, None], b[..., None, :, :]).numel())
            return super().matmul(a, b)

    a, b = torch.randn(1, 7, 6, 5), torch.randn(1, 7, 5, 4)
    expected = LogSemiring().matmul(a, b)
    for max_size in (1, 20, 21, 119, 120, 250, 10**6):
        sizes.clear()
        semiring = CheckpointShardSemiring(Counting, max_size)
        torch.testing.assert_close(semiring.matmul(a, b), expected)
        assert max(sizes) <= max(max_size, 20)  # one row of a product: 5 x 4
        assert sum(sizes) == 7 * 6 * 5 * 4
        assert semiring.matmul_terms(7, 6, 5, 4) == max(sizes)


@pytest.mark.parametrize("inner", [LogSemiring(), KMaxSemiring(2)])
def test_shards_of_one_matrix_need_no_batch_axis(inner):
    a, b = (inner.convert(torch.randn(shape)) for shape in ((3, 4), (4, 2)))
    found = CheckpointShardSemiring(inner, 9).matmul(a, b)
    torch.testing.assert_close(found, inner.matmul(a, b))
    empty = CheckpointShardSemiring(inner).matmul(a[:, None][:, :0], b[:, None][:, :0])
    assert empty.shape == (inner.size, 0, 3, 2)


def test_shards_broadcast_and_are_recomputed():
    a = torch.randn(1, 3, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(1, 1, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    semiring = CheckpointShardSemiring(LogSemiring, 20)
    assert semiring.matmul(a, b).shape == (1, 3, 5, 2, 2)
    assert torch.autograd.gradcheck(semiring.matmul, (a, b))
    with torch.no_grad():
        assert not semiring.matmul(a, b).requires_grad


@pytest.mark.parametrize("kind", [CheckpointSemiring, CheckpointShardSemiring])
def test_products_below_the_least_size_are_kept(kind):
    calls = []

    class Counting(LogSemiring):
        def matmul(self, a, b):
            calls.append(a.shape)
            return super().matmul(a, b)

    a = torch.randn(1, 3, 2, 4, requires_grad=True)  # 3 products of 2 x 4 x 2 numbers
    for min_size, recomputed in ((48, 1), (49, 0)):
        calls.clear()
        product = kind(Counting(), min_size=min_size).matmul(a, a.transpose(-1, -2))
        product.sum().backward()
        assert len(calls) == 1 + recomputed


def test_max_size_must_be_a_positive_integer():
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match="`max_size` must be an integer >= 1"):
            CheckpointShardSemiring(LogSemiring, bad)
    with pytest.raises(ValueError, match="`min_size` must be an integer >= 1; got -1"):
        CheckpointSemiring(LogSemiring, min_size=-1)


def test_exports():
    assert checkpoint.__all__ == ["CheckpointSemiring", "CheckpointShardSemiring"]

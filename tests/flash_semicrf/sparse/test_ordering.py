"""Bandwidths and orderings."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_semicrf.sparse import (
    BandedMatrix,
    apply_permutation,
    measure_effective_bandwidth,
    rcm_ordering_from_adjacency,
    snake_ordering,
)


def widest(adj: Tensor, empty: float) -> int:
    """Bandwidth by looking at every entry."""
    n = adj.shape[-1]
    pairs = ((i, j) for i in range(n) for j in range(n) if bool((adj[..., i, j] != empty).any()))
    return max((abs(i - j) for i, j in pairs), default=0)


@pytest.mark.parametrize("empty", [0.0, -math.inf, 7.0])
@given(n=st.integers(1, 6), batch=st.sampled_from([(), (3,)]), density=st.floats(0, 1))
def test_bandwidth_is_the_largest_distance(empty, n, batch, density):
    adj = torch.randn(*batch, n, n).masked_fill(torch.rand(*batch, n, n) > density, empty)
    assert measure_effective_bandwidth(adj, fill_value=empty) == widest(adj, empty)


def test_bandwidth_finds_what_the_fill_is():
    adj = torch.eye(5)
    assert measure_effective_bandwidth(adj) == 0
    adj[0, 4] = 1
    assert measure_effective_bandwidth(adj) == 4
    assert measure_effective_bandwidth(adj.bool()) == 4
    # Log potentials: 0 is the weight 1 there, not the lack of an entry.
    assert measure_effective_bandwidth(torch.where(adj == 1, 0.0, -math.inf)) == 4
    assert measure_effective_bandwidth(torch.where(adj == 1, 0.0, -1e38)) == 4
    assert measure_effective_bandwidth(torch.full((3, 3), -math.inf)) == 0


@pytest.mark.parametrize("fill", [0.0, -math.inf])
@given(n=st.integers(1, 6), lu=st.integers(0, 7), ld=st.integers(0, 7))
def test_bandwidth_of_a_banded_matrix_is_that_of_the_dense_one(fill, n, lu, ld):
    dense = torch.randn(2, n, n).masked_fill(torch.rand(2, n, n) > 0.3, fill)
    banded = BandedMatrix.from_dense(dense, lu, ld, fill)
    assert measure_effective_bandwidth(banded) == widest(banded.to_dense(), fill)
    # Seen from another fill value, what lies outside the bands are entries.
    assert measure_effective_bandwidth(banded, 5.0) == widest(banded.to_dense(), 5.0)


@given(st.integers(1, 9), st.integers(1, 4))
def test_snake_takes_the_durations_of_each_label_from_both_ends(K, C):
    perm = snake_ordering(K, C)
    assert perm.dtype == torch.int64
    assert sorted(perm.tolist()) == list(range(K * C))
    ends = [k for pair in zip(range(K), range(K - 1, -1, -1), strict=True) for k in pair][:K]
    for label in range(C):
        assert [i // C for i in perm.tolist() if i % C == label] == ends


def test_snake_narrows_durations_that_fill_a_span_together():
    K, C = 8, 3
    k = torch.arange(K)
    blocks = (k[:, None] + k[None, :] == K - 1).float()
    adj = torch.kron(blocks, torch.ones(C, C))
    assert measure_effective_bandwidth(adj) == K * C - 1
    narrow = apply_permutation(adj, snake_ordering(K, C))
    assert measure_effective_bandwidth(narrow) == 2 * C - 1


def test_no_ordering_narrows_a_state_that_meets_all_others():
    # What the module says: half of the largest number of neighbours is the least there is.
    n = 9
    adj = torch.eye(n)
    adj[0] = 1
    perm, success = rcm_ordering_from_adjacency(adj)
    assert success
    assert measure_effective_bandwidth(apply_permutation(adj, perm)) >= n // 2


@pytest.mark.parametrize("empty", [0.0, -math.inf])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_rcm_finds_a_hidden_band(empty, batch):
    n = 30
    band = torch.full((n, n), empty)
    row = torch.arange(n - 1)
    band[row, row + 1] = 1.5  # one direction only: neighbours all the same
    hidden = apply_permutation(band, torch.randperm(n)).expand(*batch, n, n).clone()
    assert measure_effective_bandwidth(hidden) > 5
    perm, success = rcm_ordering_from_adjacency(hidden)
    assert success
    assert perm.dtype == torch.int64
    assert sorted(perm.tolist()) == list(range(n))
    assert measure_effective_bandwidth(apply_permutation(hidden, perm), empty) == 1


def test_rcm_of_a_batch_serves_all_of_its_matrices():
    first, second = torch.eye(4), torch.eye(4)
    first[0, 3], second[3, 1] = 1, 1
    perm, _ = rcm_ordering_from_adjacency(torch.stack([first, second]))
    union, _ = rcm_ordering_from_adjacency(first + second)
    assert torch.equal(perm, union)


def test_rcm_without_scipy_keeps_the_order(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.csgraph", None)  # its import fails
    perm, success = rcm_ordering_from_adjacency(torch.ones(3, 3))
    assert not success
    assert perm.tolist() == [0, 1, 2]


def test_apply_permutation_moves_rows_and_columns():
    matrix = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    perm = torch.tensor([2, 0, 3, 1])
    moved = apply_permutation(matrix, perm)
    for i in range(4):
        for j in range(4):
            assert torch.equal(moved[:, i, j], matrix[:, perm[i], perm[j]])
    assert torch.equal(apply_permutation(moved, perm.argsort()), matrix)
    torch.autograd.gradcheck(lambda x: apply_permutation(x, perm), matrix)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure_effective_bandwidth(torch.zeros(2, 3)), r"`adj`.*\(2, 3\)"),
        (lambda: rcm_ordering_from_adjacency(torch.zeros(3)), r"`adj`.*\(3,\)"),
        (lambda: snake_ordering(0, 3), "`K` must be an integer >= 1; got 0"),
        (lambda: snake_ordering(2, 1.5), "`C` must be an integer >= 1; got 1.5"),
        (
            lambda: apply_permutation(torch.zeros(3, 3), torch.tensor([0, 1, 1])),
            r"`perm` must hold every index in \[0, n-1=2\] once; got \[0, 1, 1\]",
        ),
        (lambda: apply_permutation(torch.zeros(3, 3), torch.arange(2)), "`perm` must hold"),
        (lambda: apply_permutation(torch.zeros(3, 2), torch.arange(3)), r"`potentials`.*\(3, 2\)"),
    ],
)
def test_errors_say_what_must_hold(call, message):
    with pytest.raises(ValueError, match=message):
        call()

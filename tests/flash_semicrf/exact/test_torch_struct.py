"""The exact engine against torch-struct 0.5, an implementation that shares nothing with it.

Installed with the `test` extra, so these tests run wherever the others do. What 0.5 says was
compared with enumeration; it is an oracle where it is right:

- Right: log, max, k best, entropy and ordinary sums, and marginals, of sequences of one length.
- Wrong for a batch of several lengths: it takes no segment of duration > 1 in a sequence beyond the
  length of the shortest (`test_torch_struct_needs_sequences_of_one_length`). So it is asked about
  one sequence at a time.
- Its cross-entropy and KL semirings fail for SemiMarkov: they want a list where it wants a tensor.
- Its entropy is NaN where a potential is -inf (`test_what_torch_struct_cannot_do`, for both).
- Index 0 of the durations, which is not a segment, must be there and is ignored; as here.

Longer than enumeration could be: 24 nodes here.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch_struct
from torch import Tensor

from flash_semicrf import SemiMarkov
from flash_semicrf.semirings import (
    EntropySemiring,
    KMaxSemiring,
    LogSemiring,
    MaxSemiring,
    StdSemiring,
)
from flash_semicrf.testing import assert_close

SHAPES = {
    "usual": (2, 24, 5, 3),
    "K > N": (2, 6, 9, 2),
    "one label": (1, 24, 7, 1),
    "one duration": (2, 17, 2, 4),
    "two nodes": (2, 2, 4, 3),
}
"""B, N, K with the unused index 0, C."""

ALGORITHMS = {
    "scan": {"use_linear_scan": True},
    "vectorized": {"use_vectorized": True},
    "tree": {"use_linear_scan": False},
}

PAIRS = {
    "log": (LogSemiring, torch_struct.LogSemiring),
    "max": (MaxSemiring, torch_struct.MaxSemiring),
    "std": (StdSemiring, torch_struct.StdSemiring),
    "entropy": (EntropySemiring, torch_struct.EntropySemiring),
}


def draw(shape: str, *, scale: float = 1.0, forbid: float = 0.0) -> Tensor:
    """Random edges (B, N-1, K, C, C)."""
    B, N, K, C = SHAPES[shape]
    edges = scale * torch.randn(B, N - 1, K, C, C, dtype=torch.float64)
    return edges.masked_fill(torch.rand(edges.shape) < forbid, -math.inf)


def theirs(semiring, edges: Tensor) -> Tensor:
    """Answer of torch-struct, which makes its input require a gradient: it gets a copy."""
    return torch_struct.SemiMarkov(semiring).sum(edges.clone()).detach()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_those_of_torch_struct(shape, algorithm, name):
    edges = draw(shape)
    edges = edges.exp() if name == "std" else edges
    mine, other = PAIRS[name]
    found = SemiMarkov(mine).sum(edges, **ALGORITHMS[algorithm])
    assert_close(found, theirs(other, edges))


@pytest.mark.parametrize("name", ["log", "max"])
@pytest.mark.parametrize("options", [{"scale": 100.0}, {"forbid": 0.3}], ids=["large", "forbidden"])
def test_sums_of_large_and_of_forbidden_potentials(options, name):
    edges = draw("usual", **options)
    mine, other = PAIRS[name]
    expected = theirs(other, edges)
    assert bool(expected.isfinite().all())
    for algorithm in ALGORITHMS.values():
        assert_close(SemiMarkov(mine).sum(edges, **algorithm), expected)


@pytest.mark.parametrize("name", ["log", "max"])
@pytest.mark.parametrize("shape", SHAPES)
def test_marginals_equal_those_of_torch_struct(shape, name):
    edges = draw(shape)
    mine, other = PAIRS[name]
    expected = torch_struct.SemiMarkov(other).marginals(edges.clone()).detach()
    for algorithm in ALGORITHMS.values():
        found = SemiMarkov(mine).marginals(edges, **algorithm)
        assert_close(found.detach(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_entropy(shape):
    edges = draw(shape)
    found, expected = edges.clone().requires_grad_(), edges.clone().requires_grad_()
    SemiMarkov(EntropySemiring).sum(found).sum().backward()
    torch_struct.SemiMarkov(torch_struct.EntropySemiring).sum(expected).sum().backward()
    assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("shape", ["usual", "K > N", "one label"])
def test_k_best_scores_and_paths(shape, k):
    edges = draw(shape)
    leaf = edges.clone().requires_grad_()
    values = torch_struct.SemiMarkov(torch_struct.KMaxSemiring(k)).logpartition(leaf)[0]
    paths = [torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in values]
    for algorithm in ALGORITHMS.values():
        engine = SemiMarkov(KMaxSemiring(k))
        assert_close(engine.sum(edges, **algorithm), values.detach())
        assert_close(engine.marginals(edges, **algorithm).detach(), torch.stack(paths))


@pytest.mark.parametrize("name", ["log", "max", "std"])
def test_semirings_called_on_the_class(name):
    mine, other = PAIRS[name]
    a, b = torch.rand(2, 3, 4, dtype=torch.float64)
    for operation in ("mul", "plus", "times", "dot"):
        assert_close(getattr(mine, operation)(a, b), getattr(other, operation)(a, b))
    for operation in ("sum", "prod", "convert"):
        assert_close(getattr(mine, operation)(a), getattr(other, operation)(a))
    assert_close(mine.sum(a, dim=-2), other.sum(a, dim=-2))
    assert_close(mine.times(a, b, a), other.times(a, b, a))
    assert_close(mine.matmul(a[None], b.T[None]), other.matmul(a[None], b.T[None]))


def test_sequences_of_several_lengths_one_at_a_time():
    edges = draw("usual").repeat(2, 1, 1, 1, 1)
    lengths = [24, 2, 7, 1]
    for name in ("log", "max", "entropy"):
        mine, other = PAIRS[name]
        # A sequence of one node has no edges, which torch-struct does not take.
        alone = [theirs(other, edges[i : i + 1, : n - 1]) for i, n in enumerate(lengths[:3])]
        found = SemiMarkov(mine).sum(edges, lengths=torch.tensor(lengths))
        assert_close(found[:3], torch.cat(alone))


def test_torch_struct_needs_sequences_of_one_length():
    # One label and no scores: log Z counts the ways to cut N - 1 steps into durations 1..3.
    edges = torch.zeros(2, 6, 4, 1, 1, dtype=torch.float64)
    lengths = torch.tensor([7, 5])
    ragged = torch_struct.SemiMarkov(torch_struct.LogSemiring).sum(edges.clone(), lengths=lengths)
    assert ragged.exp().round().tolist() == [7, 7]
    assert SemiMarkov(LogSemiring).sum(edges, lengths=lengths).exp().round().tolist() == [24, 7]


def test_what_torch_struct_cannot_do():
    edges = draw("usual")
    for name in ("CrossEntropySemiring", "KLDivergenceSemiring"):
        engine = torch_struct.SemiMarkov(getattr(torch_struct, name))
        with pytest.raises(AttributeError):
            engine.sum([edges.clone(), edges.clone()])
    edges[:, 3] = -math.inf
    assert bool(theirs(torch_struct.EntropySemiring, edges).isnan().all())
    assert bool(SemiMarkov(EntropySemiring).sum(edges).isfinite().all())

"""A semiring written outside of the package runs in every algorithm."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import SemiMarkov
from flash_semicrf.semirings import LogSemiring, Semiring
from flash_semicrf.semirings.base import as_semiring
from flash_semicrf.semirings.checkpoint import CheckpointSemiring, CheckpointShardSemiring
from flash_semicrf.semirings.log import logsumexp
from flash_semicrf.testing import assert_close
from tests.flash_semicrf.edge_paths import path_scores, paths, random_edges


class FewestEdges(Semiring):
    """Minimum and addition of 1 for each edge that is allowed."""

    zero = (math.inf,)
    one = (0.0,)

    def sum(self, x, dim=-1):
        return x.amin(dim)

    def mul(self, a, b):
        return a + b

    def convert(self, potentials):
        return torch.where(potentials == -math.inf, math.inf, 1.0)[None].to(potentials)


class MeanEdges(Semiring):
    """(log Z, expected number of edges)."""

    size = 2
    zero = (-math.inf, 0.0)
    one = (0.0, 0.0)

    def sum(self, x, dim=-1):
        total = logsumexp(x[0], dim)
        share = (x[0] - total.masked_fill(total == -math.inf, 0.0).unsqueeze(dim)).exp()
        return torch.stack([total, (share * x[1]).sum(dim)])

    def mul(self, a, b):
        return a + b

    def convert(self, potentials):
        return torch.stack([potentials, torch.ones_like(potentials)])

    def unconvert(self, values):
        return values[1]


RUNS = [
    (lambda s: as_semiring(s), {"use_linear_scan": True}),
    (lambda s: as_semiring(s), {"use_vectorized": True}),
    (lambda s: as_semiring(s), {"use_linear_scan": False}),
    (lambda s: as_semiring(s), {}),
    (CheckpointSemiring, {"use_linear_scan": True}),
    (lambda s: CheckpointShardSemiring(s, 9), {"use_linear_scan": False}),
]


@pytest.mark.parametrize("wrap, options", RUNS)
def test_fewest_edges(wrap, options):
    edges = random_edges(3, 5, 3, 2, 2, forbid=0.6)
    lengths = torch.tensor([6, 3, 5])
    actual = SemiMarkov(wrap(FewestEdges)).sum(edges, lengths, **options)
    for b, length in enumerate(lengths.tolist()):
        scores = path_scores(edges[b], length)
        counts = [len(p) for p, s in zip(paths(length, 3, 2), scores, strict=True) if s.isfinite()]
        assert float(actual[b]) == min(counts, default=math.inf)


@pytest.mark.parametrize("wrap, options", RUNS)
def test_mean_number_of_edges(wrap, options):
    edges = random_edges(2, 5, 4, 2, 2, forbid=0.2).requires_grad_()
    lengths = torch.tensor([6, 4])
    actual = SemiMarkov(wrap(MeanEdges)).sum(edges, lengths, **options)
    marginals = SemiMarkov(LogSemiring).marginals(edges, lengths)
    expected = marginals.sum((1, 2, 3, 4))
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(x.sum(), edges)[0] for x in (actual, expected)))

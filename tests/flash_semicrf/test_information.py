"""Entropy, cross-entropy and divergence: against enumeration, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.streaming import log_partition, segment_marginals
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    SMALL_CASES,
    Case,
    gradients_of,
    with_gradients,
)

CASES = SMALL_CASES[::3]
EVERYTHING = Case("usual", False, True, True, True, True)
DIFFERENT = ("by_duration", "start", "end", "initial", "final")


def distributions(*problems):
    """(probabilities by each problem) of the segmentations of each feasible sequence."""
    for b in range(problems[0].batch_size):
        scores = [enumerate_scores(problem, b)[1] for problem in problems]
        if all(bool((s > -math.inf).any()) for s in scores):
            yield b, [torch.log_softmax(s, 0) for s in scores]


def expected_entropy(log_p):
    return -(log_p.exp() * torch.where(log_p > -math.inf, log_p, 0.0)).sum()


def feasible(problem):
    """The problem without the sequences that have no segmentation."""
    alive = log_partition(problem, "reference").isfinite()
    kept = {
        n: v[alive] if n in ("scores", "start_scores", "end_scores") else v
        for n, v in problem.parameters().items()
    }
    return problem.replace(lengths=problem.lengths[alive], **kept) if bool(alive.any()) else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_entropy_is_that_of_the_enumerated_distribution(case, backend):
    problem = feasible(case.problem())
    if problem is None:
        return
    expected = [expected_entropy(log_p) for _, (log_p,) in distributions(problem)]
    assert_close(entropy(problem, backend), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", DIFFERENT)
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_divergence_is_that_of_the_enumerated_distributions(case, other, backend):
    # The second problem has, or lacks, one more kind of parameter than the first.
    first = feasible(case._replace(forbid=0.0).problem())
    second = case._replace(**{other: not getattr(case, other)}, forbid=0.0).problem(seed=7)
    second = second.replace(lengths=first.lengths)
    cross, divergence = [], []
    for _, (log_p, log_q) in distributions(first, second):
        cross.append(-(log_p.exp() * log_q).sum())
        divergence.append((log_p.exp() * (log_p - log_q)).sum())
    assert_close(cross_entropy(first, second, backend), torch.stack(cross))
    assert_close(kl_divergence(first, second, backend), torch.stack(divergence))

"""Entropy, cross-entropy and divergence: against enumeration, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf import SemiMarkov, log_partition, segment_marginals
from flash_semicrf.exact.edges import edge_tensor
from flash_semicrf.inference.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.semirings import EntropySemiring
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    SMALL_CASES,
    Case,
    gradients_of,
    thinned,
    with_gradients,
)

CASES = SMALL_CASES[::5]
GRADIENT_CASES = [case for case in SMALL_CASES if not case.forbid and case.shape != "one label"][
    ::5
]
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
@pytest.mark.parametrize("case", thinned(CASES, 3), ids=str)
def test_entropy_is_that_of_the_enumerated_distribution(case, backend):
    problem = feasible(case.problem())
    if problem is None:
        return
    expected = [expected_entropy(log_p) for _, (log_p,) in distributions(problem)]
    assert_close(entropy(problem, backend), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", DIFFERENT)
@pytest.mark.parametrize("case", thinned(CASES[::6], 3), ids=str)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(GRADIENT_CASES, 3), ids=str)
def test_gradients_are_those_of_the_enumerated_distributions(case, backend):
    first = case.problem()
    second = case.problem(seed=5).replace(lengths=first.lengths)
    p, q = with_gradients(first), with_gradients(second)
    expected_p, expected_q = with_gradients(first), with_gradients(second)
    totals = []
    for _, (log_p, log_q) in distributions(expected_p, expected_q):
        probability = log_p.exp()
        totals.append(
            torch.stack([-(probability * log_p).sum(), (probability * (log_p - log_q)).sum()])
        )
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = {
        "entropy": (entropy(p, backend) * weight).sum(),
        "cross-entropy": (cross_entropy(p, q, backend) * weight).sum(),
        "divergence": (kl_divergence(p, q, backend) * weight).sum(),
    }
    own, divergence = (torch.stack(totals) * weight[:, None]).sum(0)
    expected = {"entropy": own, "cross-entropy": own + divergence, "divergence": divergence}
    both = torch.cat
    leaves = [*p.parameters().values(), *q.parameters().values()]
    expected_leaves = [*expected_p.parameters().values(), *expected_q.parameters().values()]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    for name, value in found.items():
        ours = torch.autograd.grad(value, leaves, **options)
        theirs = torch.autograd.grad(expected[name], expected_leaves, **options)
        assert_close(both([g.flatten() for g in ours]), both([g.flatten() for g in theirs]))


@pytest.mark.parametrize("by_duration", [False, True])
def test_information_gradcheck(by_duration):
    p = EVERYTHING._replace(by_duration=by_duration, initial=False).problem(batch_size=2)
    names, values = zip(*with_gradients(p).parameters().items(), strict=True)
    q = p.replace(scores=p.scores.flip(1), transition=0.5 * p.transition)

    def together(*values):
        given = p.replace(**dict(zip(names, values, strict=True)))
        return (
            entropy(given, "numba"), kl_divergence(given, q, "numba"),
            kl_divergence(q, given, "numba"), position_entropy(given, "numba").sum(1),
        )  # fmt: skip

    assert torch.autograd.gradcheck(together, values)


@pytest.mark.parametrize("case", thinned(CASES[::9], 3), ids=str)
def test_gradients_with_forbidden_parameters_match_the_reference(case):
    problem = feasible(case._replace(forbid=0.15).problem(num_positions=5, max_duration=3))
    if problem is None:
        return
    found = []
    for backend in BACKENDS:
        p = with_gradients(problem)
        found.append(gradients_of(entropy(p, backend).sum(), p))
    for name, value in found[1].items():
        assert_close(value, found[0][name])
        dead = getattr(problem, name) == -math.inf
        assert bool((value[dead] == 0).all())


@pytest.mark.parametrize("by_duration", [False, True])
def test_entropy_and_its_gradient_match_the_semiring_engine(by_duration):
    problem = random_problem(2, 9, 4, 3, by_duration=by_duration, boundary=True)
    p, other = with_gradients(problem), with_gradients(problem)
    engine = SemiMarkov(EntropySemiring).sum(edge_tensor(other), other.lengths + 1)
    value = entropy(p, "numba")
    assert_close(value, engine)
    expected = gradients_of(engine.sum(), other)
    for name, gradient in gradients_of(value.sum(), p).items():
        assert_close(gradient, expected[name])


def test_forbidden_events_make_the_divergence_infinite():
    p = random_problem(2, 4, 3, 2, ragged=False)
    scores = p.scores.clone()
    scores[0, 2, 1] = -math.inf
    q = p.replace(scores=scores)
    for value in (kl_divergence(p, q), cross_entropy(p, q)):
        assert value[0] == math.inf and bool(value[1].isfinite())
    assert bool(kl_divergence(q, p).isfinite().all())


@pytest.mark.parametrize("by_duration", [False, True])
def test_a_forbidden_label_that_is_unreachable_costs_nothing(by_duration):
    # Label 1 cannot be at position 1 under p, though no score of p's says so there.
    p = random_problem(1, 6, 2, 2, by_duration=by_duration, ragged=False)
    bias, start = p.duration_bias.clone(), torch.zeros_like(p.scores)
    bias[0, 1] = -math.inf
    start[0, :2, 1] = -math.inf
    p = p.replace(duration_bias=bias, start_scores=start)
    scores = p.scores.clone()
    scores[0, 1, 1] = -math.inf
    assert_close(kl_divergence(p, p.replace(scores=scores)), torch.zeros(1, dtype=torch.float64))


def test_large_common_shifts_cancel():
    p = random_problem(2, 200, 9, 4, ragged=False)
    q = p.replace(scores=p.scores.flip(1))
    shift = 1e6 * torch.randn(2, 200, 1, dtype=torch.float64).round()
    moved = [x.replace(scores=x.scores + shift) for x in (p, q)]
    back = [x.replace(scores=x.scores - shift) for x in moved]  # what a float64 keeps of them
    assert_close(entropy(moved[0]), entropy(back[0]))
    assert_close(kl_divergence(*moved), kl_divergence(*back))


def test_masks_are_as_good_as_forbidden():
    p = random_problem(2, 100, 9, 4, ragged=False)
    masked = torch.rand(p.scores.shape) < 0.2
    masked[..., 0] = False
    values = [entropy(p.replace(scores=p.scores.masked_fill(masked, x))) for x in (-math.inf, -1e9)]
    assert_close(values[1], values[0])


@pytest.mark.parametrize("by_duration", [False, True])
def test_entropy_of_long_sequences_matches_the_reference(by_duration):
    p = random_problem(2, 150, 13, 5, by_duration=by_duration, boundary=True, dtype=torch.float32)
    assert_close(entropy(p, "numba"), entropy(p.to(torch.float64), "reference"))


def loop_entropy(problem):
    """Entropy of one sequence by a plain loop that keeps (log-sum, expected score) of prefixes."""
    scores, transition, bias = (
        x.numpy() for x in (problem.scores[0], problem.transition, problem.duration_bias)
    )
    length, num_labels = scores.shape
    longest = len(bias)
    sums = np.vstack([np.zeros(num_labels), scores.cumsum(0)])
    gamma, mean = np.empty((2, length + 1, num_labels))
    gamma[0] = mean[0] = np.log(np.exp(transition).sum(0))
    for t in range(1, length + 1):
        first = max(0, t - longest)
        own = sums[t] - sums[first:t] + bias[: t - first][::-1]
        weight = gamma[first:t] + own
        top = weight.max(0)
        weight = np.exp(weight - top)
        total = weight.sum(0)
        alpha = top + np.log(total)
        score = (weight * (mean[first:t] + own)).sum(0) / total
        if t < length:
            weight = alpha[:, None] + transition
            top = weight.max(0)
            weight = np.exp(weight - top)
            total = weight.sum(0)
            gamma[t] = top + np.log(total)
            mean[t] = (weight * (score[:, None] + transition)).sum(0) / total
    weight = np.exp(alpha - alpha.max())
    log_z = alpha.max() + np.log(weight.sum())
    return log_z - (weight * score).sum() / weight.sum()


@pytest.mark.parametrize("num_positions", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_entropy_of_many_positions(num_positions):
    problem = random_problem(1, num_positions, 100, 8, ragged=False)
    value = float(entropy(problem))
    assert value > 0.1 * num_positions
    assert value == pytest.approx(loop_entropy(problem), rel=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_entropy_is_that_of_the_marginals(backend):
    p = random_problem(3, 9, 4, 3)
    position = segment_marginals(p).position
    expected = torch.special.entr(position).sum(-1)
    found = position_entropy(p, backend)
    assert_close(found, expected)
    assert bool((found[torch.arange(9) >= p.lengths[:, None]] == 0).all())


def test_gradients_come_in_the_dtype_of_their_parameters():
    p = with_gradients(random_problem(dtype=torch.float32))
    value = entropy(p)
    assert value.dtype == torch.float64
    assert all(g.dtype == torch.float32 for g in gradients_of(value.sum(), p).values())


def test_second_derivatives_are_refused_with_a_reason():
    p = with_gradients(random_problem())
    (gradient,) = torch.autograd.grad(entropy(p).sum(), p.scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_padding_changes_nothing():
    p = random_problem(3, 12, 4, 3)
    inside = (torch.arange(12) < p.lengths[:, None])[..., None]
    poisoned = p.replace(scores=torch.where(inside, p.scores, math.nan))
    results = []
    for problem in (p, poisoned):
        leaves = with_gradients(problem)
        value = entropy(leaves) + kl_divergence(leaves, p) + cross_entropy(p, leaves)
        results.append((value.detach(), *gradients_of(value.sum(), leaves).values()))
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)


def test_bad_problems_are_refused():
    p = random_problem(2, 5, 3, 2, ragged=False)
    scores = p.scores.clone()
    scores[1, 2] = -math.inf
    for call in (entropy, lambda x: kl_divergence(x, p), lambda x: cross_entropy(p, x)):
        with pytest.raises(ValueError, match=r"No segmentation is feasible for sequences \[1\]"):
            call(p.replace(scores=scores))
    with pytest.raises(ValueError, match="`duration_bias` of p and q must have one shape"):
        kl_divergence(p, random_problem(2, 5, 4, 2, ragged=False))
    with pytest.raises(
        ValueError, match=r"`lengths` of p and q must agree; got 5 and 4 at index 1"
    ):
        kl_divergence(p, p.replace(lengths=torch.tensor([5, 4])))

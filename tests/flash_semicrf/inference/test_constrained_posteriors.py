"""What is asked of a distribution given constraints: against the segmentations that agree."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flash_semicrf import (
    Constraints,
    SegmentTable,
    SemiCRFDistribution,
    SemiMarkovCRFHead,
    log_partition,
    minimum_risk,
    n_best,
    sample,
    segment_marginals,
    segment_probabilities,
    viterbi,
)
from flash_semicrf.inference.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.inference.nbest import n_best_table
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import score_rows
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, TAIL_SHAPES, Case, gradients_of, with_gradients
from tests.flash_semicrf.inference.test_distribution import as_segments
from tests.flash_semicrf.inference.test_minimum_risk import CRITERIA
from tests.flash_semicrf.inference.test_nbest import tuples
from tests.flash_semicrf.problem.test_constraints import KINDS, agrees, draw_constraints, oracle

CASES = {
    "all kinds": (Case("usual", start=True, end=True), KINDS),
    "boundaries": (Case("usual", initial=True, final=True), ("boundaries",)),
    "labels": (Case("one duration"), ("labels", "forbidden_boundaries")),
    "by duration": (Case("usual", by_duration=True, start=True), ("boundaries", "allowed")),
    "one label": (Case("one label"), ("boundaries", "forbidden_boundaries")),
    "tail": (Case("usual", tail=True), ("boundaries", "forbidden_spans")),
}
every_case = pytest.mark.parametrize("name", CASES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def constrained(name, **options):
    """A problem, constraints, and for each sequence what agrees with its log-probabilities."""
    case, kinds = CASES[name]
    shapes = (TAIL_SHAPES,) if case.tail else ()
    problem = case.problem(*shapes, **options)
    known = draw_constraints(problem, kinds, seed=4, rate=0.35)
    posterior = []
    for b in range(problem.batch_size):
        segmentations, scores = oracle(problem, known, b)
        posterior.append((segmentations, torch.log_softmax(scores, 0)))
    everything = sum(len(enumerate_scores(problem, b)[0]) for b in range(problem.batch_size))
    assert 3 < sum(len(found) for found, _ in posterior) < everything
    return problem, known, posterior


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum()


@every_backend
@every_case
def test_samples_agree_and_have_their_probabilities(name, backend):
    problem, known, posterior = constrained(name)
    number = 2000 if backend == "numba" else 300
    drawn = sample(problem, number, 0, backend, constraints=known)
    for (segmentations, log_p), samples in zip(posterior, drawn, strict=True):
        place = {tuple(y): i for i, y in enumerate(segmentations)}
        counts = torch.zeros(len(place), dtype=torch.float64)
        for segments in samples:
            counts[place[tuple(tuples(segments))]] += 1  # a KeyError: it does not agree
        expected = number * log_p.exp()
        deviation = (expected * (1 - log_p.exp())).sqrt()
        assert bool(((counts - expected).abs() <= 5 * deviation + 3).all())


@every_backend
@every_case
def test_n_best_are_the_first_of_those_that_agree(name, backend):
    problem, known, posterior = constrained(name)
    found = n_best(problem, 9, backend, constraints=known)
    for b in range(len(posterior)):
        segmentations, scores = oracle(problem, known, b)
        best = scores.sort(descending=True).values[:9]
        assert_close(found.scores[b, : len(best)], best)
        assert bool((found.scores[b, len(best) :] == -math.inf).all())
        score_of = dict(zip(map(tuple, segmentations), scores.tolist(), strict=True))
        paths = [tuple(tuples(segments)) for segments in found.segments[b]]
        assert len(paths) == len(set(paths)) == len(best)
        own = torch.tensor([score_of[path] for path in paths], dtype=torch.float64)
        assert_close(own, best)
        sums = [math.fsum(s.score for s in segments) for segments in found.segments[b]]
        assert_close(torch.tensor(sums, dtype=torch.float64), best)


def test_ties_of_the_n_best_are_broken_by_the_rule():
    problem = random_problem(2, 7, 3, 2, integers=True, scale=0.7, seed=3)
    known = draw_constraints(problem, ("boundaries",), seed=1)
    found = n_best(problem, 40, constraints=known)
    for scores, segmentations in zip(found.scores.tolist(), found.segments, strict=True):
        keys = [
            (-score, [(s.duration, s.label) for s in reversed(segments)])
            for score, segments in zip(scores, segmentations, strict=False)
        ]
        assert keys == sorted(keys) and len(keys) > 2


@every_backend
@pytest.mark.parametrize("risk", CRITERIA)
@every_case
def test_no_segmentation_that_agrees_has_less_risk(name, risk, backend):
    problem, known, posterior = constrained(name, scale=2.0)
    marginals = segment_marginals(problem, "reference", constraints=known)
    result = minimum_risk(problem, risk, backend, constraints=known)
    tolerance = 1e-6 if risk == "position" else 1e-10  # what boundaries between labels may cost
    for b, (segmentations, _) in enumerate(posterior):
        values = {tuple(y): CRITERIA[risk](marginals, b, y) for y in segmentations}
        own = values[tuple(tuples(result.segments[b]))]
        assert_close(result.scores[b], torch.tensor(own, dtype=torch.float64))
        assert own >= max(values.values()) - tolerance


@every_backend
@every_case
def test_segment_probabilities_are_sums_over_those_that_agree(name, backend):
    problem, known, posterior = constrained(name)
    rows, expected = [], []
    for b, (segmentations, log_p) in enumerate(posterior):
        length = int(problem.lengths[b])
        longest = length if problem.duration_tail is not None else problem.max_duration
        for start in range(length):
            for stop in range(start + 1, min(start + longest, length) + 1):
                for label in range(problem.num_labels):
                    rows.append((b, start, stop, label))
                    has = torch.tensor([(start, stop, label) in y for y in segmentations])
                    expected.append(log_p.exp()[has].sum())
    table = SegmentTable(*torch.tensor(rows).T)
    found = segment_probabilities(problem, table, backend, constraints=known)
    assert_close(found, torch.stack(expected))


@every_backend
@every_case
def test_information_is_that_of_the_conditional_distributions(name, backend):
    problem, known, posterior = constrained(name)
    other = problem.replace(scores=problem.scores.flip(1), transition=0.5 * problem.transition)
    p, q, expected_p, expected_q = map(with_gradients, (problem, other, problem, other))
    expected = []
    for b in range(len(posterior)):
        log_p, log_q = (
            torch.log_softmax(oracle(x, known, b)[1], 0) for x in (expected_p, expected_q)
        )
        cross = -(log_p.exp() * log_q).sum()
        own = entropy_of(log_p)
        position = torch.zeros(problem.scores.shape[1:], dtype=torch.float64)
        for y, probability in zip(posterior[b][0], log_p.exp(), strict=True):
            for start, stop, label in y:
                spread = torch.zeros_like(position)
                spread[start:stop, label] = 1.0
                position = position + spread * probability
        certain = torch.where(position > 0, position, 1.0)
        by_position = -(certain * certain.log()).sum()
        expected.append(torch.stack([own, cross, cross - own, by_position]))
    found = torch.stack(
        [
            entropy(p, backend, constraints=known),
            cross_entropy(p, q, backend, constraints=known),
            kl_divergence(p, q, backend, constraints=known),
            position_entropy(p, backend, constraints=known).sum(1),
        ],
        1,
    )
    expected = torch.stack(expected)
    assert_close(found, expected)
    weights = torch.tensor([1.0, 0.5, -2.0, 0.7], dtype=torch.float64)
    for mine, theirs in ((p, expected_p), (q, expected_q)):
        ours = gradients_with((found * weights).sum(), mine)
        for key, value in gradients_with((expected * weights).sum(), theirs).items():
            assert_close(ours[key], value)


def gradients_with(value, problem):
    """As `gradients_of`, keeping the graph."""
    leaves = problem.parameters()
    found = torch.autograd.grad(
        value, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@every_case
def test_the_distribution_is_the_conditional_one(name):
    problem, known, posterior = constrained(name, ragged=False)
    distribution = SemiCRFDistribution(problem, constraints=known)
    own = torch.stack([entropy_of(log_p) for _, log_p in posterior])
    assert_close(distribution.entropy(), own)
    for b, (segmentations, log_p) in enumerate(posterior):
        everything = enumerate_scores(problem, b)[0]
        # That of sequence b among the others' first, which are not looked at.
        firsts = [as_segments(found[0]) for found, _ in posterior]
        events = [[*firsts[:b], as_segments(y), *firsts[b + 1 :]] for y in everything]
        values = distribution.log_prob([y for event in events for y in event])[:, b]
        keep = torch.tensor([agrees(y, known, b) for y in everything])
        assert_close(values[keep], log_p)
        assert bool((values[~keep] == -math.inf).all())
        best = int(log_p.argmax())
        assert_close(distribution.mode.scores[b], log_p[best])
        assert tuples(distribution.mode.segments[b]) == segmentations[best]
        ranked = log_p.sort(descending=True).values[:4]
        assert_close(distribution.topk(4).scores[b, : len(ranked)], ranked)
    drawn = distribution.sample((50,), seed=1)
    assert bool(distribution.log_prob(drawn).isfinite().all())
    assert_close(
        distribution.marginals.position, segment_marginals(problem, constraints=known).position
    )


def test_log_prob_given_constraints_is_differentiable():
    problem = with_gradients(random_problem(1, 5, 3, 2, ragged=False))
    known = Constraints(boundaries=[[2]], forbidden_boundaries=[[4]])
    labels = torch.tensor([[0, 0, 1, 1, 1]])
    found = gradients_of(
        SemiCRFDistribution(problem, constraints=known).log_prob(labels).sum(), problem
    )
    gold = torch.nn.functional.one_hot(labels, 2).double()
    expected = gold - segment_marginals(problem, constraints=known).position
    assert_close(found["scores"], expected)


def test_divergence_needs_the_same_constraints():
    p, q = random_problem(2, 5, 3, 2), random_problem(2, 5, 3, 2, seed=1)
    q = q.replace(lengths=p.lengths)
    known = Constraints(boundaries=[[0], [0]])
    divergence = torch.distributions.kl_divergence
    found = divergence(*(SemiCRFDistribution(x, constraints=known) for x in (p, q)))
    assert_close(found, kl_divergence(p, q, constraints=known))
    with pytest.raises(ValueError, match="`p` and `q` must have the same `constraints`"):
        divergence(SemiCRFDistribution(p, constraints=known), SemiCRFDistribution(q))


# The head


@pytest.mark.parametrize("backend", ["auto", "reference", "exact", "binary_tree_sharded"])
@pytest.mark.parametrize("tail", [None, -0.3])
def test_the_head_keeps_to_constraints(tail, backend):
    torch.manual_seed(0)
    head = SemiMarkovCRFHead(
        2, 3, 4, boundary_scores=True, final_scores=True, duration_tail=tail
    ).double()
    hidden, lengths = torch.randn(2, 6, 4).double(), torch.tensor([6, 4])
    problem, _ = head.potentials(hidden, lengths, centered=False)
    known = Constraints(boundaries=[[2], [1]], forbidden_spans=[[(3, 5, 0)], []])
    given = {"constraints": known, "backend": backend}
    expected = viterbi(problem, constraints=known)
    result = head.decode_with_traceback(hidden, lengths, **given)
    assert_close(result.scores, expected.scores)
    assert [tuples(y) for y in result.segments] == [tuples(y) for y in expected.segments]
    for b, segments in enumerate(result.segments):
        assert agrees(tuples(segments), masks_of(known, problem), b)
    scores = head.decode(hidden, lengths, **given)
    assert_close(scores.detach(), expected.scores)
    scores.sum().backward()
    assert bool((head.transition.grad != 0).any())
    marginals = head.marginals(hidden, lengths, **given)
    wanted = segment_marginals(problem, "reference", constraints=known)
    for name in wanted._fields:
        assert_close(getattr(marginals, name), getattr(wanted, name).detach())


def masks_of(known, problem):
    """The same constraints in the forms that `agrees` reads."""
    boundaries = torch.zeros(problem.scores.shape[:2], dtype=torch.bool)
    for b, positions in enumerate(known.boundaries):
        boundaries[b, positions] = True
    return Constraints(boundaries=boundaries, forbidden_spans=known.forbidden_spans)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("by_duration", [False, True])
def test_answers_on_a_gpu_are_those_of_the_cpu(by_duration):
    problem = random_problem(3, 60, 8, 4, by_duration=by_duration)
    known = draw_constraints(problem, KINDS, seed=3, rate=0.2)
    tensors = ("labels", "allowed", "boundaries", "forbidden_boundaries")
    moved = replace(known, **{name: getattr(known, name).cuda() for name in tensors})
    answers = []
    for p, given in ((problem, known), (problem.to("cuda"), moved)):
        table = viterbi_table(p, constraints=given)[1]
        answers.append(
            (
                entropy(p, constraints=given),
                position_entropy(p, constraints=given),
                segment_probabilities(p, table, constraints=given),
                n_best_table(p, 5, constraints=given)[0],
                minimum_risk(p, constraints=given).scores,
                *sample_table(p, 20, 0, constraints=given),
            )
        )
    for expected, actual in zip(*answers, strict=True):
        assert actual.is_cuda and not expected.is_cuda
        assert_close(actual, expected, torch.float32)


# What cannot be


CALLS = {
    "sample": lambda p, known: sample(p, 1, 0, constraints=known),
    "sample_table": lambda p, known: sample_table(p, 1, 0, constraints=known),
    "n_best": lambda p, known: n_best(p, 2, constraints=known),
    "minimum_risk": lambda p, known: minimum_risk(p, constraints=known),
    "boundary risk": lambda p, known: minimum_risk(p, "boundary", constraints=known),
    "entropy": lambda p, known: entropy(p, constraints=known),
    "cross_entropy": lambda p, known: cross_entropy(p, p, constraints=known),
    "kl_divergence": lambda p, known: kl_divergence(p, p, constraints=known),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_contradictions_are_named(call):
    problem = random_problem(3, 6, 3, 2, ragged=False)
    known = Constraints(boundaries=[[], [3], []], forbidden_boundaries=[[], [3], []])
    with pytest.raises(ValueError, match=r"for sequences \[1\].*or breaks a constraint\."):
        call(problem, known)
    with pytest.raises(TypeError, match="`constraints` must be a Constraints; got dict"):
        call(problem, {})


def test_no_constraints_change_nothing():
    problem = random_problem(2, 9, 3, 2)
    nothing = Constraints()
    assert sample(problem, 3, 0, constraints=nothing) == sample(problem, 3, 0)
    assert n_best(problem, 3, constraints=nothing).segments == n_best(problem, 3).segments
    assert_close(entropy(problem, constraints=nothing), entropy(problem))


def test_entropy_of_what_is_certain_is_zero():
    problem = random_problem(1, 12, 4, 3, ragged=False)
    (segments,) = viterbi(problem).segments
    known = Constraints(segments=[segments])
    assert_close(entropy(problem, constraints=known), torch.zeros(1).double())
    zeros = torch.zeros_like(problem.scores[..., 0])
    assert_close(position_entropy(problem, constraints=known), zeros)
    table = segments_to_table([segments])
    assert_close(
        segment_probabilities(problem, table, constraints=known), torch.ones(len(segments)).double()
    )
    assert_close(
        log_partition(problem, constraints=known)[0],
        score_rows(problem, viterbi_table(problem)[1]).sum(),
    )

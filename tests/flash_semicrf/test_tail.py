"""Durations beyond K: every result with a `duration_tail`, against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, segment_probabilities, viterbi
from flash_semicrf.compat import (
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
)
from flash_semicrf.exact import inference as edge_inference
from flash_semicrf.exact.edges import edge_tensor
from flash_semicrf.exact.semimarkov import SemiMarkov
from flash_semicrf.inference.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.inference.marginals import expected_score
from flash_semicrf.inference.minimum_risk import minimum_risk
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import (
    Segment,
    SegmentTable,
    labels_to_table,
    segments_to_table,
    table_to_segments,
)
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.problem.validation import check_potentials, check_rows, check_table
from flash_semicrf.semirings import LogSemiring
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    TAIL_CASES,
    TAIL_SHAPES,
    Case,
    gradients_of,
    naive_score,
    thinned,
    with_gradients,
)

FEW_CASES = TAIL_CASES[::7]


def enumerated_log_partition(problem):
    """Log Z (B,), differentiable, -inf where nothing is feasible."""
    found = []
    for b in range(problem.batch_size):
        _, scores = enumerate_scores(problem, b)
        allowed = scores[scores > -math.inf]
        found.append(torch.logsumexp(allowed, 0) if len(allowed) else scores.new_tensor(-math.inf))
    return torch.stack(found)


def is_feasible(problem):
    return bool((log_partition(problem, "reference") > -math.inf).all())


@pytest.mark.parametrize("case", thinned(FEW_CASES, 3), ids=str)
def test_score_adds_the_terms_of_the_definition(case):
    problem = case.problem(TAIL_SHAPES)
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        expected = [naive_score(problem, b, segments) for segments in segmentations]
        assert_close(scores, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("case", thinned(TAIL_CASES, 7), ids=str)
def test_log_partition_and_its_gradients_are_those_of_the_enumeration(case):
    problem = with_gradients(case.problem(TAIL_SHAPES))
    expected = enumerated_log_partition(problem)
    feasible = expected > -math.inf
    by_enumeration = gradients_of(expected[feasible].sum(), problem) if feasible.any() else {}
    for backend in BACKENDS:
        with record_backends() as ran:
            log_z = log_partition(problem, backend)
        assert ran == [backend]
        assert_close(log_z.detach(), expected.detach())
        found = gradients_of(log_z[feasible].sum(), problem)
        for name, gradient in by_enumeration.items():
            assert_close(found[name], gradient)
        assert_close(log_partition(case.problem(TAIL_SHAPES), backend), expected.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(TAIL_CASES[::2], 7), ids=str)
def test_decoding_finds_the_best_of_the_enumeration(case, backend):
    problem = case.problem(TAIL_SHAPES)
    best = [enumerate_scores(problem, b)[1].max() for b in range(problem.batch_size)]
    if not is_feasible(problem):
        with pytest.raises(ValueError, match="No segmentation is feasible"):
            viterbi(problem, backend)
        return
    scores, table = viterbi_table(problem, backend)
    assert_close(scores, torch.stack(best))
    check_table(table, problem)
    assert_close(score_segments(problem, table), torch.stack(best))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("by_duration", [False, True])
def test_the_loop_breaks_ties_as_without_a_tail(by_duration, seed):
    problem = random_problem(
        2, 12, 2, 2, by_duration=by_duration, tail=True, integers=True, scale=0.7, seed=seed
    )
    expected = viterbi_table(unrolled(problem), "reference")[1]
    for found, wanted in zip(viterbi_table(problem, "reference")[1], expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(FEW_CASES, 3), ids=str)
def test_marginals_are_those_of_the_enumeration(case, backend):
    problem = case.problem(TAIL_SHAPES)
    found = segment_marginals(problem, backend)
    longest = problem.max_duration
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        weights = torch.zeros(len(scores), dtype=scores.dtype)
        if bool((scores > -math.inf).any()):
            weights = torch.softmax(scores, 0)
        expected = found._replace(
            **{n: torch.zeros_like(v[b]) for n, v in found._asdict().items() if v is not None}
        )
        probability: dict[tuple[int, int, int], float] = {}
        for segments, p in zip(segmentations, weights.tolist(), strict=True):
            previous = None
            for start, stop, label in segments:
                expected.position[start:stop, label] += p
                expected.start[start, label] += p
                expected.end[stop - 1, label] += p
                row = min(stop - start, longest) - 1
                expected.duration[row, label] += p
                expected.tail[label] += p * max(0, stop - start - longest)
                if previous is not None:
                    key = (row, previous, label) if case.by_duration else (previous, label)
                    expected.transition[key] += p
                previous = label
                key = (start, stop, label)
                probability[key] = probability.get(key, 0.0) + p
        for name, value in expected._asdict().items():
            if value is not None:  # a parameter that the problem does not have
                assert_close(getattr(found, name)[b], value)
        rows = [
            (b, *row)
            for row, p in probability.items()
            if row[1] - row[0] <= longest or bool(problem.unlimited[row[2]])
        ]
        table = SegmentTable(*torch.tensor(rows).unbind(1))
        wanted = torch.tensor([probability[tuple(row[1:])] for row in rows], dtype=torch.float64)
        assert_close(segment_probabilities(problem, table, backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(FEW_CASES[::2], 3), ids=str)
def test_entropy_and_its_gradients_are_those_of_the_enumeration(case, backend):
    problem = with_gradients(case.problem(TAIL_SHAPES))
    if not is_feasible(problem):
        return
    terms = []
    for b in range(problem.batch_size):
        scores = enumerate_scores(problem, b)[1]
        scores = scores[scores > -math.inf]
        log_p = scores - torch.logsumexp(scores, 0)
        terms.append(-(log_p.exp() * log_p).sum())
    expected = torch.stack(terms)
    found = entropy(problem, backend)
    assert_close(found.detach(), expected.detach())
    wanted = gradients_of(expected.sum(), problem)
    for name, gradient in gradients_of(found.sum(), problem).items():
        assert_close(gradient, wanted[name])


@pytest.mark.parametrize("by_duration", [False, True])
def test_information_quantities_are_those_of_the_unrolled_problem(by_duration):
    p = random_problem(3, 6, 2, 2, by_duration=by_duration, boundary=True, tail=True, seed=1)
    q = random_problem(3, 6, 2, 2, ends=True, tail=True, seed=2).replace(lengths=p.lengths)
    for function in (cross_entropy, kl_divergence):
        assert_close(function(p, q), function(unrolled(p), unrolled(q)))
    assert_close(position_entropy(p), position_entropy(unrolled(p)))
    long = q.lengths > 2
    assert bool((kl_divergence(q.replace(duration_tail=None), q)[long] > 0).all())
    assert bool((kl_divergence(q, q.replace(duration_tail=None))[long] == math.inf).all())


def test_expected_score_counts_the_tail():
    p = random_problem(2, 7, 2, 2, boundary=True, ends=True, tail=True)
    mean = log_partition(p) - entropy(p)
    assert_close(expected_score(p, segment_marginals(p)), mean)


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("boundary", [False, True])
def test_samples_have_the_probabilities_of_the_enumeration(by_duration, boundary):
    problem = random_problem(
        1, 4, 2, 2, by_duration=by_duration, boundary=boundary, tail=True, ragged=False, seed=3
    )
    number = 2000
    tables = [sample_table(problem, number, 0, backend) for backend in BACKENDS]
    assert all(torch.equal(x, y) for x, y in zip(*tables, strict=True))
    segmentations, scores = enumerate_scores(problem, 0)
    counts = dict.fromkeys(map(tuple, segmentations), 0)
    for segments in table_to_segments(tables[0], number):
        counts[tuple((s.start, s.end + 1, s.label) for s in segments)] += 1
    found = torch.tensor(list(counts.values())) / number
    p = torch.softmax(scores, 0)
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / number).sqrt() + 1e-3).all())
    assert any(s[1] - s[0] > 2 for segments, n in counts.items() if n for s in segments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(FEW_CASES[::2], 3), ids=str)
def test_n_best_are_the_first_of_the_enumeration(case, backend):
    problem = case.problem(TAIL_SHAPES)
    if not is_feasible(problem):
        return
    found = n_best(problem, 20, backend)
    for b in range(problem.batch_size):
        scores = enumerate_scores(problem, b)[1]
        scores = scores[scores > -math.inf].sort(descending=True).values[:20]
        assert_close(found.scores[b, : len(scores)], scores)
        listed = [tuple((s.start, s.end, s.label) for s in one) for one in found.segments[b]]
        assert len(set(listed)) == len(listed) == len(scores)
        sums = [sum(s.score for s in one) for one in found.segments[b]]
        assert_close(torch.tensor(sums, dtype=torch.float64), scores)


@pytest.mark.parametrize("risk", ["position", "boundary"])
def test_minimum_risk_is_that_of_the_unrolled_problem(risk):
    problem = random_problem(3, 8, 2, 2, boundary=True, tail=True, seed=5)
    found, expected = minimum_risk(problem, risk), minimum_risk(unrolled(problem), risk)
    assert_close(found.scores, expected.scores)
    for one, other in zip(found.segments, expected.segments, strict=True):
        assert [(s.start, s.label) for s in one] == [(s.start, s.label) for s in other]


def test_constraints_hold_beyond_the_longest_duration():
    problem = random_problem(2, 8, 2, 2, boundary=True, tail=True, ragged=False)
    known = Constraints(segments=[[(1, 6, 1)], []], boundaries=[[], [5]])
    for backend in BACKENDS:
        found = log_partition(problem, backend, constraints=known)
        assert_close(found, log_partition(unrolled(problem), "reference", constraints=known))
        segments = viterbi(problem, backend, constraints=known).segments
        assert (1, 5, 1) in [(s.start, s.end, s.label) for s in segments[0]]
        assert 5 in [s.start for s in segments[1]]
    marginals = segment_marginals(problem, constraints=known)
    expected = segment_marginals(unrolled(problem), constraints=known)
    assert_close(marginals.position, expected.position)
    assert marginals.tail.shape == (2, 2)


def test_back_pointers_lead_along_the_best_segmentation():
    p = random_problem(2, 9, 2, 3, tail=True, ends=True, ragged=False, seed=2)
    p = p.replace(duration_tail=p.duration_tail.abs())
    cum_scores = torch.nn.functional.pad(p.scores.cumsum(1), (0, 0, 1, 0))
    options = {n: getattr(p, n) for n in ("initial_scores", "final_scores", "duration_tail")}
    arguments = (cum_scores, p.transition, p.duration_bias, p.lengths, p.max_duration)
    scores, bp_k, bp_c, label = semi_crf_streaming_viterbi_with_backpointers(*arguments, **options)
    result = viterbi(p)
    assert_close(scores, result.scores)
    assert_close(semi_crf_streaming_forward(*arguments, **options), log_partition(p))
    assert int(bp_k.max()) > p.max_duration
    for b, segments in enumerate(result.segments):
        stop, c = int(p.lengths[b]), int(label[b])
        walk = []
        while stop > 0:
            k, before = int(bp_k[b, stop - 1, c]), int(bp_c[b, stop - 1, c])
            walk.append((stop - k, stop - 1, c))
            stop, c = stop - k, before
        assert walk[::-1] == [(s.start, s.end, s.label) for s in segments]


@pytest.mark.parametrize("case", thinned(FEW_CASES, 3), ids=str)
def test_edge_tensor_has_every_duration(case):
    problem = case.problem(TAIL_SHAPES)
    edges = edge_tensor(problem)
    longest = max(problem.max_duration, problem.num_positions)
    assert edges.shape[2] == longest + 1
    expected = log_partition(problem, "reference")
    assert_close(SemiMarkov(LogSemiring).sum(edges, problem.lengths + 1), expected)
    if is_feasible(problem):
        found = edge_inference.viterbi_table(problem, "exact", 1e9)
        assert_close(found[0], viterbi_table(problem, "reference")[0])
    size = edges.numel() * 8
    with pytest.raises(ValueError, match=f"would take {size} bytes"):
        edge_inference.log_partition(problem, "exact", size - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    p = with_gradients(random_problem(1, 5, 2, 2, boundary=True, ends=True, tail=True))
    values = p.parameters()

    def value(*parameters):
        problem = p.replace(**dict(zip(values, parameters, strict=True)))
        return log_partition(problem, backend), entropy(problem, backend)

    assert torch.autograd.gradcheck(value, tuple(values.values()))


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"boundary": True, "ends": True}, marks=pytest.mark.kernels),
        {"by_duration": True},
    ],
    ids=str,
)
def test_numba_matches_the_loop_on_longer_sequences(options, scale):
    problem = random_problem(2, 70, 5, 3, tail=True, scale=scale, forbid=0.02, seed=4, **options)
    expected, wanted = (with_gradients(problem) for _ in range(2))
    log_z, reference = log_partition(expected, "numba"), log_partition(wanted, "reference")
    assert_close(log_z.detach(), reference.detach())
    found, by_loop = gradients_of(log_z.sum(), expected), gradients_of(reference.sum(), wanted)
    for name, gradient in found.items():
        assert_close(gradient, by_loop[name])
    scores, table = viterbi_table(problem, "numba")
    assert_close(scores, viterbi_table(problem, "reference")[0])
    assert_close(score_segments(problem, table), scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_duration", [False, True])
def test_a_forbidden_tail_is_none(by_duration, backend):
    problem = random_problem(2, 6, 2, 2, by_duration=by_duration, boundary=True)
    tail = torch.full((2,), -math.inf, dtype=torch.float64)
    closed = problem.replace(duration_tail=tail)
    assert_close(log_partition(closed, backend), log_partition(problem, backend))
    scores, table = viterbi_table(closed, backend)
    assert_close(scores, viterbi_table(problem, backend)[0])
    assert int((table.stop - table.start).max()) <= 2


def test_a_tail_at_the_rate_of_geometric_durations_changes_no_longest_duration():
    rate = torch.tensor([-0.3, -0.7], dtype=torch.float64)
    problem = random_problem(2, 9, 6, 2, tail=True)
    problems = [
        problem.replace(duration_bias=torch.arange(k)[:, None] * rate, duration_tail=rate)
        for k in (1, 2, 6, 9)
    ]
    values = [log_partition(p) for p in problems]
    for first, second in itertools.pairwise(values):
        assert_close(first, second)


# What users pass in


def test_tail_is_checked():
    problem = random_problem(1, 3, 2, 2, tail=True)
    with pytest.raises(ValueError, match=r"`duration_tail` must have shape \(2,\); got \(3,\)"):
        check_potentials(problem.replace(duration_tail=torch.zeros(3)))
    bad = torch.tensor([0.0, math.nan], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`duration_tail` must be finite .* index \(1,\)"):
        check_potentials(problem.replace(duration_tail=bad))
    with pytest.raises(TypeError, match="`duration_tail` must be a Tensor"):
        check_potentials(problem.replace(duration_tail=0.5))


def test_segments_beyond_the_longest_duration_need_a_tail():
    tail = torch.tensor([-1.0, -math.inf])
    problem = random_problem(1, 6, 2, 2, ragged=False).replace(duration_tail=tail)
    for label, fits in ((0, True), (1, False)):
        table = segments_to_table([[Segment(0, 5, label)]])
        for check in (check_table, check_rows):
            if fits:
                check(table, problem)
                continue
            with pytest.raises(ValueError, match=r"must have durations in \[1, K=2\]"):
                check(table, problem)


def test_runs_are_split_only_where_there_is_no_tail():
    labels = torch.tensor([[0] * 5 + [1] * 5])
    unlimited = torch.tensor([True, False])
    with pytest.warns(UserWarning, match="1 gold segments are longer"):
        table = labels_to_table(labels, torch.tensor([10]), 3, "split", unlimited)
    assert table.start.tolist() == [0, 5, 7] and table.stop.tolist() == [5, 7, 10]
    with pytest.raises(ValueError, match=r"positions 5..9, label 1"):
        labels_to_table(labels, torch.tensor([10]), 3, "error", unlimited)


def test_case_draws_the_same_problem_with_and_without_a_tail():
    case = Case("usual", tail=True)
    problem = case.problem(seed=0)
    assert torch.equal(problem.scores, case._replace(tail=False).problem(seed=0).scores)

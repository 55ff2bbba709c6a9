"""Constraints: the sums, maxima and marginals over exactly the segmentations that agree."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from flash_semicrf import (
    Constraints,
    Segment,
    SegmentTable,
    log_partition,
    segment_marginals,
    viterbi,
)
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.constraints import fold_table
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import segments_to_table, table_to_segments
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    LONG_CASES,
    LONG_SHAPES,
    SMALL_CASES,
    Case,
    gradients_of,
    thinned,
    with_gradients,
)

KINDS = (
    "labels",
    "allowed",
    "boundaries",
    "forbidden_boundaries",
    "segments",
    "forbidden_spans",
)
EVERYTHING = Case("usual", True, True, True, True, True)
UNKNOWN = -7


def agrees(segmentation, known, index):
    """Whether a segmentation keeps to constraints given as tensors and lists of tuples."""
    starts = {s for s, _, _ in segmentation} | {segmentation[-1][1]}
    label = [c for s, t, c in segmentation for _ in range(s, t)]
    positions = range(len(label))
    if known.labels is not None and any(
        known.labels[index, t] not in (label[t], known.ignore_index) for t in positions
    ):
        return False
    if known.allowed is not None and not all(known.allowed[index, t, label[t]] for t in positions):
        return False
    if known.boundaries is not None and not all(
        t in starts for t in positions if known.boundaries[index, t]
    ):
        return False
    if known.forbidden_boundaries is not None and any(
        known.forbidden_boundaries[index, t] and t in starts for t in positions
    ):
        return False
    if known.segments is not None and not set(known.segments[index]) <= set(segmentation):
        return False
    return known.forbidden_spans is None or not any(
        label[t] == c for s, stop, c in known.forbidden_spans[index] for t in range(s, stop)
    )


def draw_constraints(problem, kinds, seed=0, rate=0.4):
    """Constraints of some kinds that a random segmentation of each sequence agrees with."""
    generator = torch.Generator().manual_seed(seed)
    b, t, c = problem.scores.shape

    def chosen(*shape):
        return torch.rand(shape, generator=generator) < rate

    def draw(stop):
        return int(torch.randint(stop, (1,), generator=generator))

    truth = []
    for length in problem.lengths.tolist():
        cuts = [0]
        while cuts[-1] < length:
            cuts.append(cuts[-1] + 1 + draw(min(problem.max_duration, length - cuts[-1])))
        truth.append([(s, e, draw(c)) for s, e in itertools.pairwise(cuts)])
    labels = torch.randint(-9, 99, (b, t), generator=generator)  # noise in the padding
    starts = torch.zeros(b, t, dtype=torch.bool)
    for index, segments in enumerate(truth):
        for start, stop, label in segments:
            labels[index, start:stop] = label
            starts[index, start] = True
    inside = torch.arange(t) < problem.lengths[:, None]
    allowed = chosen(b, t, c)
    allowed |= labels[..., None] == torch.arange(c)
    spans = []
    for length, row in zip(problem.lengths.tolist(), labels, strict=True):
        start, label = draw(length), draw(c)
        stop = start + 1 + draw(length - start)
        spans.append([] if (row[start:stop] == label).any() else [(start, stop, label)])
    given = {
        "labels": torch.where(chosen(b, t), labels, UNKNOWN),
        "allowed": allowed,
        "boundaries": starts & chosen(b, t),
        "forbidden_boundaries": ~starts & chosen(b, t),
        "segments": [[x for x in segments if chosen(1)] for segments in truth],
        "forbidden_spans": spans,
    }
    given["forbidden_boundaries"] |= ~inside & chosen(b, t)  # ignored
    return Constraints(**{kind: given[kind] for kind in kinds}, ignore_index=UNKNOWN)


def oracle(problem, known, index):
    """Segmentations of one sequence that agree, and their scores."""
    segmentations, scores = enumerate_scores(problem, index)
    keep = [i for i, y in enumerate(segmentations) if agrees(y, known, index)]
    return [segmentations[i] for i in keep], scores[keep]


def log_sum(scores):
    feasible = scores[scores > -torch.inf]
    return feasible.logsumexp(0) if len(feasible) else feasible.sum() - torch.inf


def check_against_enumeration(problem, known, backend):
    problem = with_gradients(problem)
    log_z = log_partition(problem, backend, constraints=known)
    expected = torch.stack(
        [log_sum(oracle(problem, known, b)[1]) for b in range(problem.batch_size)]
    )
    assert_close(log_z, expected)
    feasible = expected > -torch.inf
    found = gradients_of(log_z[feasible].sum(), problem)
    for name, gradient in gradients_of(expected[feasible].sum(), problem).items():
        assert_close(found[name], gradient)
    marginals = segment_marginals(problem, backend, constraints=known)
    for b in range(problem.batch_size):
        position, start, end = (torch.zeros_like(marginals.position[b]) for _ in range(3))
        if feasible[b]:
            segmentations, scores = oracle(problem, known, b)
            for y, p in zip(segmentations, (scores - expected[b]).exp().detach(), strict=True):
                for s, t, c in y:
                    position[s:t, c] += p
                    start[s, c] += p
                    end[t - 1, c] += p
        assert_close(marginals.position[b], position)
        assert_close(marginals.start[b], start)
        assert_close(marginals.end[b], end)
    check_decoding(problem, known, feasible, backend)


def check_decoding(problem, known, feasible, backend):
    if not feasible.all():
        names = (~feasible).nonzero()[:, 0].tolist()
        with pytest.raises(ValueError, match=rf"sequences \[{', '.join(map(str, names))}\].*const"):
            viterbi(problem, backend, constraints=known)
        return
    result = viterbi(problem, backend, constraints=known)
    for b, segments in enumerate(result.segments):
        segmentations, scores = oracle(problem, known, b)
        assert_close(result.scores[b], scores.max().detach())
        assert [(s.start, s.end + 1, s.label) for s in segments] in segmentations
        total = torch.tensor(sum(s.score for s in segments), dtype=torch.float64)
        assert_close(total, result.scores[b])


# Enumeration


@pytest.mark.parametrize("case", thinned(SMALL_CASES, 5), ids=str)
def test_all_kinds_at_once_match_enumeration(case):
    problem = case.problem()
    seed = SMALL_CASES.index(case)
    kinds = KINDS if seed % 2 else [kind for kind in KINDS if kind not in ("labels", "segments")]
    known = draw_constraints(problem, kinds, seed, rate=0.3)
    check_against_enumeration(problem, known, BACKENDS[seed // 2 % 2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", [*itertools.combinations(KINDS, 1), ("boundaries", "allowed")])
@pytest.mark.parametrize("case", [EVERYTHING, Case("usual"), Case("one label", True)], ids=str)
def test_each_kind_matches_enumeration(case, kinds, backend):
    problem = case.problem(num_positions=5)
    known = draw_constraints(problem, kinds, seed=5)
    count = sum(len(oracle(problem, known, b)[0]) for b in range(3))
    everything = sum(len(enumerate_scores(problem, b)[0]) for b in range(3))
    says_nothing = case.shape == "one label" and kinds[0] in ("labels", "allowed")
    assert 0 < count < everything or (says_nothing and count == everything) or "spans" in kinds[0]
    check_against_enumeration(problem, known, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_scores_of_100_match_enumeration(ends, by_duration, backend):
    problem = random_problem(
        2, 5, 3, 2, by_duration=by_duration, boundary=True, ends=ends, scale=100.0, seed=3
    )
    known = draw_constraints(problem, ("boundaries", "forbidden_spans"), seed=2)
    check_against_enumeration(problem, known, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_position(backend):
    problem = random_problem(2, 1, 2, 3)
    known = Constraints(boundaries=[[0, 1], [0]], forbidden_spans=[[(0, 1, 2)], [(0, 1, 0)]])
    table = viterbi_table(problem, backend, constraints=known)[1]
    assert table.stop.tolist() == [1, 1]
    score = problem.scores[:, 0] + problem.transition.logsumexp(0) + problem.duration_bias[0]
    score[0, 2] = score[1, 0] = -torch.inf
    assert_close(log_partition(problem, backend, constraints=known), score.logsumexp(1))


def test_ties_are_decided_as_without_constraints():
    decided = 0
    for seed in range(12):
        problem = random_problem(2, 5, 3, 2, integers=True, scale=0.4, seed=seed)
        known = draw_constraints(problem, ("boundaries",), seed)
        table = viterbi_table(problem, constraints=known)[1]
        for b, segments in enumerate(table_to_segments(table, 2)):
            segmentations, scores = oracle(problem, known, b)
            tied = [y for y, s in zip(segmentations, scores, strict=True) if s == scores.max()]
            first = min(tied, key=lambda y: [(t - s, c) for s, t, c in reversed(y)])
            assert [(s.start, s.end + 1, s.label) for s in segments] == first
            decided += len(tied) > 1
    assert decided > 8


@pytest.mark.parametrize("case", thinned(LONG_CASES[::2], 5), ids=str)
def test_kernels_match_the_reference_at_their_sizes(case):
    problem = case.problem(LONG_SHAPES)
    known = draw_constraints(problem, ("boundaries", "allowed", "forbidden_boundaries"), 1, 0.6)
    actual, expected = (
        segment_marginals(problem, backend, constraints=known) for backend in BACKENDS[::-1]
    )
    for name in actual._fields:
        assert_close(getattr(actual, name), getattr(expected, name))
    # Half of the sequence with known labels: every other label is forbidden at block after block.
    labels = torch.full((3, problem.num_positions), -100)
    labels[:, problem.num_positions // 2 :] = torch.randint(problem.num_labels, (3, 1))
    problem = with_gradients(problem)
    found = []
    for backend in BACKENDS[::-1]:
        log_z = log_partition(problem, backend, constraints=Constraints(labels=labels))
        feasible = log_z > -torch.inf
        found.append((log_z.detach(), gradients_of(log_z[feasible].sum(), problem)))
    assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert_close(gradient, found[1][1][name])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
@pytest.mark.parametrize("by_duration", [False, True])
def test_constraints_on_a_gpu(by_duration):
    problem = random_problem(4, 100, 20, 6, by_duration=by_duration, dtype=torch.float32)
    known = draw_constraints(problem, KINDS, seed=3, rate=0.2)
    tensors = ("labels", "allowed", "boundaries", "forbidden_boundaries")
    moved = {name: getattr(known, name).cuda() for name in tensors}
    results = []
    for p, given in ((problem, known), (problem.to("cuda"), replace(known, **moved))):
        log_z = log_partition(p, constraints=given)
        labels = viterbi_table(p, constraints=given)[1].label
        results.append((log_z, segment_marginals(p, constraints=given).position, labels))
    for actual, expected in zip(*results, strict=True):
        assert expected.is_cuda != actual.is_cuda
        assert_close(actual, expected, torch.float32)


# The problem made of it


def test_labels_are_copied_only_for_boundaries_that_labels_do_not_imply():
    problem = random_problem(1, 6, 3, 2, ragged=False)
    labels = torch.tensor([[0, 0, 1, 1, 1, -100]])
    assert Constraints(labels=labels, boundaries=[[0, 2, 6]]).apply(problem).num_labels == 2
    assert Constraints(labels=labels, boundaries=[[0, 2, 3]]).apply(problem).num_labels == 4
    assert Constraints(labels=labels, boundaries=[[5]]).apply(problem).num_labels == 4
    assert Constraints().apply(problem).num_labels == 2
    shorter = problem.replace(lengths=torch.tensor([4]))
    assert Constraints(boundaries=[[0, 4]]).apply(shorter).num_labels == 2


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("by_duration", [False, True])
def test_segmentations_of_the_copied_problem_are_those_that_agree(by_duration, ends):
    problem = random_problem(1, 4, 3, 2, by_duration=by_duration, ends=ends, ragged=False)
    known = Constraints(boundaries=torch.tensor([[False, True, False, True]]))
    segmentations, scores = enumerate_scores(known.apply(problem), 0)
    feasible = [y for y, s in zip(segmentations, scores, strict=True) if s > -torch.inf]
    table = segments_to_table([[Segment(s, t - 1, c) for s, t, c in y] for y in feasible])
    folded = fold_table(table, 2)
    wanted = [[Segment(s, t - 1, c) for s, t, c in y] for y in oracle(problem, known, 0)[0]]
    found = table_to_segments(folded, len(feasible))
    assert sorted(map(repr, map(list, found))) == sorted(map(repr, wanted))
    count = len(feasible)
    copies = problem.scores.expand(count, -1, -1)
    many = problem.replace(scores=copies, lengths=problem.lengths.expand(count))
    assert_close(score_segments(many, folded), scores[scores > -torch.inf])


def test_forms_of_segments_and_boundaries_agree():
    problem = random_problem(2, 6, 3, 2, ragged=False)
    tuples = [[(1, 3, 1), (4, 5, 0)], [(0, 2, 0)]]
    objects = [[Segment(1, 2, 1), Segment(4, 4, 0)], [Segment(0, 1, 0)]]
    table = segments_to_table(objects)
    values = [
        log_partition(problem, constraints=Constraints(segments=form))
        for form in (tuples, objects, table)
    ]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 4] = True
    for field in ("boundaries", "forbidden_boundaries"):
        values = [
            log_partition(problem, constraints=Constraints(**{field: form}))
            for form in (mask, [[2], [4]])
        ]
        assert torch.equal(values[0], values[1])


def test_contradictions_leave_nothing():
    problem = with_gradients(random_problem(3, 6, 3, 2, ragged=False))
    known = Constraints(
        segments=[[(0, 2, 0), (1, 3, 1)], [(1, 5, 0)], []],  # overlap; longer than K
        boundaries=[[], [], [2]],
        forbidden_boundaries=[[], [], [3]],
    )
    log_z = log_partition(problem, constraints=known)
    assert log_z[:2].tolist() == [-torch.inf] * 2 and log_z[2] > -torch.inf
    gradients = gradients_of(log_z.sum(), problem)
    assert (gradients["scores"][:2] == 0).all() and (gradients["scores"][2] != 0).any()
    with pytest.raises(ValueError, match=r"for sequences \[0, 1\].*or breaks a constraint\."):
        viterbi(problem, constraints=known)


def test_float32_is_kept():
    problem = random_problem(2, 5, 3, 2, dtype=torch.float32)
    known = draw_constraints(problem, KINDS, seed=1)
    parameters = known.apply(problem).parameters()
    parameters.pop("initial_scores")  # log-sum-exp, in float64
    assert {v.dtype for v in parameters.values()} == {torch.float32}
    wide = log_partition(problem.to(torch.float64), constraints=known)
    assert_close(log_partition(problem, constraints=known), wide)


# Labels read as runs


def known_runs_agree(segmentation, labels, max_duration):
    """What `Constraints.from_labels` promises, said of one sequence."""
    covering = [i for i, (s, t, _) in enumerate(segmentation) for _ in range(s, t)]
    label = [segmentation[i][2] for i in covering]
    runs = [
        (key, list(group))
        for key, group in itertools.groupby(range(len(label)), key=lambda t: labels[t])
    ]
    for key, run in runs:
        if key == UNKNOWN:
            continue
        if any(label[t] != key for t in run):
            return False
        if len(run) <= max_duration and len({covering[t] for t in run}) > 1:
            return False
    return True


@pytest.mark.parametrize("max_duration", [1, 2, 3])
def test_labels_read_as_runs(max_duration):
    lengths = torch.tensor([5, 5, 5, 4, 1])
    labels = torch.tensor(
        [
            [0, 0, UNKNOWN, 0, 1],
            [UNKNOWN, 1, 1, UNKNOWN, UNKNOWN],
            [1, 1, 1, 0, UNKNOWN],
            [0, 1, UNKNOWN, 1, 1],  # the last is padding
            [0, 0, 0, 0, 0],
        ]
    )
    problem = random_problem(5, 5, max_duration, 2).replace(lengths=lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = Constraints.from_labels(labels, lengths, max_duration, ignore_index=UNKNOWN)
    log_z = log_partition(problem, constraints=known)
    for b, row in enumerate(labels.tolist()):
        segmentations, scores = enumerate_scores(problem, b)
        keep = [known_runs_agree(y, row, max_duration) for y in segmentations]
        assert 0 < sum(keep) < len(keep)
        assert_close(log_z[b], scores[keep].logsumexp(0))


def test_known_runs_longer_than_the_longest_segment():
    labels = torch.tensor([[0, 0, 0, -100, 1, 1], [1, 1, 1, 1, 1, 1]])
    lengths = torch.tensor([6, 2])
    with pytest.warns(UserWarning, match="1 runs of equal known labels are longer than max_dur"):
        Constraints.from_labels(labels, lengths, 2)
    with pytest.raises(ValueError, match=r"sequence 0, positions 0\.\.2, label 0, duration 3"):
        Constraints.from_labels(labels, lengths, 2, "error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Constraints.from_labels(labels, lengths, 3, "error")


# Bad input

PROBLEM = random_problem(2, 4, 3, 2).replace(lengths=torch.tensor([4, 2]))
BAD = {
    "allowed dtype": (
        {"allowed": torch.ones(2, 4, 2)},
        "`allowed` must have dtype bool; got torch.float32.",
    ),
    "allowed shape": (
        {"allowed": torch.ones(2, 4, dtype=torch.bool)},
        "`allowed` must have shape (2, 4, 2); got (2, 4).",
    ),
    "allowed type": ({"allowed": [[True]]}, "`allowed` must be a Tensor; got list."),
    "label": (
        {"labels": torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]])},
        "`labels` must be in [0, C-1=1]; got 2 at index (0, 2).",
    ),
    "boundary beyond the end": (
        {"boundaries": [[1], [1, 3]]},
        "`boundaries` must be in [0, 2] in sequence 1, whose length is 2; got position 3.",
    ),
    "boundary mask beyond the end": (
        {"boundaries": torch.tensor([[False] * 4, [False, True, True, True]])},
        "`boundaries` must be in [0, 2] in sequence 1, whose length is 2; got position 3.",
    ),
    "boundary before the start": (
        {"boundaries": [[-1], []]},
        "`boundaries` must be in [0, 4] in sequence 0, whose length is 4; got position -1.",
    ),
    "number of lists": (
        {"boundaries": [[1]]},
        "`boundaries` must hold one list per sequence, B=2; got 1.",
    ),
    "no list": ({"boundaries": 3}, "`boundaries` must hold one list per sequence; got int."),
    "not an integer": (
        {"boundaries": [[], [0.5]]},
        "`boundaries` must hold integers; got [0.5] in sequence 1.",
    ),
    "a bool": (
        {"segments": [[(False, 1, 0)], []]},
        "`segments` must hold integers; got (False, 1, 0) in sequence 0.",
    ),
    "the first position always starts a segment": (
        {"forbidden_boundaries": torch.tensor([[False] * 4, [True] * 4])},
        "`forbidden_boundaries` must be in [1, 1] in sequence 1, whose length is 2; got position "
        "0.",
    ),
    "mask dtype": (
        {"forbidden_boundaries": torch.zeros(2, 4)},
        "`forbidden_boundaries` must have dtype bool; got torch.float32.",
    ),
    "segment beyond the end": (
        {"segments": [[], [(1, 3, 0)]]},
        "`segments` must lie inside their sequence; got [1, 3) with label 0 in sequence 1.",
    ),
    "empty segment": (
        {"segments": [[(2, 2, 0)], []]},
        "`segments` must cover at least one position; got [2, 2) with label 0 in sequence 0.",
    ),
    "segment label": (
        {"forbidden_spans": [[(0, 2, 2)], []]},
        "`forbidden_spans` must have labels in [0, C-1=1]; got [0, 2) with label 2 in sequence 0.",
    ),
    "sequence": (
        {"segments": SegmentTable(*torch.tensor([[2], [0], [1], [0]]))},
        "`segments` must have sequences in [0, B-1=1]; got [0, 1) with label 0 in sequence 2.",
    ),
    "not a segment": (
        {"segments": [[(0, 1)], []]},
        "`segments` must hold (start, stop, label) tuples or Segment objects; got (0, 1) in "
        "sequence 0.",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_constraints_are_named(given, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        log_partition(PROBLEM, constraints=Constraints(**given))
    assert str(caught.value) == message


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="`constraints` must be a Constraints; got dict"):
        log_partition(PROBLEM, constraints={})
    with pytest.raises(TypeError, match="`potentials` must be a Potentials; got NoneType"):
        Constraints().apply(None)
    with pytest.raises(ValueError, match="`long_segments` must be one of"):
        Constraints.from_labels(torch.zeros(1, 1).long(), torch.tensor([1]), 1, "clamp")


def test_runs_of_known_labels_are_cut_into_single_positions_silently():
    known = Constraints.from_labels(torch.zeros(1, 3).long(), torch.tensor([3]), max_duration=1)
    assert not bool(known.forbidden_boundaries.any())  # warnings are errors


def test_enumeration_is_split_by_a_boundary():
    """Forcing and forbidding one boundary are disjoint and leave nothing out."""
    problem = random_problem(1, 5, 3, 2, ragged=False)
    forced = log_partition(problem, constraints=Constraints(boundaries=[[3]]))
    joined = log_partition(problem, constraints=Constraints(forbidden_boundaries=[[3]]))
    assert_close(torch.logaddexp(forced, joined), log_partition(problem))
    boundary = segment_marginals(problem).boundary[0, 3]
    assert_close((forced - log_partition(problem)).exp()[0], boundary)

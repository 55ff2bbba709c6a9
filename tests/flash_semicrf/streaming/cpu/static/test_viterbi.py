"""Decoding with static transitions: the numba walk, back-pointers, and their ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf import viterbi
from flash_semicrf.compat import semi_crf_streaming_viterbi_with_backpointers
from flash_semicrf.compat.cumulative import maximum_start
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import Segment, segments_to_table
from flash_semicrf.problem.validation import check_table
from flash_semicrf.streaming.dispatch import BACKENDS as REGISTERED
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, LONG_CASES, LONG_SHAPES, SMALL_CASES, Case, thinned

FEASIBLE = [case for case in LONG_CASES if not case.forbid]


def paths_of(segments):
    return [[(s.start, s.end, s.label) for s in sequence] for sequence in segments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned([c for c in SMALL_CASES if not c.forbid], 5), ids=str)
def test_viterbi_score_is_the_largest_of_all_segmentations(case, backend):
    problem = case.problem()
    with record_backends() as ran:
        result = viterbi(problem, backend)
    assert ran == [backend]
    best = [enumerate_scores(problem, b)[1].max() for b in range(problem.batch_size)]
    assert_close(result.scores, torch.stack(best))


# Two neighbouring segments of one label may swap their durations without boundary scores: such
# ties are broken by rounding, so paths are compared where nothing rounds, and else their scores.
def assert_equally_good(problem, actual, expected):
    assert_close(actual.scores, expected.scores)
    table = segments_to_table(actual.segments)
    check_table(table, problem)
    assert_close(score_segments(problem, table), expected.scores)


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned(FEASIBLE, 3), ids=str)
def test_viterbi_agrees_with_reference(case):
    problem = case.problem(LONG_SHAPES)
    assert_equally_good(problem, viterbi(problem, "numba"), viterbi(problem, "reference"))


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned(FEASIBLE, 3), ids=str)
def test_viterbi_breaks_ties_as_the_reference_does(case):
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    problem = case.problem(LONG_SHAPES, integers=True, scale=0.7)
    actual, expected = viterbi(problem, "numba"), viterbi(problem, "reference")
    assert torch.equal(actual.scores, expected.scores)
    assert actual.segments == expected.segments


@pytest.mark.parametrize("backend", BACKENDS)
def test_viterbi_of_all_zeros_takes_the_shortest_and_lowest(backend):
    problem = random_problem(2, 40, 5, 3, ends=True, scale=0.0)
    for length, segments in zip(
        problem.lengths.tolist(), viterbi(problem, backend).segments, strict=True
    ):
        assert segments == [Segment(t, t, 0, 0.0) for t in range(length)]


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("forbid", [0.0, 0.05])
def test_viterbi_agrees_with_reference_at_any_scale(scale, forbid):
    problem = random_problem(4, 80, 9, 4, scale=scale, forbid=forbid, boundary=True, seed=7)
    assert_equally_good(problem, viterbi(problem, "numba"), viterbi(problem, "reference"))


def test_viterbi_obeys_minimum_durations():
    problem = random_problem(2, 200, 30, 3, ragged=False, scale=100.0, seed=8)
    bias = problem.duration_bias.clone()
    bias[:11] = -math.inf
    problem = problem.replace(duration_bias=bias)
    actual = viterbi(problem, "numba")
    assert_equally_good(problem, actual, viterbi(problem, "reference"))
    assert all(12 <= s.duration <= 30 for sequence in actual.segments for s in sequence)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(FEASIBLE[::3], 3), ids=str)
def test_segment_scores_add_up_to_the_score_of_a_tiling(case, backend):
    problem = case.problem(LONG_SHAPES)
    result = viterbi(problem, backend)
    table = segments_to_table(result.segments)
    check_table(table, problem)
    assert_close(score_segments(problem, table), result.scores)
    sums = [math.fsum(s.score for s in sequence) for sequence in result.segments]
    assert_close(torch.tensor(sums, dtype=torch.float64), result.scores)


def test_viterbi_table_has_the_same_segments():
    problem = Case("wraps", start=True, end=True).problem(LONG_SHAPES)
    scores, table = viterbi_table(problem)
    result = viterbi(problem)
    assert torch.equal(scores, result.scores)
    for actual, expected in zip(table, segments_to_table(result.segments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(LONG_CASES[::3], 3), ids=str)
def test_max_messages_agree(case, backend):
    problem = case.problem(LONG_SHAPES)
    actual = REGISTERED[backend].max_messages(problem)
    expected = REGISTERED["reference"].max_messages(problem)
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    assert_close(actual[inside], expected[inside])


def walk(bp_k, bp_c, label, length):
    """Segments (start, end, label) of the back-pointers of one sequence."""
    segments = []
    t = length
    while t > 0:
        duration = int(bp_k[t - 1, label])
        segments.append((t - duration, t - 1, label))
        label, t = int(bp_c[t - 1, label]), t - duration
    assert label == -1
    return segments[::-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("case", thinned(FEASIBLE[::2], 3), ids=str)
def test_back_pointers_lead_along_the_best_segmentation(case, integers, backend):
    problem = case.problem(LONG_SHAPES, integers=integers)
    cum_scores = torch.nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))
    names = ("start_scores", "end_scores", "initial_scores", "final_scores")
    best, bp_k, bp_c, final = semi_crf_streaming_viterbi_with_backpointers(
        cum_scores, problem.transition, problem.duration_bias, problem.lengths,
        problem.max_duration, backend=backend,
        **{name: getattr(problem, name) for name in names},
    )  # fmt: skip
    problem = maximum_start(problem)  # as release 0.2.0 has it
    expected = viterbi(problem, backend)
    assert_close(best, expected.scores)
    walks = []
    for b, length in enumerate(problem.lengths.tolist()):
        found = walk(bp_k[b], bp_c[b], int(final[b]), length)
        if integers:  # the path is unique by the rule for ties
            assert found == paths_of(expected.segments)[b]
        walks.append([Segment(*row) for row in found])
        assert bool((bp_k[b, length:] == 0).all()) and bool((bp_c[b, length:] == -1).all())
    assert_close(score_segments(problem, segments_to_table(walks)), best)


def test_back_pointers_shapes_and_dtypes():
    cum_scores = torch.zeros(2, 6, 3)
    best, bp_k, bp_c, final = semi_crf_streaming_viterbi_with_backpointers(
        cum_scores, torch.zeros(3, 3), torch.zeros(2, 3), torch.tensor([5, 2]), 2
    )
    assert best.shape == final.shape == (2,) and bp_k.shape == bp_c.shape == (2, 5, 3)
    assert best.dtype == torch.float32
    assert bp_k.dtype == bp_c.dtype == final.dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
def test_back_pointers_mark_what_nothing_reaches(backend):
    problem = random_problem(2, 6, 3, 2, boundary=True, ragged=False)
    bias = torch.zeros(3, 2)
    bias[:2, 1] = -math.inf  # label 1 only in threes
    end_scores = torch.zeros(2, 6, 2)
    end_scores[1, 3] = -math.inf
    final_scores = torch.tensor([0.0, -math.inf])
    _, bp_k, bp_c, final = semi_crf_streaming_viterbi_with_backpointers(
        torch.zeros(2, 7, 2), problem.transition.float(), bias, problem.lengths, 3,
        backend=backend, end_scores=end_scores, final_scores=final_scores,
    )  # fmt: skip
    assert bp_k[0, :2, 1].tolist() == [0, 0] and bp_c[0, :2, 1].tolist() == [-1, -1]
    assert bp_k[0, 2, 1] == 3
    assert bp_k[1, 3].tolist() == [0, 0]
    assert final.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_back_pointers_of_an_infeasible_sequence(backend):
    bias = torch.full((2, 2), -math.inf)
    best, bp_k, bp_c, final = semi_crf_streaming_viterbi_with_backpointers(
        torch.zeros(1, 4, 2), torch.zeros(2, 2), bias, torch.tensor([3]), 2, backend=backend
    )
    assert best.tolist() == [-math.inf] and final.tolist() == [-1]
    assert bool((bp_k == 0).all()) and bool((bp_c == -1).all())


def test_batch_and_padding_change_nothing():
    problem = random_problem(5, 90, 11, 3, boundary=True, ends=True, seed=9)
    whole = viterbi(problem, "numba")
    for b, length in enumerate(problem.lengths.tolist()):
        alone = problem.replace(
            lengths=problem.lengths[b : b + 1],
            **{
                name: getattr(problem, name)[b : b + 1, :length]
                for name in ("scores", "start_scores", "end_scores")
            },
        )
        own = viterbi(alone, "numba")
        assert own.segments[0] == whole.segments[b]
        assert own.scores[0] == whole.scores[b]


def test_number_of_threads_changes_nothing():
    problem = random_problem(6, 300, 20, 3, seed=10)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(viterbi(problem, "numba"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].scores, results[1].scores)
    assert results[0].segments == results[1].segments


def test_float32_scores_are_decoded_in_float64():
    narrow = random_problem(3, 100, 9, 3, dtype=torch.float32, seed=11)
    actual, expected = viterbi(narrow, "numba"), viterbi(narrow.to(torch.float64), "numba")
    assert actual.scores.dtype == torch.float64
    assert_equally_good(narrow, actual, expected)


def test_long_sequence_is_decoded_whole():
    problem = random_problem(1, 60000, 25, 3, ragged=False, scale=3.0, seed=12)
    scores, table = viterbi_table(problem)
    check_table(table, problem)
    assert abs(float(score_segments(problem, table) / scores) - 1.0) <= 1e-12


@pytest.mark.parametrize("tail", [False, True])
def test_unwritten_memory_is_not_read(tail, monkeypatch):
    problem = random_problem(4, 60, 9, 3, boundary=True, tail=tail, seed=13)
    expected = viterbi(problem, "numba")

    def poisoned(shape, dtype=np.float64, **options):
        fill = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min
        return np.full(shape, fill, dtype, **options)

    monkeypatch.setattr(np, "empty", poisoned)
    assert viterbi(problem, "numba").segments == expected.segments


@pytest.mark.kernels
def test_score_of_a_long_sequence_is_the_exact_sum_of_its_segments():
    # The sums of labels that are not on the path fall to -100,000 and must not cost it digits.
    problem = random_problem(1, 60_000, 8, 5, seed=3)
    scores, table = REGISTERED["numba"].viterbi(problem)
    durations = table.stop - table.start
    labels = torch.repeat_interleave(table.label, durations)
    terms = [
        problem.scores[0, torch.arange(len(labels)), labels],
        problem.duration_bias[durations - 1, table.label],
        problem.transition[table.label[:-1], table.label[1:]],
    ]
    start = torch.logsumexp(problem.transition[:, table.label[0]], 0)
    exact = math.fsum([*torch.cat(terms).tolist(), float(start)])
    assert abs(float(scores[0]) - exact) < 60_000 * 2.0**-43  # half a digit of 1024 per position

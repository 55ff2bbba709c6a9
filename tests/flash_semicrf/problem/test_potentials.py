"""The score of a segmentation, and that with log Z it makes a probability."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition
from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    accumulator_dtype,
    center_scores,
    initial_term,
    score_rows,
    score_segments,
    within_length,
)
from flash_semicrf.problem.segments import Segment, segments_to_table
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import (
    assert_close,
    enumerate_scores,
    enumerate_segmentations,
    random_problem,
)
from tests.flash_semicrf.cases import (
    BACKENDS,
    SMALL_CASES,
    Case,
    naive_score,
    thinned,
    with_gradients,
)

CENTERINGS = ("position", "sequence", "none")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("case", thinned(SMALL_CASES, 7), ids=str)
def test_probabilities_sum_to_one(case, centering, backend):
    problem = case.problem()
    scores, offset = center_scores(problem.scores, problem.lengths, centering)
    centred = problem.replace(scores=scores)
    with record_backends() as ran:
        log_z = log_partition(centred, backend)
    assert ran == [backend]
    for b in range(problem.batch_size):
        _, gold = enumerate_scores(centred, b)
        if gold.max() == -math.inf:
            assert log_z[b] == -math.inf
        else:
            assert abs(float((gold - log_z[b]).exp().sum()) - 1.0) <= 1e-12
        if centering != "sequence":  # which makes another model
            _, uncentred = enumerate_scores(problem, b)
            assert_close(gold + offset[b], uncentred)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_sum_to_one_over_the_smallest_problem(backend):
    problem = random_problem(1, 1, 1, 2)
    _, gold = enumerate_scores(problem, 0)
    assert abs(float((gold - log_partition(problem, backend)).exp().sum()) - 1.0) <= 1e-12


@pytest.mark.parametrize("case", thinned(SMALL_CASES, 7), ids=str)
def test_score_segments_adds_the_terms_of_the_definition(case):
    problem = case.problem(batch_size=2)
    for b in range(problem.batch_size):
        segmentations, scores = enumerate_scores(problem, b)
        expected = [naive_score(problem, b, segments) for segments in segmentations]
        assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_durations_run_from_one_to_max_duration():
    zeros = Potentials(
        torch.zeros(1, 4, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4])
    )
    assert_close(log_partition(zeros).exp(), torch.tensor([5.0], dtype=torch.float64))


def _table(*rows):
    return segments_to_table([[Segment(s, t - 1, c) for s, t, c in row] for row in rows])


def test_score_rows_add_up_to_score_segments():
    problem = Case("usual", True, True, True, True, True).problem(ragged=False)
    table = _table([(0, 2, 1), (2, 4, 0)], [(0, 3, 0), (3, 4, 0)], [(0, 1, 1), (1, 4, 1)])
    rows = score_rows(problem, table)
    assert_close(rows.reshape(3, 2).sum(1), score_segments(problem, table))


def test_score_segments_gradients():
    problem = Case("usual", True, True, True, False, True).problem(ragged=False)
    table = _table([(0, 2, 1), (2, 4, 0)], [(0, 3, 0), (3, 4, 0)], [(0, 1, 1), (1, 4, 1)])
    leaves = with_gradients(problem).parameters()
    assert torch.autograd.gradcheck(
        lambda *values: score_segments(
            problem.replace(**dict(zip(leaves, values, strict=True))), table
        ),
        tuple(leaves.values()),
    )


def test_score_segments_gradient_is_finite_beside_forbidden_entries():
    problem = Case("usual").problem(ragged=False)
    transition = problem.transition.clone()
    transition[:, 1] = -math.inf
    problem = with_gradients(problem.replace(transition=transition))
    table = _table([(0, 2, 0), (2, 4, 0)], [(0, 1, 0), (1, 4, 0)], [(0, 3, 0), (3, 4, 0)])
    score_segments(problem, table).sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in problem.parameters().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["scores", "duration_bias", "transition"])
def test_score_segments_counts_neg_inf_as_forbidden(name, dtype):
    problem = Case("usual").problem(dtype=dtype, ragged=False)
    problem = problem.replace(**{name: torch.full_like(getattr(problem, name), NEG_INF)})
    table = _table(*([(0, 2, 0), (2, 4, 0)],) * 3)
    assert score_segments(problem, table).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_segments_is_float64(dtype):
    problem = Case("usual").problem(dtype=dtype, ragged=False)
    table = _table(*([(0, 2, 0), (2, 4, 1)],) * 3)
    assert score_segments(problem, table).dtype == torch.float64


def test_center_scores_position_takes_the_largest_of_each_position():
    scores = torch.tensor([[[1.0, 3.0], [-2.0, -5.0], [-math.inf, -math.inf], [9.0, 9.0]]])
    centred, offset = center_scores(scores, torch.tensor([3]))
    assert centred[0, :2].tolist() == [[-2.0, 0.0], [0.0, -3.0]]
    assert centred[0, 2].tolist() == [-math.inf] * 2
    assert offset.tolist() == [1.0]  # 3 - 2; neither the forbidden position nor the padding
    assert offset.dtype == torch.float64


def test_center_scores_sequence_takes_each_labels_mean():
    scores = torch.tensor([[[1.0, -math.inf], [3.0, 4.0], [50.0, 50.0]]])
    centred, offset = center_scores(scores, torch.tensor([2]), "sequence")
    assert centred[0, :2].tolist() == [[-1.0, -math.inf], [1.0, 0.0]]
    assert offset.tolist() == [0.0]


def test_center_scores_none_returns_the_scores():
    scores = torch.randn(2, 3, 2)
    centred, offset = center_scores(scores, torch.tensor([3, 1]), "none")
    assert centred is scores and offset.tolist() == [0.0, 0.0]


def test_center_scores_position_passes_the_gradient_of_log_z():
    # The shift is a constant: added back detached, it leaves the gradient exact.
    problem = with_gradients(Case("usual").problem())
    scores, offset = center_scores(problem.scores, problem.lengths)
    (log_partition(problem.replace(scores=scores)) + offset).sum().backward()
    found = problem.scores.grad.clone()
    problem.scores.grad = None
    log_partition(problem).sum().backward()
    assert_close(found, problem.scores.grad)


def test_center_scores_refuses_an_unknown_mode():
    with pytest.raises(ValueError) as error:
        center_scores(torch.zeros(1, 1, 1), torch.tensor([1]), "mean")
    assert str(error.value) == (
        '`centering` must be "position", "sequence" or "none"; got \'mean\'.'
    )


def test_initial_term_sums_over_sources():
    transition = torch.tensor([[1.0, -math.inf], [2.0, -math.inf]], dtype=torch.float64)
    expected = [math.log(math.exp(1) + math.exp(2)), -math.inf]
    assert_close(initial_term(transition), torch.tensor(expected, dtype=torch.float64))


def test_initial_term_gradient_of_a_forbidden_column_is_zero():
    transition = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]], requires_grad=True)
    initial_term(transition)[0].backward()
    assert transition.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_potentials_say_their_sizes():
    problem = random_problem(2, 5, 3, 4, dtype=torch.float32)
    sizes = (problem.batch_size, problem.num_positions, problem.max_duration, problem.num_labels)
    assert sizes == (2, 5, 3, 4)
    assert problem.dtype == torch.float32 and problem.device == torch.device("cpu")


def test_potentials_parameters_leave_out_what_is_absent():
    assert list(random_problem().parameters()) == ["scores", "transition", "duration_bias"]
    assert len(random_problem(boundary=True, ends=True).parameters()) == 7


def test_potentials_to_keeps_lengths_integer():
    problem = random_problem(ends=True).to(torch.float32)
    assert all(value.dtype == torch.float32 for value in problem.parameters().values())
    assert problem.lengths.dtype == torch.int64


def test_accumulator_dtype_is_float64_where_there_is_one():
    assert accumulator_dtype(torch.device("cpu")) == torch.float64
    assert accumulator_dtype(torch.device("mps")) == torch.float32


def test_every_segmentation_is_enumerated_once():
    found = [tuple(segments) for segments in enumerate_segmentations(4, 3, 2)]
    assert len(found) == len(set(found)) == 2 * 1 + 3 * 4 + 3 * 8 + 16 - 2


@pytest.mark.parametrize("by_duration", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_within_length_is_the_same_problem_with_fewer_durations(by_duration, tail):
    problem = random_problem(2, 3, 6, 2, by_duration=by_duration, ends=True, tail=tail)
    if by_duration:
        problem = problem.replace(initial_scores=torch.randn(6, 2, dtype=torch.float64))
    assert within_length(problem).max_duration == 3
    assert within_length(problem.replace(duration_bias=problem.duration_bias[:3])).max_duration == 3

    def gradients(p, change):
        leaves = {name: value.clone().requires_grad_() for name, value in p.parameters().items()}
        total = log_partition(change(p.replace(**leaves)), "reference").sum()
        return total, torch.autograd.grad(total, [*leaves.values()], materialize_grads=True)

    total, found = gradients(problem, within_length)
    expected_total, expected = gradients(problem, lambda p: p)
    assert_close(total, expected_total)
    for one, two in zip(found, expected, strict=True):
        assert_close(one, two)

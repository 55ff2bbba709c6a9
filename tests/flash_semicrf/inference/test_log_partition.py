"""The entry points: both call forms agree, gradients flow, memory stays small."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.compat import compute_edge_block_streaming, semi_crf_streaming_forward
from flash_semicrf.compat.streaming import SemiCRFStreaming
from flash_semicrf.problem.potentials import NEG_INF
from flash_semicrf.streaming import reference
from flash_semicrf.testing import assert_close, enumerate_scores, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    SMALL_CASES,
    Case,
    gradients_of,
    thinned,
    with_gradients,
)

OPTIONAL = ("start_scores", "end_scores", "initial_scores", "final_scores")
EVERYTHING = Case("usual", False, True, True, True, True)


def cumulative(problem):
    return torch.nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))


def forward(problem, cum_scores=None, **options):
    return semi_crf_streaming_forward(
        cumulative(problem) if cum_scores is None else cum_scores,
        problem.transition,
        problem.duration_bias,
        problem.lengths,
        problem.max_duration,
        **{name: getattr(problem, name) for name in OPTIONAL},
        **options,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned([c for c in SMALL_CASES if not c.forbid], 5), ids=str)
def test_cumulative_scores_give_the_same_log_partition(case, backend):
    problem = case.problem()
    assert_close(forward(problem, backend=backend), log_partition(problem, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_duration", [False, True])
def test_cumulative_scores_receive_the_gradient(by_duration, backend):
    problem = with_gradients(EVERYTHING._replace(by_duration=by_duration).problem())
    expected = gradients_of(log_partition(problem, backend).sum(), problem)
    cum_scores = cumulative(problem).detach().requires_grad_()
    (found,) = torch.autograd.grad(forward(problem, cum_scores, backend=backend).sum(), cum_scores)
    # Each score is a difference of two cumulative scores.
    assert_close(found[:, 1:-1], expected["scores"][:, :-1] - expected["scores"][:, 1:])
    assert_close(found[:, 0], -expected["scores"][:, 0])
    assert_close(found[:, -1], expected["scores"][:, -1])
    through = gradients_of(forward(problem, backend=backend).sum(), problem)
    for name, gradient in through.items():
        assert_close(gradient, expected[name])


def test_only_differences_of_cumulative_scores_count():
    problem = random_problem()
    shifted = cumulative(problem) + 100.0 * torch.randn(2, 1, 3, dtype=torch.float64)
    assert_close(forward(problem, shifted), forward(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("semiring", ["log", "max"])
def test_forward_returns_the_dtype_of_cumulative_scores(semiring, dtype):
    problem = random_problem(dtype=dtype)
    cum_scores = cumulative(problem).requires_grad_()
    value = forward(problem, cum_scores, semiring=semiring)
    assert value.dtype == dtype
    value.sum().backward()
    assert cum_scores.grad.dtype == dtype


def test_differences_of_float32_cumulative_scores_are_exact():
    # 1e6 + score loses the score's last digits; their difference in float64 loses no more.
    problem = random_problem(1, 50, 5, 2, ragged=False)
    cum_scores = (cumulative(problem) + 1e4).float()
    scores = cum_scores.double()[:, 1:] - cum_scores.double()[:, :-1]
    expected = log_partition(problem.replace(scores=scores))
    assert_close(forward(problem, cum_scores), expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned([c for c in SMALL_CASES if not c.forbid][::3], 3), ids=str)
def test_max_semiring_is_the_best_score(case, backend):
    problem = case.problem()
    free = problem.replace(initial_scores=problem.transition.amax(-2))
    given = free if problem.initial_scores is None else problem
    expected = [enumerate_scores(given, b)[1].max() for b in range(3)]
    assert_close(forward(problem, semiring="max", backend=backend), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_semiring_differentiates_along_the_best_segmentation(backend):
    problem = with_gradients(EVERYTHING.problem())
    best = viterbi(problem, backend)
    found = gradients_of(forward(problem, semiring="max", backend=backend).sum(), problem)
    expected = gradients_of(reference.log_partition(problem, "max").sum(), problem)
    for name, gradient in found.items():
        assert_close(gradient, expected[name])
    covered = torch.zeros_like(problem.scores)
    for b, segments in enumerate(best.segments):
        for segment in segments:
            covered[b, segment.start : segment.end + 1, segment.label] = 1.0
    assert torch.equal(found["scores"], covered)


@pytest.mark.parametrize("by_duration", [False, True])
def test_edge_block_is_what_a_segment_adds(by_duration):
    problem = random_problem(2, 5, 3, 4, by_duration=by_duration, ragged=False)
    matrix = problem.transition
    for start, k in ((0, 1), (0, 3), (2, 3), (4, 1)):
        block = compute_edge_block_streaming(
            cumulative(problem), matrix, problem.duration_bias, start, k
        )
        content = problem.scores[:, start : start + k].sum(1)  # (B, C_dst)
        between = matrix[k - 1] if by_duration else matrix
        expected = (content + problem.duration_bias[k - 1])[:, :, None] + between.T
        assert block.shape == (2, 4, 4)
        assert_close(block, expected)


def test_edge_blocks_sum_to_log_partition():
    # Two segments [0, 2) and [2, 5), nothing else: the first from any source.
    problem = random_problem(1, 5, 3, 2, ragged=False)
    bias = problem.duration_bias.clone()
    bias[0] = -math.inf
    problem = problem.replace(duration_bias=bias)
    blocks = [
        compute_edge_block_streaming(cumulative(problem), problem.transition, bias, start, k)
        for start, k in ((0, 2), (2, 3), (0, 3), (3, 2))
    ]
    first, second, other_first, other_second = blocks
    paths = [
        (second + first.logsumexp(2)[:, None, :]).logsumexp((1, 2)),
        (other_second + other_first.logsumexp(2)[:, None, :]).logsumexp((1, 2)),
    ]
    assert_close(torch.logaddexp(*paths), log_partition(problem))


@pytest.mark.parametrize("num_warps", [1, 2, 8])
def test_launch_options_change_nothing(num_warps):
    problem = random_problem()
    assert torch.equal(forward(problem, num_warps=num_warps), forward(problem))


@pytest.mark.parametrize("by_duration", [False, True])
def test_log_partition_gradcheck(by_duration):
    problem = EVERYTHING._replace(by_duration=by_duration).problem()
    for dropped in ("final_scores", "initial_scores"):
        given = problem.replace(**{dropped: None})
        leaves = with_gradients(given).parameters()

        def log_z(*values, given=given, leaves=leaves):
            return log_partition(given.replace(**dict(zip(leaves, values, strict=True))), "numba")

        assert torch.autograd.gradcheck(log_z, tuple(leaves.values()))


@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives_are_refused_with_a_reason(weighted):
    problem = with_gradients(random_problem())
    log_z = log_partition(problem, "numba")
    total = log_z.square().sum() if weighted else log_z.sum()
    (gradient,) = torch.autograd.grad(total, problem.scores, create_graph=True)
    with pytest.raises(RuntimeError) as error:
        gradient.square().sum().backward()
    assert str(error.value) == (
        "log_partition() is differentiable once by this backend; pass "
        'backend="reference" for second derivatives.'
    )


def test_gradgradcheck_is_refused():
    problem = random_problem(1, 3, 2, 2)
    with pytest.raises(RuntimeError, match="differentiable once by this backend"):
        torch.autograd.gradgradcheck(
            lambda scores: log_partition(problem.replace(scores=scores), "numba"),
            (problem.scores.requires_grad_(),),
        )


def test_create_graph_alone_is_no_error():
    problem = with_gradients(random_problem())
    (plain,) = torch.autograd.grad(log_partition(problem).sum(), problem.scores)
    total = log_partition(problem).sum()
    (found,) = torch.autograd.grad(total, problem.scores, create_graph=True)
    assert torch.equal(found, plain)


def test_reference_backend_has_second_derivatives():
    problem = with_gradients(random_problem())
    (gradient,) = torch.autograd.grad(
        log_partition(problem, "reference").sum(), problem.scores, create_graph=True
    )
    gradient.square().sum().backward()
    assert bool(problem.scores.grad.isfinite().all())


@pytest.mark.parametrize("name", ["scores", "transition", "duration_bias", *OPTIONAL])
def test_gradients_are_computed_for_what_asks_for_them(name):
    problem = EVERYTHING.problem()
    whole = with_gradients(problem)
    expected = gradients_of(log_partition(whole).sum(), whole)[name]
    alone = getattr(problem, name).clone().requires_grad_()
    log_partition(problem.replace(**{name: alone})).sum().backward()
    assert_close(alone.grad, expected)


def test_each_sequence_is_weighted_by_its_own_upstream_gradient():
    problem = with_gradients(EVERYTHING.problem())
    log_z = log_partition(problem)
    weight = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    found = gradients_of((log_z * weight).sum(), problem)
    parts = [gradients_of(log_partition(problem)[b], problem) for b in range(3)]
    for name, gradient in found.items():
        expected = sum(float(w) * part[name] for w, part in zip(weight, parts, strict=True))
        assert_close(gradient, expected)


def test_backward_does_not_change_what_it_returns_a_second_time():
    problem = with_gradients(EVERYTHING.problem())
    total = log_partition(problem).sum()
    leaves = list(problem.parameters().values())
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_leaves_results_of_the_caller_alone():
    problem = random_problem()
    copies = {name: value.clone() for name, value in problem.parameters().items()}
    leaves = with_gradients(problem)
    log_partition(leaves).sum().backward()
    viterbi(problem), segment_marginals(problem)
    assert all(torch.equal(getattr(problem, name), value) for name, value in copies.items())


def test_autograd_function_takes_parameters_in_their_order():
    problem = with_gradients(EVERYTHING.problem())
    p = problem
    log_z = SemiCRFStreaming.apply(
        "auto", p.lengths, p.scores, p.transition, p.duration_bias,
        p.start_scores, p.end_scores, p.initial_scores, p.final_scores,
    )  # fmt: skip
    assert torch.equal(log_z, log_partition(problem))
    found = gradients_of(log_z.sum(), problem)
    expected = gradients_of(log_partition(problem).sum(), problem)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_log_partition_without_gradients_has_the_same_value():
    problem = random_problem(3, 200, 17, 4, boundary=True, ends=True)
    with torch.no_grad():
        plain = log_partition(with_gradients(problem))
    with torch.inference_mode():
        inference = log_partition(problem)
    attached = log_partition(with_gradients(problem))
    assert attached.requires_grad and not plain.requires_grad
    assert_close(plain, attached.detach())
    assert_close(inference.clone(), plain)


@pytest.mark.parametrize(
    ("batch_size", "num_positions", "most"),
    [(300, 700, 0.02), (2, 100_000, 1.0)],
    ids=["whole", "in pieces, whose scores are read ahead"],
)
def test_log_partition_without_gradients_keeps_no_messages(batch_size, num_positions, most):
    problem = random_problem(batch_size, num_positions, 50, 4, ragged=False)
    message_bytes = problem.scores.nbytes
    peaks = {}
    for wants in (False, True):
        given = problem.replace(scores=problem.scores.requires_grad_(wants))
        log_partition(given)  # compile and import first
        tracemalloc.start()
        log_partition(given)
        peaks[wants] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[True] > 1.5 * message_bytes  # numpy's memory is what is traced
    assert peaks[False] < most * message_bytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_duration", [False, True])
def test_neg_inf_forbids_as_minus_infinity_does(by_duration, dtype, backend):
    problem = random_problem(
        3, 6, 3, 3, by_duration=by_duration, boundary=True, ends=True, forbid=0.15, dtype=dtype
    )
    finite = problem.replace(**{n: v.clamp(min=NEG_INF) for n, v in problem.parameters().items()})
    assert bool((finite.scores == torch.tensor(NEG_INF, dtype=dtype)).any())
    results = []
    for given in (problem, finite):
        leaves = with_gradients(given)
        log_z = log_partition(leaves, backend)
        gradients = gradients_of(torch.where(log_z > -math.inf, log_z, 0.0).sum(), leaves)
        results.append((log_z.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name])
        forbidden = getattr(problem, name) == -math.inf
        assert bool((gradient[forbidden] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", thinned(SMALL_CASES[::9], 3), ids=str)
def test_marginals_are_the_gradient_of_log_partition(case, backend):
    problem = case.problem()
    zeros = torch.zeros_like(problem.scores)
    given = {n: v for n in ("start_scores", "end_scores") if (v := getattr(problem, n)) is not None}
    leaves = with_gradients(
        problem.replace(**{n: given.get(n, zeros) for n in ("start_scores", "end_scores")})
    )
    log_z = reference.log_partition(leaves)
    expected = gradients_of(torch.where(log_z > -math.inf, log_z, 0.0).sum(), leaves)
    found = segment_marginals(problem, backend)
    assert_close(found.position, expected["scores"])
    assert_close(found.start, expected["start_scores"])
    assert_close(found.end, expected["end_scores"])
    assert not found.position.requires_grad


def test_marginals_boundary_is_the_chance_of_a_start():
    problem = random_problem(2, 6, 3, 2, ragged=False)
    marginals = segment_marginals(problem)
    assert_close(marginals.boundary, marginals.start.sum(-1))
    assert_close(marginals.boundary[:, 0], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_marginals_of_an_infeasible_sequence_are_zero(backend):
    problem = random_problem(2, 4, 2, 2, tail=True, ragged=False)
    scores = problem.scores.clone()
    scores[0, 1] = -math.inf
    found = segment_marginals(problem.replace(scores=scores), backend)
    for value in found:
        assert bool((value[0] == 0).all()) and bool(value[1].sum() > 0)


def test_lengths_of_any_integer_dtype_are_taken():
    problem = random_problem(3, 6, 3, 2)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        narrow = problem.replace(lengths=problem.lengths.to(dtype))
        assert torch.equal(log_partition(narrow), log_partition(problem))
        assert viterbi(narrow).segments == viterbi(problem).segments

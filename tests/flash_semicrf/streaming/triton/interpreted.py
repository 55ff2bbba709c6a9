"""The Triton kernels in Triton's interpreter, on the CPU, against the reference loop.

Run by `test_interpreter.py` in a process of its own: the interpreter is chosen by an environment
variable before triton is imported, and pytest does not collect this file by its name. A position
costs about 0.1 s whatever K and C are, so the problems are short and few.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.compat import (
    SemiCRFStreamingTriton,
    launch_streaming_triton_backward,
    launch_streaming_triton_kernel,
    launch_streaming_triton_kernel_max_bp,
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_triton,
)
from flash_semicrf.compat.cumulative import maximum_start
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import Segment, segments_to_table
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import gradients_of, long, thinned, with_gradients
from tests.flash_semicrf.streaming.triton.interpreter_cases import (
    BY_POSITION,
    INTERPRETED,
    REFERENCE,
    TRITON,
    Case,
    use_layout,
    with_poisoned_padding,
)

pytestmark = INTERPRETED


CASES = [
    Case(1, 3, 3, True, True),
    Case(15, 1, 1),
    Case(16, 3, 3, True, True, dtype=torch.float32),
    Case(17, 17, 8, True, False, 0.1, 10.0),
    Case(31, 40, 17, False, True),
    Case(32, 3, 8, scale=100.0),
    Case(25, 17, 3, True, True, 0.1, 100.0),
    Case(17, 40, 1, False, True, scale=10.0, dtype=torch.float32),
    Case(16, 1, 8, False, True, 0.1, 10.0),
    Case(15, 17, 17, True, False, 0.3),
    Case(8, 40, 8, False, False, 0.3, 10.0, 2),
    Case(9, 3, 3, True, True, 0.03, 1.0, 3),
    Case(9, 3, 3, True, True, batch=2, by_duration=True),
    Case(8, 12, 3, forbid=0.1, scale=10.0, by_duration=True),
    Case(7, 3, 8, True, False, 0.05, dtype=torch.float32, by_duration=True),
]

LONG = Case(70, 40, 3, True, True, 0.02)
"""Past the ring of sources and past two chunks of boundaries."""

# Four labels or fewer in groups of warps, and sequences long enough for each group to have a share.
LAYOUTS = [(4, 2), (4, 4), (8, 2)]


def assert_agrees_with_reference(problem: Potentials, **options) -> None:
    """Log Z, the gradients of every sequence, start and end marginals; options as `gradients`."""
    from flash_semicrf.streaming.triton import static

    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    # On the same numbers: what float32 lost in rounding the inputs is no error.
    expected_log_z, expected = REFERENCE.gradients(problem.to(torch.float64), wanted)
    with torch.no_grad():
        if options:
            log_z, found = static.gradients(with_poisoned_padding(problem), wanted, **options)
        else:
            log_z, found = TRITON.gradients(with_poisoned_padding(problem), wanted)
    assert log_z.dtype == torch.float64
    assert_close(log_z, expected_log_z)
    assert found.keys() == wanted
    for name, value in found.items():
        assert value.dtype == (problem.dtype if name in BY_POSITION else torch.float64)
        assert_close(value, expected[name], problem.dtype)
    outside = torch.arange(problem.num_positions) >= problem.lengths[:, None]
    assert all(bool((found[name][outside] == 0).all()) for name in BY_POSITION)


@pytest.mark.parametrize("case", [*thinned(CASES, 2), LONG], ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem())


@pytest.mark.parametrize("case", [CASES[2], Case(12, 6, 3, forbid=0.1)], ids=str)
def test_log_blocks_agree_with_reference(case):
    assert_agrees_with_reference(case.problem(), always_log=True)


@pytest.mark.parametrize(("rows", "groups"), [long(*LAYOUTS[0]), *LAYOUTS[1:]])
def test_any_layout_agrees_with_reference(rows, groups, monkeypatch):
    use_layout(monkeypatch, rows=rows, groups=groups)
    problem = Case(22, 20, 3, boundary=True).problem(integers=True, scale=0.7)
    assert_agrees_with_reference(problem)
    assert viterbi(problem, "triton") == viterbi(problem, "reference")


@pytest.mark.parametrize("mask", [None, -1e9])
def test_kernels_of_many_programs_agree_with_reference(mask, monkeypatch):
    from flash_semicrf.streaming.triton.static import gradient

    monkeypatch.setattr(gradient, "_FEW_PROGRAMS", 0)  # as if these were many
    problem = Case(33, 17, 3, True, True, 0.02).problem()
    if mask is not None:
        problem.scores[:, 9:12, 1] = mask
    assert_agrees_with_reference(problem)


def test_gradients_of_many_chunks_agree_with_reference(monkeypatch):
    from flash_semicrf.streaming.triton.static import chunks

    monkeypatch.setattr(chunks, "FEW", 1)  # as if two were many
    assert_agrees_with_reference(LONG.problem())


def test_long_windows_in_parts_agree_with_reference(monkeypatch):
    from flash_semicrf.streaming.triton.static import plan

    # Parts of two blocks, where 128 steps are too long for the interpreter.
    monkeypatch.setattr(plan, "PART", 16)
    monkeypatch.setattr(plan, "_LONG_WINDOW", 3)
    assert_agrees_with_reference(Case(35, 27, 2, True, True, 0.02).problem())
    problem = Case(35, 30, 2).problem(integers=True, scale=0.7)
    assert viterbi(problem, "triton").segments == viterbi(problem, "reference").segments


def test_values_are_checked_in_one_launch():
    from flash_semicrf.streaming.triton.values import values_are_allowed

    problem = Case(40, 5, 3, True, True, 0.2, batch=3, tail=True).problem()
    assert values_are_allowed(with_poisoned_padding(problem))
    for name, value in problem.parameters().items():
        for refused in (math.nan, math.inf, -1e38):
            changed = value.clone()
            changed.view(-1)[0] = refused
            assert not values_are_allowed(problem.replace(**{name: changed}))
    for length in (0, 41):
        lengths = problem.lengths.clone()
        lengths[1] = length
        assert not values_are_allowed(problem.replace(lengths=lengths))


def test_memory_after_a_buffer_is_not_read(monkeypatch):
    allocate = torch.empty

    def empty(*size, **options) -> torch.Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        buffer = allocate(shape.numel() + 64, **options)
        buffer.fill_(math.nan if buffer.is_floating_point() else 2**30)
        return buffer[: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    # Rows of four positions are read at a time, and these are six.
    assert_agrees_with_reference(
        Case(6, 2, 3, True, True, tail=True, dtype=torch.float32).problem()
    )


def test_names_of_release_0_2_0():
    problem = Case(9, 5, 3, batch=2).problem()
    cum_scores = torch.nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))
    arguments = (cum_scores, problem.transition, problem.duration_bias, problem.lengths, 5)
    log_z = launch_streaming_triton_kernel(*arguments)
    assert_close(log_z, REFERENCE.log_partition(problem))
    best = viterbi(maximum_start(problem), "reference")
    assert_close(launch_streaming_triton_kernel(*arguments, semiring="max"), best.scores)
    assert semi_crf_streaming_viterbi_triton(*arguments).segments == best.segments
    assert_close(launch_streaming_triton_kernel_max_bp(*arguments)[0], best.scores)
    weight = torch.tensor([2.0, -1.0], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in arguments[:3]]
    expected = semi_crf_streaming_forward(*leaves, *arguments[3:], backend="reference")
    expected = torch.autograd.grad(expected @ weight, leaves)
    found = launch_streaming_triton_backward(*arguments, grad_output=weight)
    for actual, gradient in zip(found, expected, strict=True):
        assert_close(actual, gradient)
    parameters = (problem.scores, problem.transition, problem.duration_bias, None, None, None, None)
    assert torch.equal(SemiCRFStreamingTriton.apply(None, problem.lengths, *parameters), log_z)


def test_log_partition_is_that_of_the_gradients():
    problem = Case(10, 17, 3, True, True, 0.1, batch=2).problem()
    assert torch.equal(TRITON.log_partition(problem), TRITON.gradients(problem, {"scores"})[0])


def test_interface_runs_triton_under_autograd():
    problem = Case(7, 4, 3, True, True, batch=3).problem()
    with record_backends() as ran:
        found = {}
        for backend in ("triton", "reference"):
            leaves = with_gradients(problem)
            log_z = log_partition(leaves, backend)
            weight = torch.linspace(0.5, 2.0, len(log_z), dtype=torch.float64)
            found[backend] = log_z.detach(), gradients_of(log_z @ weight, leaves)
        marginals = segment_marginals(problem, "triton")
        scores, table = viterbi_table(problem, "triton")
    assert ran == ["triton", "reference", "triton", "triton"]
    assert_close(found["triton"][0], found["reference"][0])
    for name, gradient in found["triton"][1].items():
        assert_close(gradient, found["reference"][1][name])
    for actual, expected in zip(marginals, segment_marginals(problem, "reference"), strict=True):
        assert_close(actual, expected)
    best = viterbi(problem, "reference")
    assert_close(scores, best.scores)
    for actual, expected in zip(table, segments_to_table(best.segments), strict=True):
        assert torch.equal(actual, expected)


def test_float32_log_partition_and_marginals_are_as_accurate_as_promised():
    problem = Case(18, 17, 8, scale=5.0, dtype=torch.float32).problem()
    log_z, found = TRITON.gradients(problem, {"scores"})
    expected_log_z, expected = REFERENCE.gradients(problem.to(torch.float64), {"scores"})
    bound = 1e-6 * max(1.0, abs(float(expected_log_z)))
    assert abs(float(log_z - expected_log_z)) <= bound
    assert float((found["scores"].double() - expected["scores"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by_duration"])
@pytest.mark.parametrize("mask", [-2e4, long(-1e9), -1e30])
def test_finite_masks_act_as_minus_infinity(mask, by_duration):
    # Boundary scores: without them neighbouring segments of one label tie in either order.
    positions = 9 if by_duration else 17  # each of the former takes as long as three
    problem = Case(positions, 5, 3, True, scale=3.0, by_duration=by_duration).problem()
    dead = torch.rand(problem.scores.shape) < 0.3
    dead[..., 0] = False
    masked, forbidden = (
        problem.replace(scores=problem.scores.masked_fill(dead, value))
        for value in (mask, -math.inf)
    )
    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    log_z, found = TRITON.gradients(masked, wanted)
    expected_log_z, expected = REFERENCE.gradients(forbidden, wanted)
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        assert_close(value, expected[name])
    best, expected_best = viterbi(masked, "triton"), viterbi(forbidden, "reference")
    assert_close(best.scores, expected_best.scores)
    assert [(s.start, s.end, s.label) for s in best.segments[0]] == [
        (s.start, s.end, s.label) for s in expected_best.segments[0]
    ]


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by_duration"])
def test_huge_scores_common_to_all_labels_change_no_marginals(by_duration):
    T = 9 if by_duration else 17
    problem = Case(T, 5, 3, scale=3.0, by_duration=by_duration).problem()
    shift = torch.zeros(1, T, 1, dtype=torch.float64)
    shift[0, [3, 4, T - 3]] = torch.tensor([[-1e12], [3e11], [-(2.0**40)]]).double()
    shifted = problem.replace(scores=problem.scores + shift)
    exact = shifted.replace(scores=shifted.scores - shift)  # as float64 rounds the shifted ones
    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    log_z, found = TRITON.gradients(shifted, wanted)
    expected_log_z, expected = REFERENCE.gradients(exact, wanted)
    assert_close(log_z, expected_log_z + shift.sum())
    for name, value in found.items():
        assert_close(value, expected[name])
    inside = TRITON.max_messages(shifted) - TRITON.max_messages(exact)
    assert_close(inside[:, 1:], shift.cumsum(1).expand(1, T, 3))
    assert [s.label for s in viterbi(shifted, "triton").segments[0]] == [
        s.label for s in viterbi(exact, "reference").segments[0]
    ]


@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by_duration"])
def test_large_float32_scores_cost_the_others_no_digits(by_duration):
    case = Case(9, 4, 2, by_duration=by_duration, tail=not by_duration, dtype=torch.float32)
    problem = case.problem()
    scores, bias = problem.scores.clone(), problem.duration_bias.clone()
    scores[..., 0] += 2e4  # of a label that is forbidden
    bias[:, 0] = -math.inf
    problem = problem.replace(scores=scores, duration_bias=bias)
    wide = problem.to(torch.float64)
    assert_close(TRITON.log_partition(problem), REFERENCE.log_partition(wide))
    assert_close(TRITON.viterbi(problem)[0], REFERENCE.viterbi(wide)[0])


def test_masks_that_cannot_be_avoided_keep_their_score():
    problem = Case(17, 5, 2).problem()
    scores = problem.scores.clone()
    scores[0, 6:12, 1] -= 3e4  # where label 0, far better, is forbidden by transitions
    transition = torch.tensor([[-math.inf, -math.inf], [0.3, 0.1]], dtype=torch.float64)
    bias = problem.duration_bias.clone()
    bias[1:, 0] = -math.inf  # label 0 lasts one position and nothing may follow it but the end
    problem = problem.replace(scores=scores, transition=transition, duration_bias=bias)
    assert_agrees_with_reference(problem)


@pytest.mark.parametrize("minimum", [long(2), 10])
def test_confident_scores_under_minimum_durations(minimum):
    problem = Case(24, 12, 3).problem()
    bias = problem.duration_bias.clone()
    bias[: minimum - 1] = -math.inf
    signs = torch.randint(0, 2, problem.scores.shape) * 2.0 - 1.0
    problem = problem.replace(scores=100.0 * signs.double(), duration_bias=bias)
    assert_agrees_with_reference(problem)
    best = viterbi(problem, "triton")
    assert_close(best.scores, viterbi(problem, "reference").scores)
    assert all(minimum <= segment.duration <= 12 for segment in best.segments[0])


def test_labels_die_and_return():
    problem = Case(40, 6, 3).problem()
    scores = problem.scores.clone()
    scores[0, 9:22, 0] = -math.inf  # longer than the window
    scores[0, 12:15, 1] = -math.inf
    scores[0, 30:36, 1:] = -math.inf  # one label alone
    assert_agrees_with_reference(problem.replace(scores=scores))


def test_infeasible_sequences_have_no_gradient_and_leave_the_others_alone():
    problem = Case(8, 5, 3, True, True, batch=3).problem()
    scores = problem.scores.clone()
    scores[1, 0] = -math.inf
    dead = problem.replace(scores=scores)
    log_z, found = TRITON.gradients(problem, set(problem.parameters()))
    dead_log_z, dead_found = TRITON.gradients(dead, set(problem.parameters()))
    assert dead_log_z[1] == TRITON.log_partition(dead)[1] == -math.inf
    assert all(bool((value[1] == 0).all()) for value in dead_found.values())
    for b in (0, 2):
        assert dead_log_z[b] == log_z[b]
        assert all(torch.equal(dead_found[name][b], found[name][b]) for name in found)
    best, table = TRITON.viterbi(dead)
    assert best[1] == -math.inf and table.sequence.unique().tolist() == [0, 2]


@pytest.mark.parametrize("name", ["transition", "duration_bias", "initial_scores", "final_scores"])
def test_all_forbidden_is_minus_infinity_with_gradient_zero(name):
    problem = Case(6, 3, 2, ends=name != "transition").problem()
    problem = problem.replace(**{name: torch.full_like(getattr(problem, name), -math.inf)})
    log_z, found = TRITON.gradients(problem, set(problem.parameters()))
    assert log_z.tolist() == [-math.inf]
    assert all(bool((value == 0).all()) for value in found.values())
    best, table = TRITON.viterbi(problem)
    assert best.tolist() == [-math.inf] and len(table.sequence) == 0


def test_results_repeat_bit_by_bit_whatever_else_is_in_the_batch():
    problem = Case(10, 9, 3, True, True, 0.05, batch=2).problem()
    wanted = set(problem.parameters())
    log_z, found = TRITON.gradients(problem, wanted)
    again, repeated = TRITON.gradients(problem, wanted)
    assert torch.equal(again, log_z)
    assert all(torch.equal(repeated[name], found[name]) for name in wanted)
    b = int(problem.lengths.argmin())
    length = int(problem.lengths[b])
    alone = problem.replace(
        lengths=problem.lengths[b : b + 1],
        **{name: getattr(problem, name)[b : b + 1, :length] for name in BY_POSITION},
    )
    own_log_z, own = TRITON.gradients(alone, wanted)
    assert own_log_z[0] == log_z[b]
    for name, value in own.items():
        expected = found[name][b, :length] if name in BY_POSITION else found[name][b]
        assert torch.equal(value[0], expected)


@pytest.mark.parametrize("case", [c for c in CASES if c.scale == 1.0] + [LONG], ids=str)
def test_viterbi_is_that_of_the_reference(case):
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    problem = case.problem(integers=True, scale=0.7).to(torch.float64)
    actual, expected = viterbi(problem, "triton"), viterbi(problem, "reference")
    assert torch.equal(actual.scores, expected.scores)
    assert actual.segments == expected.segments


def test_viterbi_of_all_zeros_takes_the_shortest_and_lowest():
    problem = random_problem(2, 18, 5, 3, ends=True, scale=0.0)
    for length, segments in zip(
        problem.lengths.tolist(), viterbi(problem, "triton").segments, strict=True
    ):
        assert segments == [Segment(t, t, 0, 0.0) for t in range(length)]


def test_max_messages_agree():
    problem = Case(19, 7, 3, True, True, 0.1, 3.0, 2).problem()
    actual, expected = TRITON.max_messages(problem), REFERENCE.max_messages(problem)
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    assert_close(actual[inside], expected[inside])


@pytest.mark.parametrize("options", [{"boundary": True}, {"by_duration": True}])
def test_interface_takes_duration_tails(options):
    problem = random_problem(1, 4, 2, 2, tail=True, dtype=torch.float32, ragged=False, **options)
    narrow = {"dtype": torch.float32}
    found, expected = with_gradients(problem), with_gradients(problem)
    with record_backends() as ran:
        log_z = log_partition(found, "triton")
    assert ran == ["triton"]
    reference = log_partition(expected, "reference")
    assert_close(log_z.detach(), reference.detach(), **narrow)
    by_loop = gradients_of(reference.sum(), expected)
    for name, gradient in gradients_of(log_z.sum(), found).items():
        assert_close(gradient, by_loop[name], **narrow)
    scores, table = viterbi_table(problem, "triton")
    wanted = viterbi_table(problem, "reference")
    assert_close(scores, wanted[0], **narrow)
    assert all(torch.equal(x, y) for x, y in zip(table, wanted[1], strict=True))

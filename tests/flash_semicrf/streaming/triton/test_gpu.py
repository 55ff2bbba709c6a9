"""The Triton kernels on a CUDA device, against the float64 reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flash_semicrf import log_partition, viterbi
from flash_semicrf.compat import semi_crf_streaming_viterbi_with_backpointers
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.problem.validation import check_table
from flash_semicrf.streaming.compilation import watched
from flash_semicrf.streaming.dispatch import BACKENDS, choose
from tests.flash_semicrf.cases import LONG_CASES, LONG_SHAPES, with_gradients
from tests.flash_semicrf.streaming.triton.gpu_cases import (
    BY_POSITION,
    CONDITIONS,
    EVERYTHING,
    SETTINGS,
    assert_near,
    draw,
    marked,
    results_of,
    with_direction,
)

pytestmark = [pytest.mark.gpu, *CONDITIONS]

ALL_SETTINGS = marked(*SETTINGS)
USUAL = pytest.mark.gpu(group="usual")
MANY_SHORT = pytest.mark.gpu(group="many short, full")
THREE_LABELS = pytest.mark.gpu(group="three labels, full")

POSTERIOR = marked(
    "usual, full", "many short, full", "three labels, full", "one label, full",
    "long segments, full", "usual", "most labels", "by duration", "by duration, full",
    "by duration, tail", "three labels, tail",
)  # fmt: skip

GROUPS = {
    "one more": "many short, full",
    "two blocks": "many short, full",
    "many labels": "usual, full",
}
"""By shape of `LONG_SHAPES`; the others have up to four labels."""

# Lengths on either side of the blocks of positions, by the kernels of other settings.
BLOCKS = [
    pytest.param(case, marks=pytest.mark.gpu(group=GROUPS.get(case.shape, "three labels, full")))
    for case in LONG_CASES
    if case.start and case.initial and case.shape != "one duration"  # a setting by itself
]


def with_poisoned_padding(problem: Potentials) -> Potentials:
    outside = torch.arange(problem.num_positions, device=problem.device) >= problem.lengths[:, None]
    given = {n: getattr(problem, n) for n in BY_POSITION if getattr(problem, n) is not None}
    return problem.replace(
        **{name: value.masked_fill(outside[..., None], torch.nan) for name, value in given.items()}
    )


def assert_agrees_with_reference(problem: Potentials) -> None:
    """Log Z, every gradient of every sequence, start and end marginals; `problem` on the CPU."""
    wanted = EVERYTHING | set(problem.parameters())
    # The reference on the same numbers: what float32 lost in rounding the inputs is no error.
    expected_log_z, expected = BACKENDS["reference"].gradients(problem.to(torch.float64), wanted)
    on_gpu = with_poisoned_padding(problem.to("cuda"))
    log_z, found = choose("triton", on_gpu).gradients(on_gpu, wanted)
    assert log_z.device.type == "cuda"
    assert_near(log_z, expected_log_z, 1e-9)
    assert_near(choose("triton", on_gpu).log_partition(on_gpu), expected_log_z, 1e-9)
    for name, value in found.items():
        assert value.dtype == (problem.dtype if name in BY_POSITION else torch.float64)
        assert_near(value, expected[name], 1e-9 if problem.dtype == torch.float64 else 1e-5)


def assert_equal_results(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_agrees_with_reference(setting):
    assert_agrees_with_reference(draw(setting))


@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_viterbi_is_that_of_the_reference(setting):
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    problem = draw(setting, integers=True, forbid=0.0)
    actual, expected = viterbi(problem.to("cuda"), "triton"), viterbi(problem, "reference")
    assert torch.equal(actual.scores.cpu(), expected.scores)
    assert actual.segments == expected.segments


@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_viterbi_path_has_the_best_score(setting):
    problem = draw(setting)
    best, table = viterbi_table(problem.to("cuda"), "triton")
    assert best.device.type == table.start.device.type == "cuda"
    assert_near(best, viterbi(problem, "reference").scores, 1e-9)
    table = type(table)(*(column.cpu() for column in table))
    check_table(table, problem)
    assert_near(score_segments(problem.to(torch.float64), table), best, 1e-9)


@pytest.mark.parametrize("setting", POSTERIOR)
def test_samples_are_those_of_the_cpu(setting):
    # The same random numbers: only where rounding decides may a sample be another.
    problem = draw(setting)
    expected = BACKENDS["numba"].sample(unrolled(problem), 20, 5)
    actual = choose("triton", problem.to("cuda")).sample(problem.to("cuda"), 20, 5)
    for column, values in zip(actual, expected, strict=True):
        assert torch.equal(column.cpu(), values)


@pytest.mark.parametrize("setting", POSTERIOR)
def test_messages_are_those_of_the_cpu(setting):
    problem = draw(setting)
    expected = BACKENDS["numba"].messages(unrolled(problem))
    actual = choose("triton", problem.to("cuda")).messages(problem.to("cuda"))
    assert_near(actual[0], expected[0], 1e-9)
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    inside[:, 0] = False
    for messages, values in zip(actual[1:], expected[1:], strict=True):
        assert_near(messages.cpu()[inside], values[inside], 1e-9)


@pytest.mark.parametrize("setting", POSTERIOR)
def test_tangents_are_those_of_the_cpu(setting):
    problem, direction = with_direction(draw(setting))
    wanted = set(problem.parameters())
    _, expected_mean, expected = choose("numba", problem).tangents(problem, direction, wanted)
    on_gpu = problem.to("cuda")
    _, mean, found = choose("triton", on_gpu).tangents(on_gpu, direction.to("cuda"), wanted)
    assert_near(mean, expected_mean, 1e-9)
    for name, value in found.items():
        assert_near(value, expected[name], 1e-8)  # sums of hundreds of terms of both signs


@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_results_repeat_bit_by_bit(setting):
    problem = draw(setting).to("cuda")
    first = results_of(problem)
    for _ in range(3):
        assert_equal_results(results_of(problem), first)


@pytest.mark.parametrize("setting", marked("usual", "many short", "many labels", "long segments"))
def test_float64_inputs_make_the_same_log_partition(setting):
    problem = draw(setting).to("cuda")
    narrow = log_partition(problem, "triton")
    wide = log_partition(problem.to(torch.float64), "triton")
    assert_near(narrow, wide, 1e-12)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_agrees_with_reference_around_the_blocks(case):
    assert_agrees_with_reference(case.problem(LONG_SHAPES))


@pytest.mark.parametrize("forbid", [0.0, 0.05])
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("setting", marked("many short, full", "three labels, full"))
def test_agrees_with_reference_at_any_scale(setting, scale, forbid):
    assert_agrees_with_reference(draw(setting, scale=scale, forbid=forbid))


@THREE_LABELS
@pytest.mark.parametrize("minimum", [2, 16, 25])
def test_confident_scores_under_minimum_durations(minimum):
    problem = draw("three labels, full")
    bias = problem.duration_bias.clone()
    bias[: minimum - 1] = -torch.inf
    signs = torch.randint(0, 2, problem.scores.shape) * 2.0 - 1.0
    assert_agrees_with_reference(problem.replace(scores=100.0 * signs.double(), duration_bias=bias))


@pytest.mark.parametrize(
    "setting", marked("three labels, tail", "usual, tail", "long segments, tail")
)
def test_agrees_with_reference_where_segments_are_longer_than_k(setting):
    problem = draw(setting, scale=0.3, forbid=0.0)
    tail = torch.linspace(-0.1, 0.0, problem.num_labels).to(problem.dtype)
    problem = problem.replace(transition=problem.transition - 12.0, duration_tail=tail)
    assert_agrees_with_reference(problem)
    best, expected = viterbi(problem.to("cuda"), "triton"), viterbi(problem, "reference")
    assert_near(best.scores, expected.scores, 1e-9)
    durations = [[s.duration for s in segments] for segments in best.segments]
    assert durations == [[s.duration for s in segments] for segments in expected.segments]
    assert max(map(max, durations)) > problem.max_duration


@pytest.mark.parametrize("mask", [-1e9, -1e30])
@pytest.mark.parametrize("setting", marked("usual", "three labels, full", "by duration, full"))
def test_finite_masks_act_as_minus_infinity(setting, mask):
    problem = draw(setting, forbid=0.0)
    dead = torch.rand(problem.scores.shape) < 0.3
    dead[..., 0] = False
    masked, forbidden = (
        problem.replace(scores=problem.scores.masked_fill(dead, value))
        for value in (mask, -torch.inf)
    )
    masked = masked.to("cuda")
    wanted = EVERYTHING | set(problem.parameters())
    expected_log_z, expected = BACKENDS["reference"].gradients(forbidden, wanted)
    log_z, found = choose("triton", masked).gradients(masked, wanted)
    assert_near(log_z, expected_log_z, 1e-9)
    for name, value in found.items():
        assert_near(value, expected[name], 1e-9 if problem.dtype == torch.float64 else 1e-5)
    best = viterbi(masked, "triton")
    assert_near(best.scores, viterbi(forbidden, "reference").scores, 1e-9)


@THREE_LABELS
def test_back_pointers_are_those_of_the_reference():
    problem = draw("three labels, full", integers=True, forbid=0.0)
    given = {
        name: getattr(problem, name)
        for name in ("start_scores", "end_scores", "initial_scores", "final_scores")
    }
    found = {}
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        p = problem.to(device)
        cum_scores = nn.functional.pad(p.scores.cumsum(1), (0, 0, 1, 0))
        found[backend] = semi_crf_streaming_viterbi_with_backpointers(
            cum_scores, p.transition, p.duration_bias, p.lengths, p.max_duration, backend=backend,
            **{name: value.to(device) for name, value in given.items()},
        )  # fmt: skip
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert torch.equal(actual.cpu(), expected)


@MANY_SHORT
def test_infeasible_sequences_have_no_gradient():
    problem = draw("many short, full", ragged=False).to("cuda")
    scores = problem.scores.clone()
    scores[3, 17] = -torch.inf
    problem = problem.replace(scores=scores)
    log_z, found = choose("triton", problem).gradients(problem, EVERYTHING)
    assert (log_z == -torch.inf).nonzero().tolist() == [[3]]
    assert all(bool((value[3] == 0).all() and value.isfinite().all()) for value in found.values())


@MANY_SHORT
def test_rest_of_the_batch_changes_nothing():
    problem = draw("many short, full").to("cuda")
    log_z, found = choose("triton", problem).gradients(problem, EVERYTHING)
    for b in (0, 7):
        length = int(problem.lengths[b])
        alone = problem.replace(
            lengths=problem.lengths[b : b + 1],
            **{name: getattr(problem, name)[b : b + 1, :length] for name in BY_POSITION},
        )
        own_log_z, own = choose("triton", alone).gradients(alone, {"scores"})
        # Other lengths compile other kernels, which may contract multiplications differently.
        assert_near(own_log_z[0], log_z[b], 1e-12)
        assert_near(own["scores"][0], found["scores"][b, :length], 1e-12)


@pytest.mark.parametrize("setting", marked("usual, full", "by duration, full"))
def test_unwritten_memory_is_not_read(setting):
    problem = draw(setting).to("cuda")
    assert bool(torch.empty(64, device="cuda").isnan().all())  # as every test runs
    poisoned = results_of(problem)
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert_equal_results(poisoned, results_of(problem))
    assert all(bool(value.isfinite().all()) for value in poisoned)


@USUAL
def test_kernels_of_an_operation_are_compiled_before_any_is_launched(monkeypatch):
    from triton import knobs

    from flash_semicrf.streaming.triton import jit

    problem = draw("usual").to("cuda")
    expected = viterbi(problem)
    monkeypatch.setattr(jit, "_compiled", {})  # those on disk are loaded again
    launched, compiled = [], []
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [launched.append])
    with watched(lambda cost: compiled.append(len(launched))):
        found = viterbi(problem)
    assert found.segments == expected.segments
    assert len(compiled) == 7  # the check of values too, which then ran without its kernel
    assert len(launched) == 6 and set(compiled) == {0}
    assert viterbi(problem).segments == expected.segments
    assert len(compiled) == 7 and len(launched) == 13


@USUAL
def test_the_backward_pass_is_compiled_with_the_forward_pass(monkeypatch):
    from flash_semicrf.streaming.triton import jit

    problem = with_gradients(draw("usual").to("cuda"))
    monkeypatch.setattr(jit, "_compiled", {})
    compiled = []
    with watched(compiled.append):
        log_z = log_partition(problem)
        before = len(compiled)
        log_z.sum().backward()
    assert len(compiled) == before > 0


@USUAL
def test_hooks_of_triton_see_every_launch(monkeypatch):
    from triton import knobs

    problem = with_gradients(draw("usual").to("cuda"))

    def results() -> list[torch.Tensor]:
        log_z = log_partition(problem)
        given = list(problem.parameters().values())
        return [log_z.detach(), *torch.autograd.grad(log_z.sum(), given)]

    expected = results()
    entered, left = [], []
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [entered.append])
    monkeypatch.setattr(knobs.runtime.launch_exit_hook, "calls", [left.append])
    found = results()
    assert_equal_results(found, expected)
    names = [metadata.get()["name"] for metadata in entered]
    assert {"flags_kernel", "prepare_kernel", "pass_kernel", "scale_kernel"} <= set(names)
    assert len(entered) == len(left)


@USUAL
def test_kernels_are_launched_by_the_function_in_c():
    import triton

    from flash_semicrf.streaming.triton import jit

    log_partition(draw("usual").to("cuda"))
    if triton.__version__.startswith("3.6."):
        assert all(launcher.run is not None for launcher in jit._compiled.values())


@USUAL
def test_other_stream():
    problem = draw("usual").to("cuda")
    expected = results_of(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Not ready when the kernels are launched: only the order of the stream makes it so.
        late = torch.zeros_like(problem.scores)
        torch.cuda._sleep(20_000_000)
        late.copy_(problem.scores)
        actual = results_of(problem.replace(scores=late))
    stream.synchronize()
    assert_equal_results(actual, expected)


@USUAL
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_the_current_one():
    problem = draw("usual")
    expected = results_of(problem.to("cuda:0"))
    assert torch.cuda.current_device() == 0
    actual = results_of(problem.to("cuda:1"))
    assert all(value.device.index == 1 for value in actual)
    assert_equal_results([value.to("cuda:0") for value in actual], expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("setting", marked("usual", "usual, full", "usual, tail"))
def test_log_partition_is_captured_in_a_graph(setting):
    first, second = (draw(setting, seed=seed).to("cuda") for seed in (1, 2))
    second = second.replace(lengths=second.lengths.flip(0))
    expected = [log_partition(p) for p in (first, second)]
    static = first.replace(scores=first.scores.clone(), lengths=first.lengths.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and allocated before the capture
        log_partition(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_z = log_partition(static)
    for problem in (first, second, first):
        changed = problem.replace(
            **{n: v for n, v in first.parameters().items() if n != "scores"}
        )  # only the scores and the lengths of the graph's input are replaced
        static.scores.copy_(changed.scores)
        static.lengths.copy_(changed.lengths)
        graph.replay()
        assert torch.equal(log_z, log_partition(changed))
    assert torch.equal(log_z, expected[0])

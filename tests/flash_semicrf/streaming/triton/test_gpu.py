"""The Triton kernels on a CUDA device, against the float64 reference on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.potentials import Potentials, score_segments
from flash_semicrf.segments import segments_to_table
from flash_semicrf.streaming import (
    log_partition,
    segment_marginals,
    semi_crf_streaming_forward,
    semi_crf_streaming_viterbi_with_backpointers,
    viterbi,
    viterbi_table,
)
from flash_semicrf.streaming.dispatch import BACKENDS, choose, record_backends
from flash_semicrf.streaming.triton.backend import HAS_TRITON
from flash_semicrf.testing import random_problem
from flash_semicrf.validation import check_table
from tests.flash_semicrf.cases import LONG_CASES, LONG_SHAPES, gradients_of, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    # Tests run in deterministic mode, for its poisoned buffers. What warns is plain PyTorch, such
    # as cumsum; the kernels' own results are compared bit by bit below.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

BY_POSITION = ("scores", "start_scores", "end_scores")
EVERYTHING = {*BY_POSITION, "transition", "duration_bias"}

PLAIN = {"dtype": torch.float32}
FULL = {"boundary": True, "ends": True, "forbid": 0.01}

SETTINGS = {
    "usual": ((4, 300, 100, 24), PLAIN),
    "usual, full": ((2, 300, 100, 24), FULL),
    "many labels": ((4, 150, 16, 64), PLAIN),
    "many labels, full": ((2, 100, 16, 50), FULL),
    "many short": ((16, 150, 32, 8), PLAIN),
    "many short, full": ((16, 150, 32, 8), FULL),
    "long segments": ((1, 500, 1000, 24), PLAIN),
    "long segments, full": ((2, 400, 350, 3), FULL),
    "three labels, full": ((2, 400, 30, 3), FULL),
    "most labels": ((2, 80, 20, 128), PLAIN),
    "by duration": ((3, 60, 9, 5), {**PLAIN, "by_duration": True}),
    "by duration, full": ((2, 50, 20, 17), {**FULL, "by_duration": True}),
    "long": ((1, 600, 100, 24), PLAIN),
    "large batch": ((64, 40, 60, 24), PLAIN),
    "one label, full": ((3, 400, 7, 1), {**FULL, "forbid": 0.0}),
    "one duration, full": ((3, 300, 1, 5), FULL),
}
"""(B, T, K, C) and options: several chunks of boundaries and of segments, every layout of the
warps. Compilation takes most of the time, some 30 s for each combination of padded labels, dtype
and options: there are few."""

SAME_KERNELS = {
    "long": "usual",
    "large batch": "usual",
    "one label, full": "three labels, full",
    "one duration, full": "many short, full",
}


BLOCK_GROUPS = {
    "one more": "many short, full",
    "two blocks": "many short, full",
    "one duration": "16 labels",
    "many labels": "usual, full",
}
"""By shape of `LONG_SHAPES`; the others have up to four labels."""


def marked(*names: str) -> list:
    """Parameters by setting, each in the group of the tests that run the same kernels."""
    return [
        pytest.param(name, marks=pytest.mark.gpu(group=SAME_KERNELS.get(name, name)))
        for name in names
    ]


ALL_SETTINGS = marked(*SETTINGS)

USUAL = pytest.mark.gpu(group="usual")
MANY_SHORT = pytest.mark.gpu(group="many short, full")
AUTO = pytest.mark.gpu(group="few labels, float64")
HALF = pytest.mark.gpu(group="half")
HEAD = pytest.mark.gpu(group="head")
THREE_LABELS = pytest.mark.gpu(group="three labels, full")


def draw(setting: str, **options) -> Potentials:
    """Problem of a setting, on the CPU."""
    shape, given = SETTINGS[setting]
    return random_problem(*shape, **{"seed": 1, **given, **options})


def with_poisoned_padding(problem: Potentials) -> Potentials:
    outside = torch.arange(problem.num_positions, device=problem.device) >= problem.lengths[:, None]
    given = {n: getattr(problem, n) for n in BY_POSITION if getattr(problem, n) is not None}
    return problem.replace(
        **{name: value.masked_fill(outside[..., None], torch.nan) for name, value in given.items()}
    )


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance
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


def results_of(problem: Potentials) -> list[torch.Tensor]:
    """Everything that the backend computes, in a fixed order."""
    log_z, found = choose("triton", problem).gradients(problem, EVERYTHING)
    scores, table = viterbi_table(problem, "triton")
    return [log_z, *(found[name] for name in sorted(found)), scores, *table]


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
    assert_near(score_segments(problem.to(torch.float64), table, "max"), best, 1e-9)


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


# Scores on either side of the blocks of positions, by the kernels of other settings.
BLOCKS = [
    pytest.param(case, marks=pytest.mark.gpu(group=group))
    for case in LONG_CASES
    if case.start and case.initial
    for group in [BLOCK_GROUPS.get(case.shape, "three labels, full")]
]


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


@AUTO
def test_back_pointers_are_those_of_the_reference():
    problem = draw("three labels, full", integers=True, boundary=False, ends=False, forbid=0.0)
    found = {}
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        p = problem.to(device)
        cum_scores = nn.functional.pad(p.scores.cumsum(1), (0, 0, 1, 0))
        found[backend] = semi_crf_streaming_viterbi_with_backpointers(
            cum_scores, p.transition, p.duration_bias, p.lengths, p.max_duration, backend=backend
        )
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


@pytest.mark.parametrize("setting", marked("usual", "usual, full"))
def test_log_partition_is_captured_in_a_graph(setting):
    first, second = (draw(setting, seed=seed).to("cuda") for seed in (1, 2))
    second = second.replace(lengths=second.lengths.flip(0))
    backend = choose("triton", first)
    expected = [backend.log_partition(p) for p in (first, second)]
    static = first.replace(scores=first.scores.clone(), lengths=first.lengths.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and allocated before the capture
        backend.log_partition(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_z = backend.log_partition(static)
    for problem in (first, second, first):
        changed = problem.replace(
            **{n: v for n, v in first.parameters().items() if n != "scores"}
        )  # only the scores and the lengths of the graph's input are replaced
        static.scores.copy_(changed.scores)
        static.lengths.copy_(changed.lengths)
        graph.replay()
        assert torch.equal(log_z, backend.log_partition(changed))
    assert torch.equal(log_z, expected[0])


@AUTO
@pytest.mark.parametrize("by_duration", [False, True])
def test_auto_runs_triton_where_it_can(by_duration):
    problem = random_problem(2, 40, 5, 3, by_duration=by_duration).to("cuda")
    can = BACKENDS["triton"].why_not(problem) is None
    assert can or by_duration
    with record_backends() as ran:
        log_z = log_partition(problem)
        marginals = segment_marginals(problem)
        best = viterbi(problem)
    assert ran == ["triton" if can else "reference"] * 3
    expected = BACKENDS["reference"]
    on_cpu = problem.to("cpu")
    assert_near(log_z, expected.log_partition(on_cpu), 1e-9)
    assert_near(best.scores, expected.viterbi(on_cpu)[0], 1e-9)
    for actual, marginal in zip(marginals, segment_marginals(on_cpu, "reference"), strict=True):
        assert_near(actual, marginal, 1e-9)


@AUTO
def test_use_triton_false_runs_the_reference():
    problem = random_problem(2, 40, 5, 3).to("cuda")
    cum_scores = nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))
    arguments = (cum_scores, problem.transition, problem.duration_bias, problem.lengths, 5)
    head = SemiMarkovCRFHead(num_classes=3, max_duration=5).cuda()
    with record_backends() as ran:
        log_z = semi_crf_streaming_forward(*arguments, use_triton=False)
        partition = head(problem.scores, problem.lengths, use_triton=False)["partition"]
    assert ran == ["reference"] * 2
    assert_near(log_z, semi_crf_streaming_forward(*arguments), 1e-9)
    assert_near(partition, head(problem.scores, problem.lengths)["partition"], 1e-9)


@MANY_SHORT
def test_log_partition_under_autograd():
    problem = draw("many short, full")
    found = {}
    for device, backend in (("cuda", "auto"), ("cpu", "reference")):
        leaves = with_gradients(problem.to(device))
        log_z = log_partition(leaves, backend)
        weight = torch.linspace(0.5, 2.0, len(log_z), dtype=torch.float64, device=device)
        found[device] = log_z.detach(), gradients_of(log_z @ weight, leaves)
    assert_near(found["cuda"][0], found["cpu"][0], 1e-9)
    for name, gradient in found["cuda"][1].items():
        assert gradient.device.type == "cuda"
        assert_near(gradient, found["cpu"][1][name], 1e-9)


@HALF
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_upcast(dtype):
    problem = draw("many short", dtype=dtype)
    log_z = log_partition(problem.to("cuda"), "triton")
    assert log_z.dtype == torch.float64
    expected = BACKENDS["reference"].log_partition(problem.to(torch.float64))
    assert_near(log_z, expected, 1e-9)
    leaves = with_gradients(problem.to("cuda"))
    gradients = gradients_of(log_partition(leaves, "triton").sum(), leaves)
    _, marginals = BACKENDS["reference"].gradients(problem.to(torch.float64), {"scores"})
    assert gradients["scores"].dtype == dtype
    assert_near(gradients["scores"], marginals["scores"], 2e-2 if dtype == torch.bfloat16 else 2e-3)


class Tagger(nn.Module):
    """An encoder with a head, as a user writes it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = SemiMarkovCRFHead(4, 12, hidden_dim=16, boundary_scores=True)

    def forward(self, x, lengths, labels):
        return self.head.compute_loss(self.encoder(x), lengths, labels)


@pytest.fixture
def batch():
    """Features, lengths and labels of eight sequences."""
    labels = torch.randint(0, 4, (8, 20), device="cuda").repeat_interleave(5, 1)
    x = torch.randn(8, 100, 6, device="cuda") + labels[..., None]
    lengths = torch.randint(1, 101, (8,), device="cuda")
    return x, lengths, labels


def loss_and_gradients(model: nn.Module, arguments) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(*arguments)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@HEAD
def test_head_trains_and_decodes(batch):
    model = Tagger().cuda()
    x, lengths, labels = batch
    on_cpu = copy.deepcopy(model).cpu().double()
    with record_backends() as ran:
        first = loss_and_gradients(model, batch)
    assert ran == ["triton"]
    expected_hidden = on_cpu.encoder(x.cpu().double())
    loss = on_cpu.head.compute_loss(
        expected_hidden, lengths.cpu(), labels.cpu(), backend="reference"
    )
    loss.backward()
    # The encoder runs in float32 here and in float64 there.
    expected = [loss.detach(), *(p.grad for p in on_cpu.parameters())]
    for actual, value in zip(first, expected, strict=True):
        assert_near(actual, value, 2e-4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    assert float(model(*batch)) < 0.5 * float(first[0])
    with record_backends() as ran:
        result = model.head.decode_with_traceback(model.encoder(x), lengths)
    assert ran == ["triton"]
    table = segments_to_table(result.segments)
    right = sum(
        int((labels[b, start:stop] == label).sum())
        for b, start, stop, label in zip(*(column.tolist() for column in table), strict=True)
    )
    assert right > 0.9 * int(lengths.sum())


@HEAD
# The compiler warns of much that is not ours: TF32, deprecations, functions it does not trace.
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_of_a_model_with_the_head(batch):
    model = Tagger().cuda()
    expected = loss_and_gradients(model, batch)
    actual = loss_and_gradients(torch.compile(model), batch)
    for value, other in zip(actual, expected, strict=True):
        assert_near(value, other, 1e-4)


@HEAD
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_the_head_in_full_precision(batch, dtype):
    model = Tagger().cuda()
    x, lengths, labels = batch
    with torch.autocast("cuda", dtype=dtype):
        with record_backends() as ran:
            hidden = model.encoder(x)
            loss = model.head.compute_loss(hidden, lengths, labels)
    assert ran == ["triton"]
    assert hidden.dtype == dtype
    expected = model.head.compute_loss(hidden.detach().float(), lengths, labels)
    assert_near(loss, expected, 1e-6)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())

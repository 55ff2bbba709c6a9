"""The public functions and the head on a CUDA device, against the reference on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flash_semicrf import log_partition, segment_marginals, segment_probabilities, viterbi
from flash_semicrf.compat import semi_crf_streaming_forward
from flash_semicrf.inference.information import entropy
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import segments_to_table
from flash_semicrf.streaming.dispatch import BACKENDS, record_backends
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.cases import gradients_of, with_gradients
from tests.flash_semicrf.streaming.triton.gpu_cases import CONDITIONS, assert_near, draw

pytestmark = [pytest.mark.gpu, *CONDITIONS]

HEAD = pytest.mark.gpu(group="head")
NARROW = pytest.mark.gpu(group="three labels")
MANY_SHORT = pytest.mark.gpu(group="many short, full")
MANY_SHORT_NARROW = pytest.mark.gpu(group="many short")
THREE_LABELS = pytest.mark.gpu(group="three labels, full")


@THREE_LABELS
@pytest.mark.parametrize("by_duration", [False, True])
def test_auto_runs_triton_where_it_can(by_duration):
    problem = random_problem(2, 40, 5, 3, by_duration=by_duration, boundary=True, ends=True)
    problem = problem.to("cuda")
    with record_backends() as ran:
        log_z = log_partition(problem)
        marginals = segment_marginals(problem)
        best = viterbi(problem)
    assert ran == ["triton"] * 3
    expected = BACKENDS["reference"]
    on_cpu = problem.to("cpu")
    assert_near(log_z, expected.log_partition(on_cpu), 1e-9)
    assert_near(best.scores, expected.viterbi(on_cpu)[0], 1e-9)
    for actual, marginal in zip(marginals, segment_marginals(on_cpu, "reference"), strict=True):
        assert_near(actual, marginal, 1e-9)


@THREE_LABELS
@pytest.mark.parametrize("by_duration", [False, True])
def test_posterior_quantities_run_on_triton(by_duration):
    problem = random_problem(2, 40, 5, 3, by_duration=by_duration, boundary=True, ends=True)
    found = {}
    for device in ("cuda", "cpu"):
        leaves = with_gradients(problem.to(device))
        with record_backends() as ran:
            value = entropy(leaves)
            gradients = gradients_of(value.sum(), leaves)
            table = sample_table(problem.to(device), 3, 0)
            one = table._replace(sequence=table.sequence % 2)
            probabilities = segment_probabilities(problem.to(device), one)
        assert set(ran) == {"triton" if device == "cuda" else "numba"}
        found[device] = [value.detach(), *gradients.values(), *table, probabilities]
    for actual, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert actual.device.type == "cuda"
        assert_near(actual, expected, 1e-9)


@NARROW
def test_use_triton_false_runs_the_reference():
    problem = random_problem(2, 40, 5, 3, dtype=torch.float32).to("cuda")
    cum_scores = nn.functional.pad(problem.scores.cumsum(1), (0, 0, 1, 0))
    arguments = (cum_scores, problem.transition, problem.duration_bias, problem.lengths, 5)
    head = SemiMarkovCRFHead(num_classes=3, max_duration=5).cuda()
    with record_backends() as ran:
        log_z = semi_crf_streaming_forward(*arguments, use_triton=False)
        partition = head(problem.scores, problem.lengths, use_triton=False)["partition"]
    assert ran == ["reference"] * 2
    assert_near(log_z, semi_crf_streaming_forward(*arguments), 1e-6)
    assert_near(partition, head(problem.scores, problem.lengths)["partition"], 1e-6)


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


@MANY_SHORT_NARROW
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
    steps = torch.randint(1, 4, (8, 20), device="cuda")  # neighbours differ: segments are short
    labels = (steps.cumsum(1) % 4).repeat_interleave(5, 1)
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
    assert float(model(*batch).detach()) < 0.5 * float(first[0])
    with record_backends() as ran:
        result = model.head.decode_with_traceback(model.encoder(x), lengths)
    assert ran == ["triton"]
    table = segments_to_table(result.segments)
    right = sum(
        int((labels[b, start:stop] == label).sum())
        for b, start, stop, label in zip(*(column.tolist() for column in table), strict=True)
    )
    assert right > 0.9 * int(lengths.sum())


# The compiler warns of much that is not ours: TF32, deprecations, functions it does not trace.
@HEAD
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_of_a_model_with_the_head(batch, mode):
    model = Tagger().cuda()
    expected = loss_and_gradients(model, batch)
    actual = loss_and_gradients(torch.compile(model, fullgraph=True, mode=mode), batch)
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

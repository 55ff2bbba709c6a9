"""Calls that do not wait for the device, and what bad values do in them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.flags import flag_values
from flash_semicrf.problem.potentials import Potentials
from tests.flash_semicrf.cases import with_gradients
from tests.flash_semicrf.flag_cases import (
    assert_all_is_nan,
    assert_bad_sequence_is_nan,
    assert_padding_is_ignored,
    with_bad_value,
    with_length,
)
from tests.flash_semicrf.streaming.triton.gpu_cases import CONDITIONS, draw, marked

pytestmark = [
    pytest.mark.gpu,
    *CONDITIONS,
    # PyTorch says once that the mode in which waiting is an error is a prototype.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

HEAD = pytest.mark.gpu(group="head")
FULL = pytest.mark.gpu(group="many short, full")
KINDS = marked(
    "usual", "many short, full", "three labels, full", "long segments, full",
    "by duration", "by duration, full", "by duration, tail", "three labels, tail", "usual, tail",
)  # fmt: skip


@contextlib.contextmanager
def without_waiting(mode: str = "error") -> Iterator[None]:
    """Context in which a read from the device is an error."""
    torch.cuda.synchronize()
    # Buffers that tests poison are no part of what is tested.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def log_partition_and_gradients(problem: Potentials) -> None:
    """Log Z of a problem with all of its gradients, and without."""
    log_partition(with_gradients(problem)).sum().backward()
    with torch.no_grad():
        log_partition(problem)


@pytest.mark.parametrize("setting", KINDS)
def test_log_partition_and_its_gradients_do_not_wait(setting):
    problem = draw(setting).to("cuda")
    log_partition_and_gradients(problem)  # compiles
    log_partition_and_gradients(problem)  # with the kernel of the flags, too
    with without_waiting():
        log_partition_and_gradients(problem)


@FULL
def test_the_first_call_after_compilation_does_not_wait_either(monkeypatch):
    from flash_semicrf.streaming.triton import jit

    problem = draw("many short, full").to("cuda")
    log_partition_and_gradients(problem)
    # As if the kernel of the flags were not compiled: plain PyTorch takes its place.
    monkeypatch.setattr(jit, "launched_if_compiled", lambda call: None)
    with without_waiting():
        log_partition_and_gradients(problem)


@pytest.mark.gpu(group="many short")
def test_half_precision_and_lengths_on_the_cpu_do_not_wait():
    problem = draw("many short").to("cuda")
    problem = problem.replace(scores=problem.scores.half(), lengths=problem.lengths.cpu())
    log_partition_and_gradients(problem)
    log_partition_and_gradients(problem)
    with without_waiting():
        log_partition_and_gradients(problem)


@FULL
def test_flags_by_plain_pytorch_do_not_wait():
    problem = draw("many short, full").to("cuda")
    with without_waiting():
        flag_values(problem)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("setting", KINDS)
def test_marginals_do_not_wait(setting, counts):
    problem = draw(setting).to("cuda")
    for _ in range(2):
        segment_marginals(problem, counts=counts)
    with without_waiting():
        segment_marginals(problem, counts=counts)


@pytest.mark.parametrize("setting", KINDS)
def test_decoding_waits_once_for_the_number_of_segments(setting):
    problem = draw(setting, forbid=0.0).to("cuda")
    for _ in range(2):
        expected = viterbi_table(problem)
    with warnings.catch_warnings(record=True) as caught, without_waiting("warn"):
        warnings.simplefilter("always")
        found = viterbi_table(problem)
    waited = [w for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waited) == 1
    assert torch.equal(found[0], expected[0])
    assert type(found[1]) is type(expected[1])
    assert all(torch.equal(x, y) for x, y in zip(found[1], expected[1], strict=True))


@HEAD
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_dim": 6, "boundary_scores": True, "initial_scores": True, "min_duration": 2},
        {"centering": "sequence", "final_scores": True},
        {"duration_tail": "geometric", "duration_distribution": "geometric"},
        {"transition_constraints": [[True] * 4] * 3 + [[True, True, True, False]]},
    ],
    ids=str,
)
def test_loss_of_the_head_does_not_wait(options):
    head = SemiMarkovCRFHead(4, 12, **options).cuda()
    hidden = torch.randn(8, 100, options.get("hidden_dim", 4), device="cuda", requires_grad=True)
    steps = torch.randint(1, 4, (8, 20), device="cuda")
    labels = (steps.cumsum(1) % 4).repeat_interleave(5, 1)
    lengths = torch.randint(1, 21, (8,), device="cuda") * 5
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = head.compute_loss(hidden, lengths, labels)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):
        step()
    with without_waiting():
        loss = step()
        head(hidden, lengths)
    assert bool(loss.isfinite())
    head.validate = "values"
    expected = head.compute_loss(hidden, lengths, labels)
    head.validate = "auto"
    torch.testing.assert_close(head.compute_loss(hidden, lengths, labels), expected)


@HEAD
def test_gradients_of_the_head_repeat_bit_by_bit():
    head = SemiMarkovCRFHead(4, 12, initial_scores=True, final_scores=True).cuda()
    hidden = torch.randn(8, 3000, 4, device="cuda")
    labels = torch.randint(0, 4, (8, 750), device="cuda").repeat_interleave(4, 1)
    lengths = torch.full((8,), 3000, device="cuda")

    def gradients() -> list[torch.Tensor]:
        head.zero_grad()
        head.compute_loss(hidden, lengths, labels).backward()
        return [p.grad.clone() for p in head.parameters()]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(gradients(), first, strict=True))


@HEAD
def test_bad_hidden_states_and_labels_make_the_loss_nan():
    head = SemiMarkovCRFHead(4, 12).cuda()
    hidden = torch.randn(3, 40, 4, device="cuda")
    labels = torch.arange(40, device="cuda").div(5, rounding_mode="floor").remainder(4)
    labels, lengths = labels.repeat(3, 1), torch.tensor([40, 35, 30], device="cuda")
    good = head.compute_loss(hidden, lengths, labels, reduction="none")
    spoilt = hidden.clone()
    spoilt[1, 34, 2] = math.nan
    wrong = labels.clone()
    wrong[1, 3] = 4
    longer = lengths.clone()
    longer[1] = 41
    for batch in ((spoilt, lengths, labels), (hidden, lengths, wrong), (hidden, longer, labels)):
        head.zero_grad()
        loss = head.compute_loss(*batch, reduction="none")
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(loss[[0, 2]], good[[0, 2]])
        assert bool(head.transition.grad.isnan().all())
        head.validate = "values"
        with pytest.raises(ValueError, match=r"index \(?1"):
            head.compute_loss(*batch)
        head.validate = "auto"


@pytest.mark.parametrize("setting", KINDS)
def test_a_bad_score_makes_its_sequence_nan(setting):
    problem = draw(setting, forbid=0.0).to("cuda")
    for value in (math.nan, math.inf):
        assert_bad_sequence_is_nan(problem, with_bad_value(problem, "scores", value), "triton")
    for length in (0, -1, problem.num_positions + 1, 2**40):
        assert_bad_sequence_is_nan(problem, with_length(problem, length), "triton")
    assert_all_is_nan(with_bad_value(problem, "transition", math.nan), "triton")
    assert_padding_is_ignored(problem, "triton")


@FULL
def test_values_are_named_where_they_are_read():
    problem = draw("many short, full").to("cuda")
    spoilt = with_bad_value(problem, "scores", math.nan)
    for entry in (log_partition, viterbi, viterbi_table, segment_marginals):
        with pytest.raises(ValueError, match=r"`scores` must be .*got nan at index \(1, "):
            entry(spoilt, validate="values")
        with pytest.raises(ValueError, match=r"`lengths` must be in .*got 0 at index 1"):
            entry(with_length(problem, 0), validate="values")


@FULL
def test_a_graph_of_log_partition_flags_bad_values():
    problem = draw("many short, full").to("cuda")
    for _ in range(2):
        expected = log_partition(problem)
    static = problem.replace(scores=problem.scores.clone(), lengths=problem.lengths.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_z = log_partition(static)
    spoilt = with_bad_value(problem, "scores", math.nan)
    static.scores.copy_(spoilt.scores)
    graph.replay()
    assert log_z.isnan().nonzero().tolist() == [[1]]
    static.scores.copy_(problem.scores)
    graph.replay()
    assert torch.equal(log_z, expected)

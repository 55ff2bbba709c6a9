"""Gradients are computed where a graph is being made, and nowhere else: backend calls counted."""

from __future__ import annotations

import pytest
import torch

from flash_semicrf import (
    Constraints,
    SemiCRFDistribution,
    UncertaintySemiMarkovCRFHead,
    log_partition,
)
from flash_semicrf.compat import semi_crf_streaming_forward
from flash_semicrf.compat.streaming import SemiCRFStreaming
from flash_semicrf.inference.information import (
    cross_entropy,
    entropy,
    kl_divergence,
    position_entropy,
)
from flash_semicrf.inference.partial import partial_score
from flash_semicrf.problem.potentials import NAMES
from flash_semicrf.problem.segments import labels_to_table
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import with_gradients

PROBLEM = random_problem(ragged=False)
P, Q = with_gradients(PROBLEM), with_gradients(random_problem(seed=1, ragged=False))
B, T, C = PROBLEM.scores.shape
K = PROBLEM.max_duration
LENGTHS = PROBLEM.lengths
LABELS = torch.arange(T).remainder(C).expand(B, T)
TABLE = labels_to_table(LABELS, LENGTHS, K)
PARTIAL = LABELS.clone().index_fill_(1, torch.tensor([1]), -100)


def head() -> UncertaintySemiMarkovCRFHead:
    return UncertaintySemiMarkovCRFHead(C, K).double()


def cumulative() -> torch.Tensor:
    sums = torch.nn.functional.pad(P.scores.cumsum(1), (0, 0, 1, 0))
    return semi_crf_streaming_forward(sums, P.transition, P.duration_bias, LENGTHS, K)


# name: (call, backend calls without a graph, backend calls with one)
Z, GRADIENTS, TANGENTS = "log_partition", "gradients", "tangents"
CALLS = {
    "log_partition": (lambda: log_partition(P), [Z], [GRADIENTS]),
    "constrained": (
        lambda: log_partition(P, constraints=Constraints(boundaries=[[2]] * B)),
        [Z],
        [GRADIENTS],
    ),
    "cumulative scores": (cumulative, [Z], [GRADIENTS]),
    "autograd function": (
        lambda: SemiCRFStreaming.apply("auto", LENGTHS, *map(P.parameters().get, NAMES)),
        [Z],
        [GRADIENTS],
    ),
    "head": (lambda: head()(PROBLEM.scores, LENGTHS)["partition"], [Z], [GRADIENTS]),
    "loss": (lambda: head().compute_loss(PROBLEM.scores, LENGTHS, LABELS), [Z], [GRADIENTS]),
    "partial loss": (
        lambda: head().compute_loss(PROBLEM.scores, LENGTHS, PARTIAL, ignore_index=-100),
        [Z, Z],
        [GRADIENTS, GRADIENTS],
    ),
    "partial score": (lambda: partial_score(P, PARTIAL, -100), [Z], [GRADIENTS]),
    "log_prob": (lambda: SemiCRFDistribution(P).log_prob(TABLE), [Z], [GRADIENTS]),
    "entropy": (lambda: entropy(P), [GRADIENTS], [TANGENTS]),
    "entropy of the head": (
        lambda: head().compute_entropy_streaming(PROBLEM.scores, LENGTHS),
        [GRADIENTS],
        [TANGENTS],
    ),
    "cross-entropy": (lambda: cross_entropy(P, Q), [Z, GRADIENTS], [GRADIENTS, GRADIENTS]),
    "divergence": (lambda: kl_divergence(P, Q), [Z, GRADIENTS], [GRADIENTS, GRADIENTS]),
    "position entropy": (lambda: position_entropy(P), [GRADIENTS], [GRADIENTS]),
    "weighted loss": (
        lambda: head().compute_loss_uncertainty_weighted(PROBLEM.scores, LENGTHS, LABELS),
        [Z, GRADIENTS],
        [GRADIENTS, GRADIENTS],
    ),
    "log-weights of boundaries": (
        lambda: head().compute_boundary_marginals(PROBLEM.scores, LENGTHS, normalize=False),
        [GRADIENTS, Z],
        [GRADIENTS, Z],
    ),
    "mode": (lambda: SemiCRFDistribution(P).mode.scores, ["viterbi", Z], ["viterbi", Z]),
    "topk": (
        lambda: SemiCRFDistribution(P).topk(2).scores,
        ["max_messages", Z],
        ["max_messages", Z],
    ),
}
CONSTANT = ("log-weights of boundaries", "mode", "topk")


class Recorder:
    """The numba backend, with a list of the methods called."""

    name = "numba"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, method: str):
        found = getattr(NUMBA, method)
        if method != "why_not":
            self.calls.append(method)
        return found


NUMBA = BACKENDS["numba"]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Record what the CPU backend is called for."""
    recorder = Recorder()
    monkeypatch.setitem(BACKENDS, "numba", recorder)
    return recorder


@pytest.mark.parametrize("name", CALLS)
def test_no_gradient_is_computed_where_none_is_made(recorder, name):
    call, without, wanted = CALLS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        value = call()
    assert recorder.calls == without and not value.requires_grad

    recorder.calls.clear()
    torch.manual_seed(0)
    with torch.inference_mode():
        same = call()
    assert recorder.calls == without
    assert_close(same.clone(), value)

    recorder.calls.clear()
    torch.manual_seed(0)
    graph = call()
    assert recorder.calls == wanted and graph.requires_grad == (name not in CONSTANT)
    assert_close(graph.detach(), value)


def test_log_z_known_without_a_graph_is_computed_again_for_one(recorder):
    distribution = SemiCRFDistribution(P)
    with torch.no_grad():
        distribution.log_prob(TABLE)
        distribution.log_prob(TABLE)
    distribution.mode  # noqa: B018 - it needs log Z, and no gradient
    assert recorder.calls == [Z, "viterbi"]
    (slope,) = torch.autograd.grad(distribution.log_prob(TABLE).sum(), P.scores)
    assert recorder.calls == [Z, "viterbi", GRADIENTS]
    (expected,) = torch.autograd.grad(SemiCRFDistribution(P).log_prob(TABLE).sum(), P.scores)
    assert_close(slope, expected)

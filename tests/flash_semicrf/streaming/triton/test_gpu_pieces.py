"""Long sequences in pieces on a CUDA device, against the sequential kernels there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import draw
from flash_semicrf import log_partition
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.triton.backend import TritonBackend
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.streaming.triton.gpu_cases import CONDITIONS, assert_near
from tests.flash_semicrf.streaming.triton.only_pieces import OnlyPieces

pytestmark = [pytest.mark.gpu, *CONDITIONS]

THREE_LABELS = pytest.mark.gpu(group="three labels, full")
WANTED = {"scores", "start_scores", "end_scores", "transition", "duration_bias"}


def long_problem(**options) -> Potentials:
    p = random_problem(3, 30_000, 30, 3, device="cuda", **options)
    return p.replace(lengths=torch.tensor([30_000, 100, 17_777], device="cuda"))


@THREE_LABELS
@pytest.mark.parametrize("ends", [False, True])
def test_results_are_those_of_the_whole(ends):
    p = long_problem(boundary=ends, ends=ends, forbid=0.01 * ends)
    plain, backend = TritonBackend(), InPieces(OnlyPieces())
    log_z, gradients = plain.gradients(p, WANTED)
    assert_near(backend.log_partition(p), log_z, 1e-9)
    found, others = backend.gradients(p, WANTED)
    assert_near(found, log_z, 1e-9)
    for name in WANTED:
        assert_near(others[name], gradients[name], 1e-7)
    again = backend.gradients(p, WANTED)[1]
    for name in WANTED:
        assert torch.equal(again[name], others[name])
    best, table = backend.viterbi(p)
    assert_near(best, plain.viterbi(p)[0], 1e-9)
    assert_near(score_segments(p, table), best, 1e-9)


@THREE_LABELS
@pytest.mark.parametrize("model", ["weak", "no evidence", "least durations", "counter"])
def test_models_that_forget_slowly_or_never(model):
    p = draw(model, [30_000, 25_000], 30, 3).to("cuda")
    plain, backend = TritonBackend(), InPieces(TritonBackend())
    log_z, gradients = plain.gradients(p, WANTED)
    found, others = backend.gradients(p, WANTED)
    assert_near(found, log_z, 1e-9)
    for name in WANTED:
        assert_near(others[name], gradients[name], 1e-7)
    assert_near(backend.viterbi(p)[0], plain.viterbi(p)[0], 1e-9)


@THREE_LABELS
@pytest.mark.parametrize("by_duration", [False, True])
def test_messages_and_samples_are_those_of_the_whole(by_duration):
    p = long_problem(by_duration=by_duration)
    plain, backend = TritonBackend(), InPieces(OnlyPieces())
    found, expected = backend.messages(p), plain.messages(p)
    assert_near(found[0], expected[0], 1e-9)
    for x, y in [*zip(found[1:], expected[1:], strict=True)]:
        for b, length in enumerate(p.lengths.tolist()):
            assert_near(x[b, 1 : length + 1], y[b, 1 : length + 1], 1e-9)
    best, expected_best = backend.max_messages(p), plain.max_messages(p)
    assert_near(best[0], expected_best[0], 1e-9)
    for x, y in zip(backend.sample(p, 3, 7), plain.sample(p, 3, 7), strict=True):
        assert torch.equal(x, y)


@THREE_LABELS
def test_results_by_duration():
    p = long_problem(by_duration=True, boundary=True, ends=True)
    plain, backend = TritonBackend(), InPieces(OnlyPieces())
    log_z, gradients = plain.gradients(p, WANTED)
    assert_near(backend.log_partition(p), log_z, 1e-9)
    found, others = backend.gradients(p, WANTED)
    assert_near(found, log_z, 1e-9)
    for name in WANTED:
        assert_near(others[name], gradients[name], 1e-7)
    best, table = backend.viterbi(p)
    assert_near(best, plain.viterbi(p)[0], 1e-9)
    assert_near(score_segments(p, table), best, 1e-9)


@THREE_LABELS
def test_public_functions_cut():
    p = long_problem()
    leaf = p.scores.clone().requires_grad_()
    log_z = log_partition(p.replace(scores=leaf))
    log_z.sum().backward()
    plain = TritonBackend()
    expected, gradients = plain.gradients(p, {"scores"})
    assert_near(log_z, expected, 1e-9)
    assert_near(leaf.grad, gradients["scores"], 1e-7)
    best, table = viterbi_table(p)
    assert_near(score_segments(p, table), best, 1e-9)


@THREE_LABELS
def test_a_captured_call_is_not_cut():
    p = long_problem()
    expected = log_partition(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_z = log_partition(p)
    graph.replay()
    assert_near(log_z, expected, 1e-9)

"""Pieces of long sequences, eight at once, against the kernels for one sequence and the loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.forgetting import MODELS, draw
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.streaming.cpu.backend import NumbaBackend
from flash_semicrf.streaming.cpu.lanes import batch as lanes
from flash_semicrf.streaming.cpu.static import batch as static
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.streaming.pieces.backend import InPieces
from flash_semicrf.streaming.pieces.plan import Slots
from flash_semicrf.testing import assert_close, random_problem

WANTED = {
    "scores",
    "transition",
    "duration_bias",
    "start_scores",
    "end_scores",
    "initial_scores",
    "final_scores",
}


class Others:
    """The kernels for one sequence, and how many pieces they were handed."""

    def __init__(self) -> None:
        self.number = 0

    def log_partition(self, problem, core):
        self.number += problem.batch_size
        return static._log_partition_of_pieces(problem, core)

    def gradients(self, problem, wanted, core):
        self.number += problem.batch_size
        return static._gradients_of_pieces(problem, wanted, core)


def cores(lengths: torch.Tensor) -> torch.Tensor:
    """Bounds at multiples of eight, or the ends of their sequences."""
    bounds = [
        (n // 3 // 8 * 8, n if b % 2 or n < 24 else 2 * n // 3 // 8 * 8)
        for b, n in enumerate(lengths.tolist())
    ]
    bounds[0] = (0, bounds[0][1])
    return torch.tensor(bounds)


def assert_agrees_with_single_sequences(problem: Potentials, handed_on: int = 0) -> None:
    core, others = cores(problem.lengths), Others()
    log_z, found, windows = lanes.gradients_of_pieces(problem, WANTED, core, others.gradients)
    assert others.number == handed_on
    expected = static._gradients_of_pieces(problem, WANTED, core)
    assert_close(log_z, expected[0])
    for name in WANTED:
        assert_close(found[name].to(problem.dtype), expected[1][name].to(problem.dtype))
    assert_close(windows.alpha, expected[2].alpha)
    assert_close(windows.beta, expected[2].beta)
    log_z, windows = lanes.log_partition_of_pieces(problem, core, others.log_partition)
    assert_close(log_z, expected[0])
    assert_close(windows.alpha, expected[2].alpha)
    assert windows.beta is None and others.number == 2 * handed_on


@pytest.mark.kernels
@pytest.mark.parametrize("num_labels", [1, 3, 8, 13])
@pytest.mark.parametrize("max_duration", [1, 2, 9, 70])
@pytest.mark.parametrize("boundary", [False, True])
def test_agrees_with_single_sequences(num_labels, max_duration, boundary):
    assert_agrees_with_single_sequences(
        random_problem(11, 190, max_duration, num_labels, boundary=boundary, ends=boundary)
    )


def test_sources_that_no_longer_fit_are_dropped():
    # More positions than the workspace has rows of sources.
    assert_agrees_with_single_sequences(random_problem(3, 900, 5, 2, boundary=True, seed=1))


@pytest.mark.parametrize("forbid", [0.02, 0.3])
def test_forbidden_parts(forbid):
    problem = random_problem(9, 150, 12, 4, boundary=True, forbid=forbid, seed=2)
    problem.scores[:, 60:70, 1] = -math.inf
    assert_agrees_with_single_sequences(problem)


def test_float32_and_padding():
    problem = random_problem(9, 120, 6, 5, dtype=torch.float32, seed=3)
    for b, length in enumerate(problem.lengths.tolist()):
        problem.scores[b, length:] = math.nan
    assert_agrees_with_single_sequences(problem)


def test_frames_that_leave_their_range_within_a_block():
    # A label loses 12 nats to another at each position, and wins them back.
    problem = random_problem(9, 160, 7, 3, ragged=False, seed=4)
    slope = 12.0 * torch.where(torch.arange(160) // 40 % 2 == 0, 1.0, -1.0)[:, None]
    scores = problem.scores + slope * torch.tensor([1.0, 0.0, 0.5])
    assert_agrees_with_single_sequences(problem.replace(scores=scores))


def test_pieces_out_of_range_are_handed_on():
    problem = random_problem(9, 120, 6, 3, ragged=False, boundary=True, seed=5)
    problem.scores[[2, 5], 17, 1] = 150.0
    assert_agrees_with_single_sequences(problem, handed_on=2)


@pytest.mark.parametrize("part", ["transition", "duration_bias"])
def test_problems_that_the_kernel_does_not_take(part):
    problem = random_problem(3, 60, 5, 3, seed=6)
    problem = problem.replace(**{part: 150.0 * getattr(problem, part)})
    core = cores(problem.lengths)
    assert not static.in_lanes(problem)
    assert lanes.log_partition_of_pieces(problem, core, None) is None
    assert lanes.gradients_of_pieces(problem, WANTED, core, None) is None
    (log_z, windows), expected = (
        run(problem, core)
        for run in (static.log_partition_of_pieces, static._log_partition_of_pieces)
    )
    assert_close(log_z, expected[0])
    assert_close(windows.alpha, expected[1].alpha)


def test_unwritten_memory_is_not_read(monkeypatch):
    problem = random_problem(9, 140, 6, 3, boundary=True, forbid=0.05, seed=7)
    core = cores(problem.lengths)
    expected = lanes.gradients_of_pieces(problem, WANTED, core, None)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))
    log_z, found, windows = lanes.gradients_of_pieces(problem, WANTED, core, None)
    assert torch.equal(log_z, expected[0]) and torch.equal(windows.alpha, expected[2].alpha)
    assert all(torch.equal(found[name], expected[1][name]) for name in WANTED)


class Watched(NumbaBackend):
    """The CPU backend, and the number of pieces of each attempt."""

    def __init__(self) -> None:
        self.pieces: list[int] = []

    def gradients_of_pieces(self, potentials, wanted, core, span):
        self.pieces.append(potentials.batch_size)
        return super().gradients_of_pieces(potentials, wanted, core, span)


@pytest.mark.kernels
@pytest.mark.parametrize("model", sorted(MODELS))
def test_models_against_the_loop(model):
    p = draw(model, [1600, 90], 6, 3)
    watched = Watched()
    backend = InPieces(watched, Slots(64, 0, patient=False, together=8))
    wanted = WANTED - {"final_scores"}
    log_z, found = backend.gradients(p, wanted)
    pieces = -(-1600 // backend.cuts(p, 2)[0].length)
    assert watched.pieces[0] == pieces + 1 and pieces >= 4
    expected_log_z, expected = choose("reference", p).gradients(p, wanted)
    torch.testing.assert_close(log_z, expected_log_z, rtol=1e-12, atol=1e-9)
    sums = backend.log_partition(p)
    torch.testing.assert_close(sums, expected_log_z, rtol=1e-12, atol=1e-9)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


def test_pieces_are_those_of_the_lanes():
    p = draw("random", [9000, 300], 6, 3)
    watched = Watched()
    log_z, found = InPieces(watched).gradients(p, WANTED)
    (pieces,) = watched.pieces
    assert pieces >= 9
    expected_log_z, expected = NumbaBackend().gradients(p, WANTED)
    torch.testing.assert_close(log_z, expected_log_z, rtol=1e-12, atol=1e-9)
    for name in WANTED:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


def test_threads_change_nothing(monkeypatch):
    p = draw("random", [9000, 4000], 6, 3)
    results = []
    for number in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        backend = InPieces(NumbaBackend())
        assert backend.cuts(p, 2) and backend.cuts(p, 1)
        results.append((backend.log_partition(p), *backend.gradients(p, WANTED)))
    for sums, log_z, found in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(log_z, results[0][1])
        assert all(torch.equal(found[name], results[0][2][name]) for name in WANTED)

"""Scores of labels per position, against those of their table of segments."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_semicrf.problem.gold import score_labels
from flash_semicrf.problem.potentials import Potentials, score_segments
from flash_semicrf.problem.segments import labels_to_table
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import gradients_of, with_gradients

OPTIONS = [dict(zip(("boundary", "ends", "tail"), x, strict=True)) for x in
           itertools.product([False, True], repeat=3)]  # fmt: skip


def by_table(problem: Potentials, labels: torch.Tensor) -> torch.Tensor:
    """The same by a table of segments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runs that are split
        table = labels_to_table(
            labels, problem.lengths, problem.max_duration, unlimited=problem.unlimited
        )
    return score_segments(problem, table)


def runs(batch_size: int, num_positions: int, num_labels: int, longest: int) -> torch.Tensor:
    """Random labels in runs, the last position of each row repeated."""
    rows = []
    for _ in range(batch_size):
        lengths = torch.randint(1, longest + 1, (num_positions,))
        labels = torch.randint(0, num_labels, (num_positions,)).repeat_interleave(lengths)
        rows.append(labels[:num_positions])
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("durations", "longest"), [(1, 3), (3, 11), (5, 2), (40, 40)])
def test_score_and_gradients_are_those_of_the_table(options, durations, longest):
    problem = random_problem(4, 23, durations, 3, seed=2, **options)
    labels = runs(4, 23, 3, longest)
    found, expected = with_gradients(problem), with_gradients(problem)
    score, forbidden, wrong = score_labels(found, labels)
    wanted = by_table(expected, labels)
    assert not forbidden.any() and not wrong.any()
    assert_close(score.detach(), wanted.detach())
    weight = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    by_rows = gradients_of(wanted @ weight, expected)
    for name, gradient in gradients_of(score @ weight, found).items():
        assert_close(gradient, by_rows[name])


@pytest.mark.parametrize("durations", [1, 2, 3, 7])
def test_long_runs_are_split_as_in_the_table(durations):
    for length in range(1, 24):
        bias = torch.randn(durations, 2, dtype=torch.float64)
        zeros = torch.zeros(1, length, 2, dtype=torch.float64)
        problem = Potentials(
            zeros, torch.randn(2, 2).double(), bias, torch.tensor([length]), start_scores=zeros
        )
        labels = torch.zeros(1, length, dtype=torch.int32)
        assert_close(score_labels(problem, labels).score, by_table(problem, labels))


def test_what_is_wrong_and_what_is_forbidden_is_flagged():
    problem = random_problem(5, 9, 3, 2, ragged=False, boundary=True, ends=True)
    transition = problem.transition.clone()
    transition[1, 0] = -1e38
    problem = problem.replace(transition=transition, lengths=torch.tensor([9, 0, 9, 9, 8]))
    labels = torch.zeros(5, 9, dtype=torch.int64)
    labels[2, 8] = 2
    labels[3, :4] = 1  # and label 0 after it
    labels[4, 8] = -100  # padding
    leaves = with_gradients(problem)
    score, forbidden, wrong = score_labels(leaves, labels)
    assert wrong.tolist() == [False, True, True, False, False]
    assert forbidden.tolist() == [False, False, False, True, False]
    right = problem.replace(lengths=problem.lengths.clamp(min=1))
    expected = by_table(right, labels.clamp(0, 1))
    assert_close(score.detach()[[0, 4]], expected[[0, 4]])
    gradients = gradients_of(score[[0, 4]].sum(), leaves)
    assert all(bool(value.isfinite().all()) for value in gradients.values())
    # Each of the others has a run longer than 3.
    assert score_labels(problem, labels, "error").wrong.all()


class Counted(TorchDispatchMode):
    """Number of operations of PyTorch that are called."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_scores_take_few_operations():
    """On a GPU each operation takes the host as long as all the arithmetic takes the device."""
    problem = with_gradients(random_problem(4, 23, 5, 3, dtype=torch.float32))
    labels = runs(4, 23, 3, 11)
    with Counted() as forward:
        score = score_labels(problem, labels).score
    with Counted() as backward:
        score.sum().backward()
    assert 0 < forward.number <= 90 and 0 < backward.number <= 40

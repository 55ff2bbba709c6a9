"""Duration tails in the kernels for static transitions, in Triton's interpreter.

Run by `test_interpreter.py`, as `interpreted.py` is, in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import viterbi
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.unroll import fold_durations, unrolled
from flash_semicrf.testing import assert_close
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
    Case(4, 6, 2),
    Case(18, 6, 1, False, True),
    Case(13, 1, 5, True, True, 0.05, batch=2),
    Case(18, 9, 3, True, False, 0.05, 100.0),
    Case(6, 2, 17, False, False, 0.1, dtype=torch.float32),
]
"""A source leaves the window, with all of its block of 8, within two blocks more than K."""


def draw(case: Case, **options) -> Potentials:
    return case._replace(tail=True).problem(**options)


def long_segments(case: Case, **options) -> Potentials:
    """A problem whose segments are few and long: transitions are dear."""
    problem = draw(case, **options)
    return problem.replace(transition=problem.transition - 5.0)


def assert_agrees_with_reference(problem: Potentials, **options) -> None:
    """Log Z and every gradient of every sequence; options as `static.gradients`."""
    from flash_semicrf.streaming.triton import static

    wanted = {*problem.parameters(), "start_scores", "end_scores"}
    expected_log_z, expected = REFERENCE.gradients(problem.to(torch.float64), wanted)
    with torch.no_grad():
        log_z, found = static.gradients(with_poisoned_padding(problem), wanted, **options)
    assert_close(log_z, expected_log_z)
    assert found.keys() == wanted
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert value.dtype == (problem.dtype if name in BY_POSITION else torch.float64)
        assert_close(value, expected[name], problem.dtype)


def assert_same_segments(problem: Potentials) -> None:
    actual, expected = viterbi(problem, "triton"), viterbi(problem, "reference")
    assert torch.equal(actual.scores, expected.scores)
    assert actual.segments == expected.segments


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of four steps, of which less is kept: what runs in the log domain takes long."""
    use_layout(monkeypatch, rows=4)


def with_mask(mask: float) -> Potentials:
    """Masks inside the long segments of a problem with a tail of each kind."""
    problem = long_segments(Case(16, 3, 3, True, scale=2.0))
    scores = problem.scores.clone()
    scores[0, 1, 2] = scores[0, 10, 1:] = mask
    scores[0, 5:7, 0] = scores[0, 13:15, 2] = mask
    tail = torch.tensor([-0.1, 0.5, -math.inf], dtype=torch.float64)
    return problem.replace(scores=scores, duration_tail=tail)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(draw(case))


def test_gradients_are_those_of_all_durations_written_out():
    problem = long_segments(Case(20, 3, 2))
    log_z, found = TRITON.gradients(problem, {"duration_bias", "duration_tail"})
    expected_log_z, expected = REFERENCE.gradients(unrolled(problem), {"duration_bias"})
    beyond, by_row = fold_durations(expected["duration_bias"], 3)
    assert_close(log_z, expected_log_z)
    assert_close(found["duration_bias"], by_row)
    assert_close(found["duration_tail"], beyond)
    assert float(beyond.sum()) > 1.0


def test_groups_of_warps_agree_with_reference(monkeypatch):
    use_layout(monkeypatch, rows=4, groups=4)
    problem = long_segments(Case(20, 5, 3, boundary=True), integers=True, scale=0.7)
    assert_agrees_with_reference(problem)
    assert_same_segments(problem)


def test_long_windows_in_parts_agree_with_reference(monkeypatch):
    from flash_semicrf.streaming.triton.static import plan

    # Parts of two blocks of four steps, where 128 are too long for the interpreter.
    monkeypatch.setattr(plan, "PART", 8)
    monkeypatch.setattr(plan, "_LONG_WINDOW", 3)
    use_layout(monkeypatch, rows=4)
    problem = long_segments(Case(24, 13, 2, True, True), integers=True, scale=0.7)
    assert_agrees_with_reference(problem)
    assert_same_segments(problem)
    assert max(s.duration for s in viterbi(problem, "triton").segments[0]) > 13


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("mask", [-1e9, -1e30])
def test_masks_inside_long_segments(mask):
    masked, forbidden = with_mask(mask), with_mask(-math.inf)
    wanted = {*masked.parameters(), "start_scores", "end_scores"}
    expected_log_z, expected = REFERENCE.gradients(forbidden, wanted)
    log_z, found = TRITON.gradients(with_poisoned_padding(masked), wanted)
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        assert_close(value, expected[name])
    actual, best = viterbi(masked, "triton"), viterbi(forbidden, "reference")
    assert_close(actual.scores, best.scores)
    for one, other in zip(actual.segments[0], best.segments[0], strict=True):
        assert (one.start, one.end, one.label) == (other.start, other.end, other.label)


@pytest.mark.usefixtures("short_blocks")
def test_masks_that_cannot_be_avoided_keep_their_score():
    problem = draw(Case(15, 2, 2))
    scores = problem.scores.clone()
    scores[0, 9:11, 1] -= 3e4  # below label 0, which is forbidden there: the path is 0, then 1
    inf = torch.tensor(-math.inf, dtype=torch.float64)
    edges = torch.stack([torch.zeros_like(inf), inf])
    problem = problem.replace(
        scores=scores,
        transition=torch.stack([inf, torch.zeros_like(inf), inf, inf]).view(2, 2),
        initial_scores=edges,
        final_scores=edges.flip(0),
        duration_tail=torch.tensor([-math.inf, -0.3], dtype=torch.float64),
    )
    assert_agrees_with_reference(problem)
    assert_close(viterbi(problem, "triton").scores, viterbi(problem, "reference").scores)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("tail", [(30.0, -400.0), (-math.inf, -math.inf)])
def test_steep_tails(tail):
    problem = draw(Case(14, 3, 2, True))
    tail = torch.tensor(tail, dtype=torch.float64)
    assert_agrees_with_reference(problem.replace(duration_tail=tail))


def test_one_segment_may_fill_a_long_sequence():
    problem = draw(Case(160, 4, 2, scale=3.0))
    tail = torch.tensor([0.0, -0.1], dtype=torch.float64)
    problem = problem.replace(transition=problem.transition - 100.0, duration_tail=tail)
    assert_close(TRITON.log_partition(problem), REFERENCE.log_partition(problem))


def test_infeasible_sequences_have_no_gradient():
    problem = draw(Case(8, 2, 2, batch=2), seed=1)
    scores = problem.scores.clone()
    scores[0, 0] = -math.inf
    log_z, found = TRITON.gradients(problem.replace(scores=scores), set(problem.parameters()))
    assert log_z[0] == -math.inf < log_z[1]
    for value in found.values():
        assert bool((value[0] == 0).all()) and bool(value.isfinite().all())


@pytest.mark.parametrize("case", [c for c in CASES if c.scale == 1.0], ids=str)
def test_viterbi_is_that_of_the_reference(case):
    # Whole numbers add without rounding, so equal scores are equal in every order of addition.
    assert_same_segments(long_segments(case, integers=True, scale=0.7).to(torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_viterbi_breaks_ties_as_the_reference(seed):
    problem = draw(Case(24, 2, 2), integers=True, scale=0.7, seed=seed)
    assert_same_segments(problem.replace(transition=problem.transition - 1.0))


def test_max_messages_agree():
    problem = long_segments(Case(19, 4, 3, True, True, 0.1, 3.0, 2))
    actual, expected = TRITON.max_messages(problem), REFERENCE.max_messages(problem)
    inside = torch.arange(problem.num_positions + 1) <= problem.lengths[:, None]
    assert_close(actual[inside], expected[inside])

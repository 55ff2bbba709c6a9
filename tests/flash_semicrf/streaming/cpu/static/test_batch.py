"""The numba kernels for static transitions against the reference loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.problem.potentials import Potentials, initial_term
from flash_semicrf.streaming import reference
from flash_semicrf.streaming.cpu.lanes import batch as short
from flash_semicrf.streaming.cpu.parameters import CERTAIN
from flash_semicrf.streaming.cpu.static import batch as static
from flash_semicrf.streaming.cpu.static.gradient import CHUNK
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import (
    BACKENDS,
    LONG_CASES,
    LONG_SHAPES,
    gradients_of,
    long,
    thinned,
    thinned_pairs,
    with_gradients,
)

EVERYTHING = {
    "scores",
    "transition",
    "duration_bias",
    "start_scores",
    "end_scores",
    "initial_scores",
    "final_scores",
}
OVERFLOW = 600.0
"""Both factors of a product of exponentials cannot be kept below e^300 beyond this."""


@pytest.fixture(autouse=True, scope="module")
def no_short_sequences():
    """Short sequences, too, are done by the kernels that these tests are of."""
    before, short._POSITIONS = short._POSITIONS, 0
    yield
    short._POSITIONS = before


def assert_agrees_with_reference(problem: Potentials) -> None:
    """Log Z and the gradient by every parameter, each sequence weighted by its own number."""
    found = {}
    for backend in ("numba", "reference"):
        leaves = with_gradients(problem)
        log_z = log_partition(leaves, backend)
        weight = torch.linspace(0.5, 2.0, len(log_z), dtype=torch.float64)
        feasible = log_z > -math.inf
        total = torch.where(feasible, log_z, 0.0) @ weight
        found[backend] = log_z.detach(), gradients_of(total, leaves)
    assert_close(found["numba"][0], found["reference"][0])
    for name, gradient in found["numba"][1].items():
        assert_close(gradient, found["reference"][1][name])


@pytest.mark.kernels
@pytest.mark.parametrize("case", thinned(LONG_CASES, 3), ids=str)
def test_agrees_with_reference(case):
    assert_agrees_with_reference(case.problem(LONG_SHAPES))


@pytest.mark.kernels
@pytest.mark.parametrize("options", [{}, {"boundary": True, "ends": True}], ids=["plain", "all"])
@pytest.mark.parametrize(("scale", "forbid"), thinned_pairs([1.0, 10.0, 100.0], [0.0, 0.05, 0.4]))
def test_agrees_with_reference_at_any_scale(scale, forbid, options):
    problem = random_problem(6, 70, 9, 3, scale=scale, forbid=forbid, seed=11, **options)
    if forbid > 0.1:  # so that some sequences stay feasible
        problem = problem.replace(duration_bias=problem.duration_bias.clamp(min=-1e3))
    assert_agrees_with_reference(problem)


@given(
    num_positions=st.integers(1, 70),
    max_duration=st.integers(1, 40),
    num_labels=st.integers(1, 10),
    boundary=st.booleans(),
    ends=st.booleans(),
    forbid=st.sampled_from([0.0, 0.02, 0.3]),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 999),
)
def test_agrees_with_reference_on_any_shape(**options):
    assert_agrees_with_reference(random_problem(**options))


@pytest.mark.parametrize("name", ["scores", "transition", "duration_bias"])
def test_agrees_with_reference_where_one_parameter_dominates(name):
    problem = random_problem(2, 80, 20, 4, boundary=True, seed=3)
    assert_agrees_with_reference(problem.replace(**{name: 300.0 * getattr(problem, name)}))


@pytest.mark.parametrize("trend", [40.0, -40.0])
def test_agrees_with_reference_on_scores_with_a_trend(trend):
    # All labels rise or fall together, by 3200 in all; and one against the others.
    problem = random_problem(2, 80, 12, 3, ragged=False, seed=4)
    common = problem.scores + trend
    assert_agrees_with_reference(problem.replace(scores=common))
    assert_agrees_with_reference(
        problem.replace(scores=problem.scores + torch.tensor([trend, 0.0, -trend]))
    )


def test_agrees_with_reference_when_labels_die_and_return():
    problem = random_problem(2, 120, 6, 3, ragged=False, seed=5)
    scores = problem.scores.clone()
    scores[0, 20:50, 0] = -math.inf  # longer than the window
    scores[0, 33:36, 1:2] = -math.inf
    scores[1, ::7, 1] = -math.inf
    scores[1, 60:100, 1:] = -math.inf  # one label alone
    assert_agrees_with_reference(problem.replace(scores=scores))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [-1e5, long(-1e9), -1e12])
def test_finite_masks_act_as_minus_infinity(mask, backend):
    # A running sum that takes in a mask of -1e9 is good to 1e-7 only, from there on.
    problem = random_problem(2, 60, 7, 3, ragged=False, seed=23)
    dead = torch.rand(problem.scores.shape) < 0.3
    dead[..., 0] = False
    masked, forbidden = (
        problem.replace(scores=problem.scores.masked_fill(dead, value))
        for value in (mask, -math.inf)
    )
    assert_close(log_partition(masked, backend), log_partition(forbidden, "reference"))
    assert_close(viterbi(masked, backend).scores, viterbi(forbidden, "reference").scores)
    expected = segment_marginals(forbidden, "reference")
    for actual, marginal in zip(segment_marginals(masked, backend), expected, strict=True):
        assert_close(actual, marginal)


def sources(problem: Potentials) -> torch.Tensor:
    """h_s(c) = gamma_s(c) - S_s(c) of a batch of one, (T, C), by the reference."""
    alpha, _ = reference._messages(reference.blank_and_upcast(problem), "log")
    gamma = [initial_term(problem.transition)[None]]
    if problem.initial_scores is not None:
        gamma = [problem.initial_scores[None]]
    gamma += [(a[..., None] + problem.transition).logsumexp(-2) for a in alpha[1:-1]]
    before = problem.scores.cumsum(1) - problem.scores
    return (torch.stack(gamma, 1) - before)[0]


def backwards(problem: Potentials) -> Potentials:
    """The problem read from its end: its sources are u."""
    zeros = torch.zeros(problem.num_labels, dtype=problem.dtype)
    return problem.replace(
        scores=problem.scores.flip(1),
        transition=problem.transition.T,
        initial_scores=zeros,
        final_scores=initial_term(problem.transition),
    )


def smallest_scaled_sum(problem: Potentials) -> float:
    """Log of the least window sum that is not empty, both its factors scaled to a maximum of 1."""
    h, bias = sources(problem), problem.duration_bias
    least = math.inf
    for t in range(1, problem.num_positions):
        longest = min(t, problem.max_duration)
        window = h[t - longest : t].flip(0)
        value = (window + bias[:longest]).amax(0)
        scaled = value - window.amax(0) - bias.amax(0)
        least = min([least, *scaled[value > -math.inf].tolist()])
    return least


def largest_product(problem: Potentials) -> float:
    """Log of the largest product of a start and an end within one window, allowed or not."""
    h, back = sources(problem), sources(backwards(problem)).flip(0)
    log_z = reference.log_partition(problem)
    total = problem.scores.sum(1)[0]
    products = [
        h[s] + back[s + k - 1] + total
        for k in range(1, problem.max_duration + 1)
        for s in range(problem.num_positions - k + 1)
    ]
    return float(torch.stack(products).max() + problem.duration_bias.max() - log_z)


def minimum_duration_problem(minimum=25, num_positions=150, scale=100.0, seed=0) -> Potentials:
    """An encoder sure of itself, in a model that forbids the short segments it asks for."""
    problem = random_problem(1, num_positions, 30, 3, ragged=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, problem.scores.shape, generator=generator) * 2.0 - 1.0
    bias = problem.duration_bias.clone()
    bias[: minimum - 1] = -math.inf
    return problem.replace(scores=scale * signs, duration_bias=bias)


# A frame may lie up to e^200 below its largest source: a sum that even then is below CERTAIN is one
# that only the exact branch can tell from nothing.
@pytest.mark.parametrize("seed", [0, long(1), long(2)])
def test_exact_sums_rescue_confident_scores_under_minimum_durations(seed):
    problem = minimum_duration_problem(seed=seed)
    assert smallest_scaled_sum(problem) + 200.0 < math.log(CERTAIN)
    assert smallest_scaled_sum(backwards(problem)) + 200.0 < math.log(CERTAIN)
    assert largest_product(problem) > OVERFLOW
    assert_agrees_with_reference(problem)


@pytest.mark.kernels
@pytest.mark.parametrize("minimum", [2, long(15), 16, long(17), 29])
def test_exact_sums_rescue_any_minimum_duration(minimum):
    problem = minimum_duration_problem(minimum, scale=400.0)
    assert smallest_scaled_sum(problem) < math.log(CERTAIN)
    assert_agrees_with_reference(problem)


def test_agrees_with_reference_where_one_duration_is_allowed():
    assert_agrees_with_reference(minimum_duration_problem(30))


def test_exact_sums_rescue_one_confident_label_among_mild_ones():
    problem = random_problem(1, 200, 24, 3, ragged=False, seed=6)
    scores, bias = problem.scores.clone(), problem.duration_bias.clone()
    scores[..., 0] += 100.0 * torch.where(torch.arange(200) % 40 < 10, 1.0, -1.0)
    bias[:15, 0] = -math.inf
    problem = problem.replace(scores=scores, duration_bias=bias)
    assert smallest_scaled_sum(problem) + 200.0 < math.log(CERTAIN)
    assert_agrees_with_reference(problem)


def test_exact_sums_rescue_durations_of_very_unequal_scores():
    # Only the first and the last duration count, and the last by e^-1000 of the first.
    problem = random_problem(1, 100, 12, 2, ragged=False, seed=7)
    bias = torch.full_like(problem.duration_bias, -math.inf)
    bias[0, 0], bias[11] = 0.0, -1000.0
    assert_agrees_with_reference(problem.replace(duration_bias=bias))


def test_exact_sums_rescue_transitions_beyond_the_range_of_exponentials():
    problem = random_problem(1, 60, 4, 4, ragged=False, seed=8)
    transition = problem.transition.clone()
    transition[0] = -1500.0
    transition[:, 0] = 1500.0
    transition[1, 2] = -math.inf
    assert_agrees_with_reference(problem.replace(transition=transition))


@pytest.mark.kernels
def test_long_log_partition_equals_the_plain_loop():
    problem = random_problem(1, 4000, 4, 2, ragged=False, seed=9)
    with torch.no_grad():
        log_z = log_partition(problem, "numba")
        expected = log_partition(problem, "reference")
    assert abs(float(log_z / expected) - 1.0) <= 1e-9


def test_chunks_of_a_long_sequence_join():
    num_positions = 2 * CHUNK + 77
    problem = random_problem(
        2, num_positions, 40, 3, boundary=True, ragged=False, scale=2.0, seed=10
    ).replace(lengths=torch.tensor([num_positions, CHUNK + 1]))
    _, found = static.gradients(problem, EVERYTHING)
    starts, ends = found["start_scores"], found["end_scores"]
    inside = torch.arange(num_positions) < problem.lengths[:, None]
    # Every position is covered once, every segment has a duration and a source.
    assert_close(found["scores"].sum(-1), inside.double())
    assert_close(found["duration_bias"].sum(1) / starts.sum(1), torch.ones(2, 3).double())
    assert_close(found["transition"].sum(1) / starts.sum(1), torch.ones(2, 3).double())
    covered = torch.arange(1, 41).double() @ found["duration_bias"].sum(-1)[..., None]
    assert_close(covered[:, 0] / problem.lengths, torch.ones(2).double())
    # Around the joins, the marginals are those of a piece with a margin of 40 windows.
    for join in (CHUNK, 2 * CHUNK):
        first, stop = join - 60, min(join + 60, num_positions)
        piece = slice(first - 1600, min(stop + 1600, num_positions))
        cut = problem.replace(
            scores=problem.scores[:1, piece],
            start_scores=problem.start_scores[:1, piece],
            end_scores=problem.end_scores[:1, piece],
            lengths=torch.tensor([piece.stop - piece.start]),
        )
        _, alone = static.gradients(cut, {"scores", "start_scores", "end_scores"})
        middle = slice(1600, 1600 + stop - first)
        for name, value in alone.items():
            assert_close(found[name][0, first:stop], value[0, middle])
    assert bool((starts >= 0).all() and (ends >= 0).all())


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_chunks_of_a_long_sequence_give_the_slope_of_log_partition(name):
    problem = random_problem(
        1, 2 * CHUNK + 77, 6, 3, boundary=True, ends=True, ragged=False, seed=12
    )
    _, found = static.gradients(problem, {name})
    value, step = getattr(problem, name), 1e-5
    direction = torch.randn_like(value)
    above, below = (
        static.log_partition(problem.replace(**{name: value + sign * step * direction}))
        for sign in (1.0, -1.0)
    )
    slope = float((above - below) / (2 * step))
    # One segment lost at a join would show as 1; the differences of log Z, 1e5 or so, are good to
    # 1e-5 after the division.
    assert abs(slope - float((found[name][0] * direction).sum())) <= 1e-4


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_position_marginals_of_a_long_sequence_sum_to_one(scale):
    problem = random_problem(1, 50000, 30, 4, ragged=False, scale=scale, seed=13)
    position, start, end, *_ = segment_marginals(problem, "numba")
    assert float((position.sum(-1) - 1.0).abs().max()) <= 1e-10
    assert bool((position >= 0).all() and (position <= 1).all())
    assert abs(float(start.sum() - end.sum())) <= 1e-8
    assert_close(start[0, 0], position[0, 0])
    assert_close(end[0, -1], position[0, -1])


@pytest.fixture
def num_threads():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equal_results(first, second):
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_number_of_threads_changes_nothing(num_threads):
    problem = random_problem(5, CHUNK + 500, 20, 3, boundary=True, ends=True, seed=14)
    results = []
    for number in (1, 2, 3):
        num_threads(number)
        results.append(static.gradients(problem, EVERYTHING))
        assert_close(static.log_partition(problem), results[-1][0])
    assert_equal_results(results[0], results[1])
    assert_equal_results(results[0], results[2])


def test_batch_and_padding_change_nothing():
    problem = random_problem(6, 90, 11, 3, boundary=True, ends=True, seed=15)
    log_z, found = static.gradients(problem, EVERYTHING)
    for b, length in enumerate(problem.lengths.tolist()):
        alone = problem.replace(
            lengths=problem.lengths[b : b + 1],
            **{
                name: getattr(problem, name)[b : b + 1, :length]
                for name in ("scores", "start_scores", "end_scores")
            },
        )
        own_log_z, own = static.gradients(alone, EVERYTHING)
        assert torch.equal(own_log_z[0], log_z[b])
        for name, value in own.items():
            by_position = name in ("scores", "start_scores", "end_scores")
            assert torch.equal(value[0], found[name][b, :length] if by_position else found[name][b])
        for name in ("scores", "start_scores", "end_scores"):
            assert bool((found[name][b, length:] == 0).all())


def test_what_is_wanted_changes_nothing():
    problem = random_problem(3, 50, 7, 3, seed=16)
    log_z, everything = static.gradients(problem, EVERYTHING)
    assert_close(static.log_partition(problem), log_z)
    for name in EVERYTHING:
        own_log_z, found = static.gradients(problem, {name})
        assert found.keys() == {name}
        assert_close(own_log_z, log_z)
        assert_close(found[name], everything[name])


def test_float32_is_computed_in_float64():
    narrow = random_problem(3, 100, 9, 5, boundary=True, ends=True, dtype=torch.float32, seed=17)
    wide = narrow.to(torch.float64)
    log_z, found = static.gradients(narrow, EVERYTHING)
    expected_log_z, expected = static.gradients(wide, EVERYTHING)
    assert log_z.dtype == torch.float64
    assert_close(log_z, expected_log_z)
    for name, value in found.items():
        by_position = name in ("scores", "start_scores", "end_scores")
        assert value.dtype == (torch.float32 if by_position else torch.float64)
        # Initial and final scores get a row of the boundary marginals, which are stored as float32.
        stored = by_position or name in ("initial_scores", "final_scores")
        assert_close(value, expected[name], torch.float32 if stored else torch.float64)


def test_memory_layout_changes_nothing():
    problem = random_problem(3, 40, 5, 4, boundary=True, seed=18)
    log_z, found = static.gradients(problem, EVERYTHING)
    strided = problem.replace(
        scores=problem.scores.transpose(1, 2).contiguous().transpose(1, 2),
        transition=problem.transition.T.contiguous().T,
        duration_bias=torch.stack([problem.duration_bias] * 2, -1)[..., 0],
        start_scores=torch.cat([problem.start_scores] * 2, 1)[:, :40],
        lengths=torch.stack([problem.lengths] * 2, 1)[:, 0],
    )
    assert_equal_results(static.gradients(strided, EVERYTHING), (log_z, found))


def test_expanded_scores_are_read_as_they_stand():
    problem = random_problem(1, 30, 5, 3, seed=19)
    many = problem.replace(
        scores=problem.scores.expand(4, -1, -1), lengths=problem.lengths.expand(4)
    )
    assert torch.equal(log_partition(many, "numba"), log_partition(problem, "numba").expand(4))


def test_infeasible_sequences_leave_the_others_alone():
    problem = random_problem(3, 40, 5, 3, boundary=True, ends=True, ragged=False, seed=20)
    scores = problem.scores.clone()
    scores[1, 17] = -math.inf
    dead = problem.replace(scores=scores)
    log_z, found = static.gradients(problem, EVERYTHING)
    dead_log_z, dead_found = static.gradients(dead, EVERYTHING)
    assert dead_log_z[1] == -math.inf
    assert static.log_partition(dead)[1] == -math.inf
    for b in (0, 2):
        assert dead_log_z[b] == log_z[b]
        assert all(torch.equal(dead_found[name][b], found[name][b]) for name in found)
    assert all(bool((value[1] == 0).all()) for value in dead_found.values())


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_all_forbidden_is_minus_infinity_with_gradient_zero(name):
    problem = random_problem(2, 20, 4, 2, boundary=True, ends=True, seed=21)
    problem = problem.replace(**{name: torch.full_like(getattr(problem, name), -math.inf)})
    if name == "transition":  # with initial scores, sequences of one segment need no transition
        problem = problem.replace(initial_scores=None)
    leaves = with_gradients(problem)
    log_z = log_partition(leaves, "numba")
    assert log_z.tolist() == [-math.inf] * 2
    found = gradients_of(torch.where(log_z > -math.inf, log_z, 0.0).sum(), leaves)
    assert all(bool((value == 0).all()) for value in found.values())


def test_unwritten_memory_is_not_read(monkeypatch):
    problem = random_problem(4, 60, 9, 3, boundary=True, ends=True, forbid=0.05, seed=22)
    expected = static.gradients(problem, EVERYTHING)

    def poisoned(shape, dtype=np.float64, **options):
        fill = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
        return np.full(shape, fill, dtype, **options)

    monkeypatch.setattr(np, "empty", poisoned)
    assert_equal_results(static.gradients(problem, EVERYTHING), expected)
    assert torch.equal(static.log_partition(problem), expected[0])


def test_a_huge_score_common_to_all_labels_changes_nothing_but_log_z():
    p = random_problem(1, 60, 6, 3, seed=2)
    scores = p.scores.clone()
    scores[:, 20] -= 1e12
    backend = choose("numba", p)
    log_z, expected = backend.gradients(p, {"scores"})
    shifted, actual = backend.gradients(p.replace(scores=scores), {"scores"})
    # The scores themselves were rounded to 1e-4 by the shift.
    torch.testing.assert_close(actual["scores"], expected["scores"], rtol=0, atol=1e-3)
    torch.testing.assert_close(shifted, log_z - 1e12, rtol=1e-12, atol=0)

"""Samples: their distribution against enumeration, what fixes them, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from flash_semicrf import Potentials, sample, segment_marginals
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.segments import segments_to_table, table_to_segments
from flash_semicrf.problem.validation import check_table
from flash_semicrf.streaming.dispatch import record_backends
from flash_semicrf.testing import enumerate_scores, random_problem
from tests.flash_semicrf.cases import BACKENDS, SMALL_CASES, thinned

BY_POSITION = ("scores", "start_scores", "end_scores")


def sequences(problem: Potentials, indices: list[int]) -> Potentials:
    """Some sequences of a batch."""
    names = [name for name in BY_POSITION if getattr(problem, name) is not None]
    chosen = {name: getattr(problem, name)[indices] for name in names}
    return problem.replace(lengths=problem.lengths[indices], **chosen)


def feasible_indices(problem: Potentials) -> list[int]:
    """Which sequences of a small batch have a segmentation."""
    scores = [enumerate_scores(problem, b)[1].max() for b in range(problem.batch_size)]
    return [b for b, best in enumerate(scores) if best > -math.inf]


def feasible(problem: Potentials) -> Potentials:
    """The sequences of a small batch that have a segmentation."""
    return sequences(problem, feasible_indices(problem))


FEASIBLE_CASES = [case for case in SMALL_CASES[::3] if feasible_indices(case.problem())]
"""A third of all combinations of options, but where forbidden entries leave nothing."""


def repeated(problem: Potentials, number: int) -> Potentials:
    """The batch `number` times over: the one that a table of samples tiles."""
    return sequences(problem, list(range(problem.batch_size)) * number)


def codes(sequence, start, label, count, num_labels):
    """One number per segmentation: a digit for the label that starts at each position."""
    digits = (label + 1) * (num_labels + 1) ** start
    return np.bincount(sequence, digits, minlength=count).astype(np.int64)


def drawn_codes(problem, num_samples, backend):
    """Codes of the samples, (num_samples, B)."""
    table = sample_table(problem, num_samples, 0, backend)
    columns = (table.sequence.numpy(), table.start.numpy(), table.label.numpy())
    count = num_samples * problem.batch_size
    return codes(*columns, count, problem.num_labels).reshape(num_samples, -1)


def tail_probability(problem, b, drawn):
    """P(a chi-square as large) of the samples' counts, rare segmentations taken together."""
    segmentations, scores = enumerate_scores(problem, b)
    probabilities = torch.softmax(scores, 0).numpy()
    rows = [(i, *segment) for i, found in enumerate(segmentations) for segment in found]
    owner, start, _, label = np.array(rows).T
    known = codes(owner, start, label, len(segmentations), problem.num_labels)
    order = np.argsort(known)
    place = np.searchsorted(known[order], drawn)
    assert np.array_equal(known[order][place], drawn)  # every sample is a segmentation
    counts = np.bincount(order[place], minlength=len(known))
    assert not counts[probabilities == 0].any()  # and none is forbidden
    expected = probabilities * len(drawn)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    used = expected > 1e-9 * len(drawn)
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return chi2.sf(statistic, max(used.sum() - 1, 1))


@pytest.mark.parametrize("case", thinned(FEASIBLE_CASES[::3], 3), ids=str)
def test_samples_have_the_distribution_of_the_model(case):
    problem = feasible(case.problem())
    drawn = drawn_codes(problem, 20000, "numba")
    for b in range(problem.batch_size):
        assert tail_probability(problem, b, drawn[:, b]) > 1e-5


def test_samples_of_the_reference_have_the_distribution_of_the_model():
    problem = random_problem(1, 3, 2, 2, boundary=True, ends=True, ragged=False)
    drawn = drawn_codes(problem, 3000, "reference")
    assert tail_probability(problem, 0, drawn[:, 0]) > 1e-5


@pytest.mark.parametrize("by_duration", [False, True])
def test_sampled_starts_have_their_marginals(by_duration):
    problem = random_problem(2, 90, 12, 5, by_duration=by_duration, ragged=False, scale=2.0)
    table = sample_table(problem, 4000, seed=1)
    counts = torch.zeros(2, 90, 5, dtype=torch.float64)
    counts.index_put_(
        (table.sequence % 2, table.start, table.label), torch.ones(()).double(), accumulate=True
    )
    expected = segment_marginals(problem).start
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * deviation + 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_tile_their_sequences(backend):
    problem = random_problem(3, 20, 4, 3, boundary=True, forbid=0.05, seed=2)
    check_table(sample_table(problem, 5, 0, backend), repeated(problem, 5))


def test_sample_lists_what_the_table_holds():
    problem = random_problem(3, 20, 4, 3)
    samples = sample(problem, 2, seed=3)
    assert [len(of_sequence) for of_sequence in samples] == [2, 2, 2]
    flat = [samples[b][j] for j in range(2) for b in range(3)]
    table = sample_table(problem, 2, seed=3)
    assert flat == table_to_segments(table, 6)
    for actual, expected in zip(segments_to_table(flat), table, strict=True):
        assert torch.equal(actual, expected)


def test_more_samples_leave_the_first_as_they_are():
    problem = random_problem(2, 40, 7, 3)
    many = sample(problem, 130, seed=4)
    for number in (1, 64, 65):
        assert sample(problem, number, seed=4) == [drawn[:number] for drawn in many]


def test_batch_and_padding_change_nothing():
    problem = random_problem(4, 60, 9, 3, boundary=True, seed=5)
    whole = sample(problem, 3, seed=6)
    first = sequences(problem, [0, 1])
    longest = int(first.lengths.max())
    names = {name: getattr(first, name)[:, :longest] for name in BY_POSITION}
    assert sample(first.replace(**names), 3, seed=6) == whole[:2]


def test_number_of_threads_changes_nothing():
    problem = random_problem(3, 200, 15, 3, seed=7)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(sample(problem, 100, seed=8))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_samples_of_equal_sequences_differ():
    problem = sequences(random_problem(1, 50, 5, 3), [0, 0])
    first, second = sample(problem, 2, seed=9)
    assert first[0] != first[1] and first[0] != second[0] and first[1] != second[1]


def test_the_seed_comes_from_torch_where_none_is_given():
    problem = random_problem(1, 30, 5, 3)
    torch.manual_seed(0)
    first, second = sample(problem, 1), sample(problem, 1)
    torch.manual_seed(0)
    assert sample(problem, 1) == first and first != second
    by_generator = [sample(problem, 1, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert by_generator[0] == by_generator[1] != first


def test_seeds_differ_and_may_be_any_integer():
    problem = random_problem(1, 30, 5, 3)
    seeds = (0, 1, -1, 2**64 - 2, np.int64(5))
    found = [sample(problem, 1, seed)[0][0] for seed in seeds]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_problems_that_require_gradients_are_sampled():
    problem = random_problem(1, 10, 3, 2)
    leaf = problem.replace(scores=problem.scores.clone().requires_grad_())
    assert sample(leaf, 1, seed=0) == sample(problem, 1, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_sequences_are_named(backend):
    problem = random_problem(3, 6, 2, 2, ragged=False)
    scores = problem.scores.clone()
    scores[1, 3] = -math.inf
    with pytest.raises(ValueError, match=r"No segmentation is feasible for sequences \[1\]"):
        sample(problem.replace(scores=scores), 2, seed=0, backend=backend)


@pytest.mark.parametrize("seed", [1.5, "0", True, torch.tensor(0)], ids=repr)
def test_other_seeds_are_refused(seed):
    with pytest.raises(TypeError, match="`seed` must be an int, a torch.Generator or None; got "):
        sample(random_problem(), 1, seed)


def test_bad_input_is_refused():
    problem = random_problem()
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1; got 0"):
        sample(problem, 0)
    with pytest.raises(ValueError, match="`scores` must be finite or -inf"):
        sample(problem.replace(scores=problem.scores * math.nan), 1)
    with pytest.raises(ValueError, match="`backend` must be one of"):
        sample(problem, 1, backend="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_runs(backend):
    with record_backends() as ran:
        sample(random_problem(), 1, 0, backend)
    assert ran == [backend]


@pytest.mark.gpu
def test_samples_of_tensors_on_a_gpu_are_those_of_the_cpu():
    problem = random_problem(3, 50, 8, 4)
    drawn = sample_table(problem.to("cuda"), 5, seed=0)
    for actual, expected in zip(drawn, sample_table(problem, 5, seed=0), strict=True):
        assert actual.device.type == "cuda" and torch.equal(actual.cpu(), expected)

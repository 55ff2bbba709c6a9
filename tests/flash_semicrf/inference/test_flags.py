"""`validate`: bad values are named, or make the results of their sequence NaN."""

from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.flags import flag_values, reads_values
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.flag_cases import (
    BAD,
    assert_all_is_nan,
    assert_bad_sequence_is_nan,
    assert_padding_is_ignored,
    with_bad_value,
    with_length,
)

BACKENDS = ["numba", "reference"]
ENTRIES = [log_partition, viterbi, viterbi_table, segment_marginals]

PROBLEMS = {
    "static": random_problem(3, 9, 4, 2, boundary=True, ends=True, seed=3),
    "tail": random_problem(3, 9, 4, 2, tail=True, seed=3),
    "by duration": random_problem(3, 9, 4, 2, by_duration=True, seed=3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_bad_score_makes_its_sequence_nan(kind, value, backend):
    problem = PROBLEMS[kind]
    assert_bad_sequence_is_nan(problem, with_bad_value(problem, "scores", value), backend)


@pytest.mark.parametrize("name", ["start_scores", "end_scores"])
def test_a_bad_boundary_score_makes_its_sequence_nan(name):
    problem = PROBLEMS["static"]
    assert_bad_sequence_is_nan(problem, with_bad_value(problem, name, math.nan), "numba")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("static", "transition"),
        ("by duration", "transition"),
        ("static", "duration_bias"),
        ("static", "initial_scores"),
        ("static", "final_scores"),
        ("tail", "duration_tail"),
    ],
)
def test_a_bad_shared_parameter_makes_everything_nan(kind, name, backend):
    assert_all_is_nan(with_bad_value(PROBLEMS[kind], name, math.nan), backend)


@pytest.mark.parametrize("length", [-1, 0, 10])
def test_bad_lengths_are_flagged_and_nothing_is_read_out_of_bounds(length):
    flagged, bad = flag_values(with_length(PROBLEMS["static"], length))
    assert bad.tolist() == [b == BAD for b in range(3)]
    assert 1 <= flagged.lengths.min() and flagged.lengths.max() <= 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_ignored(backend):
    assert_padding_is_ignored(PROBLEMS["static"], backend)


def test_what_forbids_is_allowed():
    problem = PROBLEMS["static"]
    for value in (-math.inf, -1e38, -2e38):
        given = with_bad_value(problem, "scores", value)
        log_z = log_partition(given, validate="shapes")
        torch.testing.assert_close(log_z, log_partition(given))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("validate", ["auto", "values"])
def test_values_are_named_on_the_cpu(entry, validate):
    problem = PROBLEMS["static"]
    with pytest.raises(ValueError, match=r"`scores` must be .*got nan at index \(1, "):
        entry(with_bad_value(problem, "scores", math.nan), validate=validate)


@pytest.mark.parametrize("entry", ENTRIES)
def test_lengths_on_the_cpu_are_read_in_any_case(entry):
    # Without a device to wait for there is nothing to gain.
    with pytest.raises(ValueError, match=r"`lengths` must be in \[1, T=9\]; got 10 at index 1"):
        entry(with_length(PROBLEMS["static"], 10), validate="shapes")


@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_kinds_of_validation_are_refused(entry):
    with pytest.raises(ValueError, match="`validate` must be one of 'auto', 'values', 'shapes'"):
        entry(PROBLEMS["static"], validate="none")


def test_auto_reads_values_everywhere_but_on_cuda():
    assert [reads_values("auto", torch.device(name)) for name in ("cpu", "mps", "cuda")] == [
        True,
        True,
        False,
    ]

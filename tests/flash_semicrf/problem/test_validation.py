"""The checks of `problem.validation`; the entries that run them: `test_entry_errors.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flash_semicrf import log_partition, segment_marginals, viterbi
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.problem.segments import Segment, SegmentTable, segments_to_table
from flash_semicrf.problem.validation import (
    check_choice,
    check_finite_or_forbidden,
    check_labels,
    check_lengths,
    check_positive_int,
    check_potentials,
    check_rows,
    check_table,
)
from flash_semicrf.testing import assert_close, random_problem
from tests.flash_semicrf.cases import at, message_of

B, T, K, C = 2, 5, 3, 4
PROBLEM = random_problem(B, T, K, C, boundary=True, ends=True, ragged=False)


@pytest.mark.parametrize("value", [1, 7, np.int64(3), torch.Size([2])[0]])
def test_check_positive_int_returns_an_int(value):
    assert type(check_positive_int("n", value)) is int
    assert check_positive_int("n", value) == value


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, torch.tensor(1)], ids=repr)
def test_check_positive_int_says_what_came(value):
    message = message_of(ValueError, check_positive_int, "n", value)
    assert message == f"`n` must be an integer >= 1; got {value!r}."


def test_check_choice_lists_the_choices():
    check_choice("mode", "a", ("a", "b"))
    message = message_of(ValueError, check_choice, "mode", 3, ("a", "b"))
    assert message == "`mode` must be one of 'a', 'b'; got 3."


def test_check_finite_or_forbidden_says_whether_anything_forbids():
    assert not check_finite_or_forbidden("x", torch.tensor([1.0, -2.0]))
    assert not check_finite_or_forbidden("x", torch.zeros(0))
    assert check_finite_or_forbidden("x", torch.tensor([1.0, -math.inf]))
    assert check_finite_or_forbidden("x", torch.tensor([1.0, NEG_INF]))


def test_check_finite_or_forbidden_names_the_first_bad_entry():
    value = torch.tensor([[0.0, -math.inf], [math.nan, math.inf]])
    assert message_of(ValueError, check_finite_or_forbidden, "x", value) == (
        "`x` must be finite or -inf (forbidden); got nan at index (1, 0)."
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_check_lengths_returns_int64(dtype):
    lengths = check_lengths(torch.tensor([1, 5], dtype=dtype), 2, 5)
    assert lengths.dtype == torch.int64 and lengths.tolist() == [1, 5]


LABELS = {
    "list": ([[0]], TypeError, "`labels` must be a Tensor; got list."),
    "floating": (
        torch.zeros(B, T),
        TypeError,
        "`labels` must have an integer dtype; got torch.float32.",
    ),
    "boolean": (
        torch.zeros(B, T, dtype=torch.bool),
        TypeError,
        "`labels` must have an integer dtype; got torch.bool.",
    ),
    "shape": (
        torch.zeros(B, T + 1, dtype=torch.long),
        ValueError,
        "`labels` must have shape (2, 5); got (2, 6).",
    ),
    "too large": (
        at(torch.zeros(B, T, dtype=torch.long), (1, 1), C),
        ValueError,
        "`labels` must be in [0, C-1=3]; got 4 at index (1, 1).",
    ),
    "negative": (
        at(torch.zeros(B, T, dtype=torch.long), (0, 4), -1),
        ValueError,
        "`labels` must be in [0, C-1=3]; got -1 at index (0, 4).",
    ),
}


@pytest.mark.parametrize("bad", LABELS)
def test_check_labels(bad):
    labels, kind, message = LABELS[bad]
    assert message_of(kind, check_labels, labels, torch.tensor([5, 2]), T, C) == message


def test_check_labels_ignores_padding():
    labels = at(torch.zeros(B, T, dtype=torch.long), (1, 2), -100)
    check_labels(labels, torch.tensor([5, 2]), T, C)


def table_of(*rows: tuple[int, int, int, int]) -> SegmentTable:
    return SegmentTable(*torch.tensor(rows).unbind(1))


GOOD_ROWS = [(0, 0, 3, 1), (0, 3, 5, 1), (1, 0, 2, 3), (1, 2, 5, 0)]
TABLES = {
    "sequence without segments": (
        GOOD_ROWS[:2],
        "`table` must hold segments of each of the 2 sequences; it holds those of [0].",
    ),
    "sequence too many": (
        [*GOOD_ROWS, (2, 0, 5, 0)],
        "`table` must hold segments of each of the 2 sequences; it holds those of [0, 1, 2].",
    ),
    "too long": (
        [(0, 0, 4, 1), (0, 4, 5, 1), *GOOD_ROWS[2:]],
        "Segments must have durations in [1, K=3]; got [0, 4) with label 1 in sequence 0.",
    ),
    "empty segment": (
        [(0, 0, 0, 1), *GOOD_ROWS],
        "Segments must have durations in [1, K=3]; got [0, 0) with label 1 in sequence 0.",
    ),
    "label too large": (
        [*GOOD_ROWS[:3], (1, 2, 5, 4)],
        "Segments must have labels in [0, C-1=3]; got [2, 5) with label 4 in sequence 1.",
    ),
    "label negative": (
        [(0, 0, 3, -1), *GOOD_ROWS[1:]],
        "Segments must have labels in [0, C-1=3]; got [0, 3) with label -1 in sequence 0.",
    ),
    "late start": (
        [(0, 1, 3, 1), *GOOD_ROWS[1:]],
        "Segments must tile each sequence without gap or overlap; got [1, 3) with label 1 in "
        "sequence 0.",
    ),
    "gap": (
        [GOOD_ROWS[0], (0, 4, 5, 1), *GOOD_ROWS[2:]],
        "Segments must tile each sequence without gap or overlap; got [4, 5) with label 1 in "
        "sequence 0.",
    ),
    "overlap": (
        [GOOD_ROWS[0], (0, 2, 5, 1), *GOOD_ROWS[2:]],
        "Segments must tile each sequence without gap or overlap; got [2, 5) with label 1 in "
        "sequence 0.",
    ),
    "early end": (
        [*GOOD_ROWS[:3], (1, 2, 4, 0)],
        "Segments must tile each sequence without gap or overlap; got [2, 4) with label 0 in "
        "sequence 1.",
    ),
}


@pytest.mark.parametrize("bad", TABLES)
def test_check_table(bad):
    rows, message = TABLES[bad]
    assert message_of(ValueError, check_table, table_of(*rows), PROBLEM) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("field", SegmentTable._fields)
@pytest.mark.parametrize("check", [check_table, check_rows])
def test_tables_hold_integers(check, field, dtype):
    table = table_of(*GOOD_ROWS)
    table = table._replace(**{field: getattr(table, field).to(dtype)})
    expected = f"`table.{field}` must have dtype int64; got {dtype}."
    assert message_of(TypeError, check, table, PROBLEM) == expected


def test_check_table_takes_a_tiling():
    check_table(table_of(*GOOD_ROWS), PROBLEM)
    one = random_problem(1, 1, 1, 1)
    check_table(segments_to_table([[Segment(0, 0, 0)]]), one)


def test_check_potentials_upcasts_half_precision_only():
    for given, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        checked = check_potentials(PROBLEM.to(given))
        assert {value.dtype for value in checked.parameters().values()} == {expected}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_from_its_own_values(dtype):
    narrow = PROBLEM.to(dtype)
    wide = narrow.to(torch.float64)
    assert_close(log_partition(narrow), log_partition(wide), torch.float32)
    assert segment_marginals(narrow).position.dtype == torch.float32


def test_mixed_dtypes_are_taken():
    mixed = PROBLEM.replace(scores=PROBLEM.scores.float(), transition=PROBLEM.transition.half())
    same = mixed.to(torch.float64)
    assert_close(log_partition(mixed), log_partition(same), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_check_potentials_turns_neg_inf_into_minus_infinity(dtype):
    scores = torch.tensor([[[NEG_INF, 0.0]]], dtype=dtype)
    checked = check_potentials(
        Potentials(scores, torch.zeros(2, 2), torch.zeros(1, 2), torch.tensor([1]))
    )
    assert checked.scores.tolist() == [[[-math.inf, 0.0]]]
    assert checked.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, NEG_INF, 1e30])
def test_padding_may_hold_anything(poison, backend):
    problem = random_problem(3, 6, 3, 2, boundary=True, ends=True, seed=1)
    padding = torch.arange(6) >= problem.lengths[:, None]
    assert bool(padding.any())
    names = ("scores", "start_scores", "end_scores")
    poisoned = problem.replace(
        **{n: getattr(problem, n).masked_fill(padding[..., None], poison) for n in names}
    )
    for entry in (log_partition, viterbi, viterbi_table):
        assert str(entry(poisoned, backend)) == str(entry(problem, backend))
    found = segment_marginals(poisoned, backend)
    for actual, expected in zip(found, segment_marginals(problem, backend), strict=True):
        assert torch.equal(actual, expected)


def test_nan_is_found_where_transitions_have_the_shape_of_padded_scores():
    # K = B and C = T: the check must not take a transition for scores with padding.
    problem = random_problem(3, 2, 3, 2, by_duration=True).replace(lengths=torch.tensor([2, 1, 1]))
    transition = at(problem.transition, (1, 1, 0), math.nan)
    message = message_of(ValueError, log_partition, problem.replace(transition=transition))
    assert message.endswith("got nan at index (1, 1, 0).")

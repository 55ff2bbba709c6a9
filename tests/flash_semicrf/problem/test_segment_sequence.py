"""`Segments` behave as the list of their segments."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash_semicrf.problem.segment_sequence as module
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.problem.constraints import Constraints
from flash_semicrf.problem.segments import (
    Segment,
    Segments,
    SegmentTable,
    labels_to_table,
    segments_to_table,
    table_to_segments,
)
from flash_semicrf.testing import random_problem

EXPECTED = [Segment(0, 2, 1, 0.5), Segment(3, 3, 0, -1.25), Segment(4, 9, 1, 2.0)]


def made() -> Segments:
    return Segments([0, 3, 4], [2, 3, 9], [1, 0, 1], [0.5, -1.25, 2.0])


def as_they_were_made(
    table: SegmentTable, batch_size: int, scores: torch.Tensor | None
) -> list[list[Segment]]:
    """Lists of objects, by the definition of a table."""
    values = [0.0] * len(table.start) if scores is None else scores.tolist()
    rows = zip(*(column.tolist() for column in table), values, strict=True)
    lists: list[list[Segment]] = [[] for _ in range(batch_size)]
    for sequence, start, stop, label, score in rows:
        lists[sequence].append(Segment(start, stop - 1, label, score))
    return lists


@st.composite
def tables(draw):
    """A table of up to five sequences, some of them without segments."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    rows = []
    for b, size in enumerate(sizes):
        start = 0
        for _ in range(size):
            duration, label = draw(st.integers(1, 5)), draw(st.integers(0, 3))
            rows.append((b, start, start + duration, label))
            start += duration
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4).unbind(1)
    return SegmentTable(*columns), len(sizes)


@given(tables(), st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16]))
def test_segments_of_a_table_are_those_made_one_by_one(case, dtype):
    table, batch_size = case
    scores = None if dtype is None else torch.randn(len(table.start), dtype=dtype)
    expected = as_they_were_made(table, batch_size, scores)
    actual = table_to_segments(table, batch_size, scores)
    assert type(actual) is list and {type(one) for one in actual} == {Segments}
    assert actual == expected and expected == actual
    assert [list(one) for one in actual] == expected
    assert [[one[i] for i in range(len(one))] for one in actual] == expected
    for segment in itertools.chain(*actual, *(one[:1] for one in actual)):
        fields = (segment.start, segment.end, segment.label, segment.score)
        assert [type(field) for field in fields] == [int, int, int, float]


def test_a_table_changed_later_changes_no_segments():
    table = labels_to_table(torch.tensor([[0, 0, 1]]), torch.tensor([3]))
    scores = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (segments,) = table_to_segments(table, 1, scores)
    for column in (*table, scores):
        column.fill_(7)
    assert segments == [Segment(0, 1, 0, 1.0), Segment(2, 2, 1, 2.0)]


def test_scores_may_require_a_gradient():
    table = labels_to_table(torch.tensor([[0, 0, 1]]), torch.tensor([3]))
    for dtype in (torch.float32, torch.float64):
        (segments,) = table_to_segments(table, 1, torch.ones(2, dtype=dtype, requires_grad=True))
        assert segments.score.tolist() == [1.0, 1.0]


@given(st.slices(9))
def test_slices_are_those_of_the_list_and_share_memory(index):
    start = np.arange(9)
    whole = Segments(start, start + 1, start % 3, start / 2)
    part = whole[index]
    assert type(part) is Segments and part == list(whole)[index]
    assert list(reversed(part)) == list(whole)[index][::-1]
    assert list(part[::-1][1:]) == list(whole)[index][::-1][1:]
    assert not len(part) or np.shares_memory(part.start, whole.start)


def test_indices_are_those_of_a_list():
    segments = made()
    assert [segments[i] for i in range(-3, 3)] == [EXPECTED[i] for i in range(-3, 3)]
    assert segments[np.int64(1)] == segments[torch.tensor(1)] == EXPECTED[1]
    for index in (3, -4, 10**30):
        with pytest.raises(IndexError, match="Segments index out of range"):
            segments[index]
    for index in ("a", 1.0, None, (0, 1)):
        with pytest.raises(TypeError, match="indices must be integers or slices, not "):
            segments[index]
    with pytest.raises(TypeError, match="slice indices must be integers"):
        segments["a":]


def test_equality():
    segments = made()
    assert segments == made() and segments == EXPECTED and EXPECTED == segments
    assert not segments != EXPECTED
    for other in (
        Segments([0, 3, 4], [2, 3, 9], [1, 0, 1]),
        Segments([0, 3, 4], [2, 3, 8], [1, 0, 1], segments.score),
        segments[:2],
        EXPECTED[:2],
        [*EXPECTED, EXPECTED[0]],
        [*EXPECTED[:2], None],
        tuple(EXPECTED),
        None,
        3,
    ):
        assert segments != other and other != segments
    assert segments[:0] == [] == segments[3:] and segments[:0] != [EXPECTED[0]]
    assert [segments, []] == [EXPECTED, segments[:0]]


def test_a_score_that_is_nan_equals_none():
    segments = Segments([0], [1], [0], [math.nan])
    assert segments == segments
    assert segments != Segments([0], [1], [0], [math.nan])
    assert segments != list(segments)


def test_search():
    segments, first = Segments([0, 5, 0], [1, 6, 1], [2, 2, 2]), Segment(0, 1, 2)
    assert first in segments and Segment(0, 1, 2, 0.5) not in segments and 3 not in segments
    assert segments.count(first) == 2 and segments.count(None) == 0
    assert segments.index(first) == 0
    assert segments.index(first, 1) == segments.index(first, -1) == 2
    for bounds in ((1, 2), (1, -1), (3,)):
        with pytest.raises(ValueError, match=r"Segment\(.*\) is not in Segments"):
            segments.index(first, *bounds)


def test_sums_are_lists():
    segments = made()
    for total in (segments + segments, segments + EXPECTED, EXPECTED + segments):
        assert type(total) is list and total == EXPECTED * 2
    changed = list(EXPECTED)
    changed += segments
    assert changed == EXPECTED * 2
    for other in ((), None):
        with pytest.raises(TypeError):
            segments + other
        with pytest.raises(TypeError):
            other + segments


def test_other_properties_of_a_list():
    segments = made()
    assert isinstance(segments, Sequence)
    assert segments and not segments[:0]
    first, *others = segments
    assert first == EXPECTED[0] and others == EXPECTED[1:]
    assert sorted(segments, key=lambda s: s.score)[0] == EXPECTED[1]
    with pytest.raises(TypeError, match="unhashable type"):
        hash(segments)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 10_000])
def test_iterators_of_any_length(count):
    start = np.arange(count)
    segments = Segments(start, start, start % 5, start / 4)
    expected = [Segment(i, i, i % 5, i / 4) for i in range(count)]
    assert list(segments) == expected and list(reversed(segments)) == expected[::-1]
    assert segments == expected


def test_columns():
    segments = made()
    assert segments.start.tolist() == [0, 3, 4] and segments.end.tolist() == [2, 3, 9]
    assert segments.duration.tolist() == [s.duration for s in EXPECTED]
    assert segments.label.tolist() == [1, 0, 1] and segments.score.tolist() == [0.5, -1.25, 2.0]
    assert [c.dtype for c in (segments.start, segments.end, segments.label)] == [np.int64] * 3
    for segments in (made(), made()[1:], pickle.loads(pickle.dumps(made()))):
        for name in ("start", "end", "label", "score"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(segments, name)[0] = 1
            with pytest.raises(AttributeError):
                setattr(segments, name, np.zeros(3))
    with pytest.raises(TypeError, match="does not support item assignment"):
        segments[0] = EXPECTED[0]


def test_columns_given_stay_writable():
    start = np.arange(2)
    segments = Segments(start, start, start)
    start[0] = -1
    assert segments[0].start == -1  # not copied


@pytest.mark.parametrize("labels", [["x", "O"], np.array(["x", "O"]), [True, False], [0.5, 2.0]])
def test_labels_of_any_kind(labels):
    segments = Segments([0, 1], [0, 1], labels)
    expected = list(np.asarray(labels).tolist())
    assert [s.label for s in segments] == [s.label for s in segments[:]] == expected
    assert {type(s.label) for s in segments} == {type(expected[0])}
    assert segments == pickle.loads(pickle.dumps(segments)) == list(segments)
    assert segments != Segments([0, 1], [0, 1], [5, 6])


def test_labels_of_mixed_kinds_stay_as_they_are():
    assert [s.label for s in Segments([0, 1], [0, 1], ["x", 1])] == ["x", 1]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies(duplicate):
    segments = made()
    assert duplicate(segments) == segments == EXPECTED
    assert duplicate([segments, segments[1:]]) == [EXPECTED, EXPECTED[1:]]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_a_part_hold_that_part_alone(protocol):
    start = np.arange(100_000)
    part = Segments(start, start, start, start)[7:9]
    stored = pickle.dumps(part, protocol)
    assert pickle.loads(stored) == part == [Segment(7, 7, 7, 7.0), Segment(8, 8, 8, 8.0)]
    assert len(stored) < 1000


def test_printed_in_full_or_by_the_ends():
    assert repr(made()) == f"Segments({EXPECTED})" and repr(made()[:0]) == "Segments([])"
    start = np.arange(1_000_000)
    segments = Segments(start, start, start)
    ends = [str(Segment(i, i, i)) for i in (0, 1, 2, 999_997, 999_998, 999_999)]
    assert str(segments) == (
        f"Segments([{', '.join(ends[:3])}, ..., {', '.join(ends[3:])}], length=1000000)"
    )
    assert repr(segments[:10]) == f"Segments({list(segments[:10])})"
    assert "..." in repr(segments[:11])


@pytest.mark.parametrize("columns", [([0], [0, 1], [0]), ([[0]], [[0]], [[0]]), (0, 0, 0)])
def test_columns_of_other_shapes_are_refused(columns):
    with pytest.raises(ValueError, match=r"must have one shape \(N,\); got "):
        Segments(*columns)
    with pytest.raises(ValueError, match="must have one shape"):
        Segments([0], [0], [0], [0.0, 1.0])


def test_bounds_that_are_not_integers_are_refused():
    for bounds in ([0.5], [True], ["a"]):
        with pytest.raises(TypeError, match="`start` and `end` must be integers; got dtype "):
            Segments(bounds, [3], [0])


def test_empty():
    for empty in (Segments([], [], []), made()[3:], Segments([], [], [], [])):
        assert len(empty) == 0 and list(empty) == [] == empty and empty == Segments([], [], [])
        assert empty.label.dtype == np.int64
        assert [column.tolist() for column in segments_to_table([empty])] == [[], [], [], []]


def test_tables_of_segments_and_of_lists_are_equal():
    mixed = [made(), EXPECTED[:1], made()[:0], [], made()[::-1]]
    table = segments_to_table(mixed)
    assert all(column.dtype == torch.int64 for column in table)
    assert table_to_segments(table, 5) == [
        [Segment(s.start, s.end, s.label) for s in one] for one in mixed
    ]
    for one, other in zip(table, segments_to_table(list(map(list, mixed))), strict=True):
        assert torch.equal(one, other)
    assert [len(column) for column in segments_to_table([])] == [0] * 4
    with pytest.raises(TypeError, match="must have integers .*'x'.* in sequence 1"):
        segments_to_table([made(), Segments([0], [0], ["x"])])
    whole = segments_to_table([Segments([0, 1], [0, 1], [2.0, 3.0])])
    assert whole.label.tolist() == [2, 3]


def test_tables_are_made_without_objects(monkeypatch):
    segments = made()
    monkeypatch.setattr(module, "Segment", None)
    assert table_to_segments(segments_to_table([segments]), 1, torch.ones(3))[0][1:].end[0] == 3


def test_constraints_take_segments():
    problem = random_problem(batch_size=1, num_positions=10, max_duration=6, num_labels=2)
    given = [made()[:2]], [EXPECTED[:2]], [[]]
    one, other, free = (
        log_partition(problem, "reference", constraints=Constraints(segments=segments))
        for segments in given
    )
    assert one == other < free

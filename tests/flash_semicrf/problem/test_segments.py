"""Segments, tables, labels and BIO tags, and the ways between them."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash_semicrf.problem.segments as segments_module
from flash_semicrf.problem.segments import (
    Segment,
    SegmentTable,
    ViterbiResult,
    bio_to_segments,
    covered_positions,
    labels_to_table,
    segments_to_bio,
    segments_to_table,
    table_to_labels,
    table_to_segments,
    whole_number,
)


def rows_of(table: SegmentTable) -> list[tuple[int, int, int, int]]:
    return list(zip(*(column.tolist() for column in table), strict=True))


@st.composite
def tilings(draw, max_batch=4, max_segments=6, max_duration=5, num_labels=3):
    """A batch of segmentations as lists of `Segment`."""
    batch = []
    for _ in range(draw(st.integers(1, max_batch))):
        start, sequence = 0, []
        for _ in range(draw(st.integers(1, max_segments))):
            stop = start + draw(st.integers(1, max_duration))
            label = draw(st.integers(0, num_labels - 1))
            sequence.append(Segment(start, stop - 1, label, draw(st.floats(-9, 9))))
            start = stop
        batch.append(sequence)
    return batch


@st.composite
def label_batches(draw, max_batch=4, max_length=12, num_labels=3):
    """Padded labels (B, T) and lengths (B,)."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_batch))
    rows = [draw(st.lists(st.integers(0, num_labels - 1), min_size=n, max_size=n)) for n in lengths]
    padded = [row + [-100] * (max(lengths) - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(lengths)


def test_module_exports():
    assert set(segments_module.__all__) == {
        "LongSegments",
        "Segment",
        "SegmentTable",
        "Segments",
        "ViterbiResult",
        "bio_to_segments",
        "labels_to_table",
        "limit_durations",
        "segments_to_bio",
        "segments_to_table",
        "table_to_labels",
        "table_to_segments",
    }


def test_segment_end_is_inclusive():
    segment = Segment(start=3, end=5, label=1)
    assert segment.duration == 3
    assert segment.score == 0.0
    assert segment == Segment(3, 5, 1, 0.0)
    assert Segment(4, 4, 0).duration == 1


def test_segment_pickles_and_copies():
    segment = Segment(1, 2, 3, 4.5)
    assert pickle.loads(pickle.dumps(segment)) == copy.deepcopy(segment) == segment


def test_viterbi_result_unpacks():
    scores, segments = ViterbiResult(torch.zeros(1), [[Segment(0, 0, 0)]])
    assert scores.shape == (1,) and segments[0][0].label == 0


def test_labels_to_table_takes_maximal_runs_and_ignores_padding():
    labels = torch.tensor([[1, 1, 0, 0, 0], [2, 2, 2, 2, 2], [0, 1, 0, 0, 7]])
    table = labels_to_table(labels, torch.tensor([5, 2, 4]))
    assert rows_of(table) == [
        (0, 0, 2, 1),
        (0, 2, 5, 0),
        (1, 0, 2, 2),
        (2, 0, 1, 0),
        (2, 1, 2, 1),
        (2, 2, 4, 0),
    ]
    assert all(column.dtype == torch.int64 for column in table)


def test_labels_to_table_does_not_join_sequences():
    table = labels_to_table(torch.tensor([[1, 1], [1, 1]]), torch.tensor([2, 2]))
    assert rows_of(table) == [(0, 0, 2, 1), (1, 0, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_to_table_takes_any_integer(dtype):
    table = labels_to_table(
        torch.tensor([[1, 1, 2]], dtype=dtype), torch.tensor([3], dtype=torch.int32)
    )
    assert rows_of(table) == [(0, 0, 2, 1), (0, 2, 3, 2)]
    assert table.label.dtype == torch.int64


@given(label_batches())
def test_labels_round_trip(batch):
    labels, lengths = batch
    table = labels_to_table(labels, lengths)
    back = table_to_labels(table, *labels.shape)
    inside = torch.arange(labels.shape[1]) < lengths[:, None]
    assert torch.equal(back[inside], labels[inside].long())
    assert bool((back[~inside] == -1).all())
    neighbours = (table.sequence[1:] == table.sequence[:-1]) & (table.label[1:] == table.label[:-1])
    assert not bool(neighbours.any())  # the runs are maximal


def test_split_makes_near_equal_pieces_and_warns_once():
    labels = torch.tensor([[1] * 7 + [0] * 3, [2] * 10])
    with pytest.warns(UserWarning) as caught:
        table = labels_to_table(labels, torch.tensor([10, 10]), max_duration=3)
    assert [str(warning.message) for warning in caught] == [
        "2 gold segments are longer than max_duration=3 and were split into near-equal pieces."
    ]
    assert rows_of(table) == [
        (0, 0, 2, 1),
        (0, 2, 4, 1),
        (0, 4, 7, 1),
        (0, 7, 10, 0),
        (1, 0, 2, 2),
        (1, 2, 5, 2),
        (1, 5, 7, 2),
        (1, 7, 10, 2),
    ]


def test_split_warning_names_the_callers_line():
    with pytest.warns(UserWarning) as caught:
        labels_to_table(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]), max_duration=3)
    assert caught[0].filename == __file__


@given(label_batches(), st.integers(1, 5))
def test_split_keeps_labels_and_limits_durations(batch, max_duration):
    labels, lengths = batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = labels_to_table(labels, lengths, max_duration)
    whole = labels_to_table(labels, lengths)
    duration = table.stop - table.start
    assert 1 <= int(duration.min()) and int(duration.max()) <= max_duration
    assert torch.equal(table_to_labels(table, *labels.shape), table_to_labels(whole, *labels.shape))
    # Pieces of one run differ by at most one position, and are as few as can be.
    for sequence, start, stop, _ in rows_of(whole):
        pieces = [
            b - a for s, a, b, _ in rows_of(table) if s == sequence and start <= a and b <= stop
        ]
        assert len(pieces) == -(-(stop - start) // max_duration)
        assert max(pieces) - min(pieces) <= 1


def test_no_warning_where_nothing_is_too_long():
    labels_to_table(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 1]), max_duration=3)


def test_error_names_the_first_run_that_is_too_long():
    labels = torch.tensor([[0, 1, 1, 1, 0], [2, 2, 2, 2, 2]])
    with pytest.raises(ValueError) as error:
        labels_to_table(labels, torch.tensor([5, 5]), max_duration=2, long_segments="error")
    assert str(error.value) == (
        "A gold segment is longer than `max_duration`=2: sequence 0, positions 1..3, label 1, "
        'duration 3. Raise `max_duration` or pass long_segments="split".'
    )


def test_long_segments_must_be_known():
    with pytest.raises(ValueError) as error:
        labels_to_table(torch.zeros(1, 1).long(), torch.tensor([1]), 1, long_segments="clamp")
    assert str(error.value) == '`long_segments` must be "split" or "error"; got \'clamp\'.'


@given(tilings())
def test_segments_round_trip(batch):
    table = segments_to_table(batch)
    scores = torch.tensor(
        [segment.score for sequence in batch for segment in sequence], dtype=torch.float64
    )
    assert table_to_segments(table, len(batch), scores) == batch


def test_table_to_segments_keeps_sequences_without_rows():
    table = segments_to_table([[], [Segment(0, 2, 1)], []])
    assert table_to_segments(table, 3) == [[], [Segment(0, 2, 1)], []]
    assert table_to_segments(segments_to_table([[], []]), 2) == [[], []]


@pytest.mark.parametrize("value", [4, 4.0, np.int8(4), np.float32(4), torch.tensor(4), True + 3])
def test_whole_number_of_what_stands_for_one(value):
    assert whole_number(value) == 4 and type(whole_number(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        4.9,
        "4",
        None,
        True,
        np.True_,
        torch.tensor(True),
        math.nan,
        math.inf,
        4j,
        torch.ones(1),
        [4],
    ],
)
def test_whole_number_of_what_stands_for_none(value):
    assert whole_number(value) is None
    with pytest.raises(TypeError, match="`segments` must have integers .* in sequence 1"):
        segments_to_table([[Segment(0, 3, 0)], [Segment(0, value, 0)]])


def test_table_to_labels_marks_what_no_segment_covers():
    table = segments_to_table([[Segment(1, 2, 5)], [Segment(0, 0, 3)]])
    assert table_to_labels(table, 2, 4).tolist() == [[-1, 5, 5, -1], [3, -1, -1, -1]]


@given(tilings())
def test_covered_positions_lists_every_position_once(batch):
    table = segments_to_table(batch)
    sequence, position, row = (column.tolist() for column in covered_positions(table))
    expected = [
        (b, t, i)
        for i, (b, start, stop, _) in enumerate(rows_of(table))
        for t in range(start, stop)
    ]
    assert list(zip(sequence, position, row, strict=True)) == expected


def test_table_moves_between_devices():
    table = segments_to_table([[Segment(0, 1, 0)]]).to("meta")
    assert isinstance(table, SegmentTable)
    assert all(column.device.type == "meta" for column in table)


@pytest.mark.parametrize(
    ("tags", "segments"),
    [
        ([], []),
        (["O"], [(0, 1, "O")]),
        (["B-x", "B-x"], [(0, 1, "x"), (1, 2, "x")]),
        (["I-x", "I-x"], [(0, 2, "x")]),
        (["B-x", "I-y"], [(0, 1, "x"), (1, 2, "y")]),
        (["O", "I-x", "O", "O"], [(0, 1, "O"), (1, 2, "x"), (2, 4, "O")]),
        (["B-a-b", "I-a-b"], [(0, 2, "a-b")]),
    ],
)
def test_bio_to_segments(tags, segments):
    assert bio_to_segments(tags) == segments


@pytest.mark.parametrize("tag", ["E-x", "x", "B", "B-", "I-", "", "o", None, 3, float("inf")])
def test_bio_to_segments_names_a_bad_tag(tag):
    with pytest.raises(ValueError) as error:
        bio_to_segments(["O", tag])
    assert str(error.value) == (
        f'`tags` must be "O", "B-label" or "I-label"; got {tag!r} at index 1.'
    )


@given(tilings(max_batch=1))
def test_bio_round_trip(batch):
    # Two neighbouring "O" segments are the one thing that BIO tags cannot tell from one.
    names = ["O", "x", "y"]
    segments = [(s.start, s.end + 1, names[s.label]) for s in batch[0]]
    tags = segments_to_bio(segments, segments[-1][1])
    merged = []
    for start, stop, name in segments:
        if merged and name == merged[-1][2] == "O":
            merged[-1] = (merged[-1][0], stop, name)
        else:
            merged.append((start, stop, name))
    assert bio_to_segments(tags) == merged
    assert segments_to_bio(bio_to_segments(tags), len(tags)) == tags


def test_segments_to_bio_fills_gaps():
    assert segments_to_bio([(1, 3, "x")], 4) == ["O", "B-x", "I-x", "O"]


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ((1, 2.5, "x"), r"<= length=4; got \(1, 2.5, 'x'\) at index 1"),
        ((3, 5, "x"), r"got \(3, 5, 'x'\) at index 1"),
        ((-1, 2, "x"), r"got \(-1, 2, 'x'\) at index 1"),
        ((True, 2, "x"), r"got \(True, 2, 'x'\) at index 1"),
        ((0, 2, "x"), r"must not overlap; got \(0, 2, 'x'\) at index 1"),
    ],
)
def test_segments_to_bio_refuses(segment, message):
    with pytest.raises(ValueError, match=message):
        segments_to_bio([(0, 1, "y"), segment], 4)


def test_splitting_into_single_positions_is_silent():
    table = labels_to_table(torch.zeros(1, 3).long(), torch.tensor([3]), max_duration=1)
    assert table.start.tolist() == [0, 1, 2]  # warnings are errors

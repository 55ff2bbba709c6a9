"""y in the forms that people and files have it, and what is not taken for a label or a bound."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from flash_semicrf.problem.segments import Segment, Segments
from sklearn_api import as_sequences
from sklearn_api._inputs.sequences import Layout, object_array
from sklearn_api._inputs.targets import check_y
from sklearn_api.metrics import segment_precision_recall_f1

ROWS = [[(0, 2, "a"), (2, 3, "a")], [(0, 2, "b")]]
LABELS = [["a", "a", "b"], ["b", "b"]]


def layout(*lengths, kind="many"):
    return Layout(kind, np.array(lengths))


def pandas():
    return pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")


def frame_of(rows):
    return pandas().DataFrame(rows, columns=["start", "stop", "label"])


SEGMENTS = {
    "lists, as of JSON": [[list(row) for row in rows] for rows in ROWS],
    "object rows": [np.array(rows, dtype=object) for rows in ROWS],
    "whole floats": [[(float(a), np.float32(b), c) for a, b, c in rows] for rows in ROWS],
    "object arrays of tuples": list(map(object_array, ROWS)),
    "a generator": (rows for rows in ROWS),
    "as_sequences": as_sequences(ROWS),
    "as_sequences of lists": as_sequences([[list(row) for row in rows] for rows in ROWS]),
}


@pytest.mark.parametrize("form", SEGMENTS)
def test_check_y_reads_segments_of_any_form(form):
    gold = check_y(SEGMENTS[form], layout(3, 2))
    assert gold.start.tolist() == [0, 2, 0] and gold.stop.tolist() == [2, 3, 2]
    assert gold.labels.tolist() == ["a", "a", "b"]


def test_check_y_reads_segments_of_frames_and_integers():
    gold = check_y(list(map(frame_of, ROWS)), layout(3, 2))
    assert gold.stop.tolist() == [2, 3, 2] and gold.labels.tolist() == ["a", "a", "b"]
    for rows in ([[0, 2, 7], [2, 3, 5]], np.array([[0, 2, 7], [2, 3, 5]])):
        assert check_y(rows, layout(3, kind="single")).labels.tolist() == [7, 5]
        scores = segment_precision_recall_f1([rows], [[(0, 2, 7), (2, 3, 5)]])
        assert scores.f1 == 1
    assert segment_precision_recall_f1([[0, 2, "x"], [2, 3, "y"]], ["x", "x", "y"]).f1 == 1


def test_check_y_of_series_goes_by_position():
    pd = pandas()
    index = pd.date_range("2026-01-01", periods=5)
    flat = pd.Series(LABELS[0] + LABELS[1], index=index)
    assert check_y(flat, layout(5, kind="single")).stop.tolist() == [2, 5]
    assert check_y(flat, layout(3, 2, kind="groups")).sequence.tolist() == [0, 0, 1]
    many = pd.Series(list(map(np.array, LABELS)), index=[4, 9])
    assert check_y(many, layout(3, 2)).labels.tolist() == ["a", "b", "b"]
    parts = [pd.Series(one, index=index[: len(one)], dtype="category") for one in LABELS]
    assert check_y(parts, layout(3, 2)).labels.tolist() == ["a", "b", "b"]


@pytest.mark.parametrize(
    "bound", [4.9, np.float64(4.5), "5", None, True, np.True_, np.nan, np.inf, 5 + 0j]
)
@pytest.mark.parametrize("place", [0, 1])
def test_bounds_of_segments_are_whole_numbers(bound, place):
    row = [0, 5, "a"]
    row[place] = bound
    with pytest.raises(TypeError, match=r"got \(.*, 'a'\) as segment 1 of sequence 1"):
        check_y([[(0, 3, "a")], [(0, 1, "b"), tuple(row)]], layout(3, 6))
    with pytest.raises(TypeError, match=r"`y_pred` must be .*, 'a'\) as segment 1 of sequence 1"):
        rows = [[(0, 3, "a")], [(0, 1, "b"), tuple(row)]]
        segment_precision_recall_f1([["a"] * 3, ["a"] * 5], rows)
    if place == 1:
        with pytest.raises(TypeError, match="as segment 0 of sequence 0"):
            check_y([[Segment(0, bound, "a")]], layout(6))


MIXED = "`y` must hold labels of one kind: strings, whole numbers or bools; got "
REFUSED = {
    "strings after numbers": ([[0, 1, "a"], [1, 1]], MIXED + "'a' at position 2 of sequence 0"),
    "bools among numbers": ([[0, 1, True], [1, 1]], MIXED + "True at position 2 of sequence 0"),
    "kinds by sequence": ([[0, 1, 1], ["a", "b"]], "got numbers in sequence 0 and strings in sequ"),
    "kinds by segment": (
        [[(0, 3, 0)], [(0, 2, "a")]],
        MIXED + "'a' at positions 0..1 of sequence 1",
    ),
    "None": ([["a", "a", "b"], ["a", None]], MIXED + "None at position 1 of sequence 1"),
    "NaN among strings": ([["a", np.nan, "b"], ["a", "a"]], MIXED + "nan at position 1 of sequ"),
    "NaN": (
        [np.array([0, 1, np.nan]), [1, 1]],
        "Input y contains NaN. .* position 2 of sequence 0",
    ),
    "continuous": ([[0, 1, 1.5], [1, 1]], "continuous. .* got 1.5 at position 2 of sequence 0"),
    "dates": ([np.array(["2026"] * 3, "M8[Y]"), [1, 1]], MIXED + ".*2026.* at position 0"),
    "segments, then labels": (
        [[(0, 3, "a")], ["a", "a"]],
        "segments in sequence 0 and labels in s",
    ),
    "labels, then segments": ([["a"] * 3, [(0, 2, "a")]], "segments in sequence 1 and labels in s"),
    "both in one": ([[(0, 2, "a"), "b"], ["a", "a"]], "the label 'b' in sequence 0"),
    "no segments": ([[], [(0, 2, "a")]], "Sequence 0 has 3 positions .* no labels or segments"),
    "beyond the end": (
        [[(0, 3, "a")], [(0, 5, "b")]],
        "sequence 1 .* 0..1 in order; expected one that ends there, got positions 0..4",
    ),
    "matrix": ([np.zeros((3, 2)), [1, 1]], r"Sequence 0 of `y` .* \(N, 3\) .*; got shape \(3, 2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_y_names_what_is_wrong_and_where(case):
    y, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_y(y, layout(3, 2))


@pytest.mark.parametrize("missing", ["string", "Int64", "Float64"])
def test_check_y_of_a_missing_value_of_pandas(missing):
    pd = pandas()
    values = ["a", "b", pd.NA] if missing == "string" else [1, 2, pd.NA]
    with pytest.raises(ValueError, match="got (nan|<NA>) at position 2 of sequence 0"):
        check_y([pd.Series(values, dtype=missing)], layout(3))


@pytest.mark.parametrize("y", [3, {1, 2}, {"a": [0]}, "aab"])
def test_check_y_refuses_what_holds_no_sequences(y):
    with pytest.raises(TypeError, match="`y` must hold labels or segments, nested as `X`; got"):
        check_y(y, layout(3))
    with pytest.raises(TypeError, match="Sequence 0 of `y` must be a list or array; got"):
        check_y([y], layout(3))


def test_check_y_takes_segments_in_every_layout():
    one, two = Segments([0, 3], [2, 3], ["a", "b"]), Segments([0], [1], ["a"])
    for kind in ("single", "groups", "many"):
        gold = check_y(one if kind == "single" else [one], layout(4, kind=kind))
        assert (gold.start.tolist(), gold.stop.tolist()) == ([0, 3], [3, 4])
        assert gold.labels.tolist() == ["a", "b"]
    gold = check_y([one, two], layout(4, 2))
    assert gold.sequence.tolist() == [0, 0, 1] and gold.stop.tolist() == [3, 4, 2]
    assert check_y([Segments([0], [1], [7])], layout(2)).labels.tolist() == [7]
    assert check_y(as_sequences([one, list(two)]), layout(4, 2)).stop.tolist() == [3, 4, 2]


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (Segments([0, 3], [2, 2], [0, 1]), ValueError, "start=3 and end=3 as segment 1 of seq"),
        (Segments([-1], [2], [0]), ValueError, "start=-1 and end=3 as segment 0 of sequence 0"),
        (Segments([0], [3], [None]), TypeError, "must be .int, int, str or number.; got Segment"),
        (Segments([0], [3], [float("nan")]), TypeError, "must be .int, int, str or number."),
        (Segments([0], [2], [0]), ValueError, "must tile its 4 positions; they end after 3"),
        (Segments([], [], []), ValueError, "has 4 positions .* no labels or segments"),
    ],
)
def test_check_y_refuses_segments_as_it_refuses_lists_of_them(segments, error, message):
    for y in (segments, list(segments)):
        with pytest.raises(error, match=message):
            check_y([y], layout(4))


def test_check_y_of_several_sequences_for_one():
    with pytest.raises(ValueError, match=r"one sequence of 4 positions.*x.reshape\(-1, 1\)"):
        check_y([np.zeros(9), np.ones(9)], layout(4, kind="single"))


def test_check_y_takes_few_positions_without_a_warning():
    # scikit-learn takes many distinct labels among few for a regression, and warns.
    assert len(check_y([np.arange(30)], layout(30)).labels) == 30
    assert check_y(deque([[0, 1], [1, 1]]), layout(2, 2)).labels.tolist() == [0, 1, 1]


def test_check_y_warns_of_the_label_for_unknown():
    with pytest.warns(UserWarning, match="-100 at 2 positions"):
        check_y([[-100, -100, 1]], layout(3))
    check_y([["-100", "a"]], layout(2))


def test_bio_tags_name_the_sequence_and_the_position():
    for tag in ("X-a", None, 3):
        with pytest.raises(ValueError, match="(index|position) 1( of sequence 1|.$)"):
            check_y([["O"], ["O", tag]], layout(1, 2), tagging="bio")
    with pytest.raises(
        ValueError, match='With tagging="bio", sequence 1 of `y`: .*got .b. at index'
    ):
        check_y([["O"], ["O", "b"]], layout(1, 2), tagging="bio")


def test_as_sequences_keeps_the_kinds_of_labels():
    with pytest.raises(
        ValueError, match="`items` must hold .* got 'a' at position 1 of sequence 1"
    ):
        as_sequences([[0, 1], [0, "a"]])


def test_as_sequences_by_groups():
    groups = [7, 7, 9]
    assert [x.tolist() for x in as_sequences(np.eye(3)[:, :1], groups)] == [[[1], [0]], [[0]]]
    labels = pandas().Series(["a", "b", "b"], index=[3, 4, 5])
    assert [list(one) for one in as_sequences(labels, groups)] == [["a", "b"], ["b"]]
    with pytest.raises(ValueError, match="id 7 of `groups` appears again at row 2"):
        as_sequences(["a", "b", "c"], [7, 9, 7])

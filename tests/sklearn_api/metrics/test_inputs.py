"""Forms of input that the metrics accept, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.exceptions import UndefinedMetricWarning

from flash_semicrf.problem.segments import Segment, Segments
from sklearn_api.metrics import (
    boundary_errors,
    boundary_precision_recall_f1,
    covering,
    frame_error_rate,
    segment_error_rate,
    segment_precision_recall_f1,
)

METRICS = [
    segment_precision_recall_f1,
    boundary_precision_recall_f1,
    segment_error_rate,
    frame_error_rate,
    covering,
]


def as_object_array(sequences):
    packed = np.empty(len(sequences), dtype=object)
    for i, sequence in enumerate(sequences):
        packed[i] = sequence
    return packed


# ---- forms of input


LABELS = [["a", "a", "b"], ["b", "c"]]
FORMS = {
    "lists": LABELS,
    "arrays": [np.array(s) for s in LABELS],
    "object array": as_object_array([np.array(s) for s in LABELS]),
    "object labels": [np.array(s, dtype=object) for s in LABELS],
    "tuple of lists": tuple(LABELS),
    "segments": [[(0, 2, "a"), (2, 3, "b")], [(0, 1, "b"), (1, 2, "c")]],
    "unordered segments": [[(2, 3, "b"), (0, 2, "a")], [(0, 1, "b"), (1, 2, "c")]],
    "Segment objects": [
        [Segment(0, 1, np.str_("a")), Segment(2, 2, "b")],
        [Segment(0, 0, "b"), Segment(1, 1, "c")],
    ],
    "Segments": [Segments([0, 2], [1, 2], ["a", "b"]), Segments([0, 1], [0, 1], ["b", "c"])],
    "unordered Segments": [
        Segments([2, 0], [2, 1], ["b", np.str_("a")]),
        Segments([0, 1], [0, 1], ["b", "c"]),
    ],
    "numpy ends": [[(np.int64(0), 2, np.str_("a")), (2, 3, "b")], [(0, 1, "b"), (1, 2, "c")]],
}


@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("two", FORMS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_form_gives_the_same(metric, one, two):
    got = metric(FORMS[one], FORMS[two])
    assert got == metric(LABELS, LABELS)


@pytest.mark.parametrize(
    ("y_true", "y_pred"),
    [
        ([0, 0, 1], [0, 1, 1]),
        (np.array([0, 0, 1]), np.array([0, 1, 1], dtype=np.int8)),
        (np.array([0.0, 0.0, 1.0]), [0, 1, 1]),
        (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])),
        ([torch.tensor([0, 0, 1])], [torch.tensor([0, 1, 1])]),
        (np.array([[0, 0, 1]]), np.array([[0, 1, 1]])),
        (np.array([False, False, True]), np.array([False, True, True])),
        ([(0, 2, 0), (2, 3, 1)], [(0, 1, 0), (1, 3, 1)]),
        (np.array([0, 0, 1]), [(0, 1, 0), (1, 3, 1)]),
        (np.array([0, 0, 1]), [Segment(0, 0, 0), Segment(1, 2, 1)]),
        (np.array([0, 0, 1]), Segments([0, 1], [0, 2], [0, 1])),
        (Segments([0, 2], [1, 2], [0, 1]), Segments([0, 1], [0, 2], [0, 1])),
        (np.array(["x", "x", "y"], dtype=object), ["x", "y", "y"]),
    ],
)
def test_one_sequence_forms(y_true, y_pred):
    assert frame_error_rate(y_true, y_pred) == pytest.approx(1 / 3)
    assert segment_precision_recall_f1(y_true, y_pred) == (0, 0, 0)
    assert segment_precision_recall_f1(y_true, y_pred, tolerance=1) == (1, 1, 1)


def test_two_dimensional_array_is_one_sequence_per_row():
    y_true = np.array([[0, 1, 2], [0, 1, 2]])
    y_pred = np.array([[0, 1, 2], [2, 1, 0]])
    assert segment_precision_recall_f1(y_true, y_pred).f1 == pytest.approx(4 / 6)


def test_empty_list_is_a_sequence_without_segments():
    with pytest.warns(UndefinedMetricWarning):
        assert boundary_precision_recall_f1(["a", "b"], []).recall == 0
    with pytest.warns(UndefinedMetricWarning):
        assert boundary_precision_recall_f1(["a", "b"], Segments([], [], [])).recall == 0
    with pytest.warns(UndefinedMetricWarning):
        assert boundary_precision_recall_f1([], ["a", "b"]).precision == 0
    scores = segment_precision_recall_f1([[(0, 2, "a")], []], [[(0, 2, "a")], [(0, 1, "a")]])
    assert scores == (0.5, 1, pytest.approx(2 / 3))


# ---- refusals


@pytest.mark.parametrize("metric", [*METRICS, lambda t, p: boundary_errors(t, p, tolerance=1)])
@pytest.mark.parametrize(
    ("y_true", "y_pred", "error", "message"),
    [
        (
            [["a"], ["a", "b", "b"]],
            [["a"], ["a", "b"]],
            ValueError,
            r"`y_true` and `y_pred` must have the same number of positions; got 3 and 2 at "
            r"sequence 1\.",
        ),
        (
            [["a"], ["b"]],
            [["a"]],
            ValueError,
            r"must hold the same number of sequences; got 2 and 1\.",
        ),
        ([], [], ValueError, r"must hold at least one sequence; got 0\."),
        (
            ["a", "b"],
            [0, 1],
            ValueError,
            r"must hold labels of one kind; got strings and numbers\.",
        ),
        (
            [["a"], [1]],
            [["a"], ["b"]],
            ValueError,
            r"`y_true` must hold labels of one kind; got strings, then 1 at sequence 1\.",
        ),
        (
            ["a", 1],
            ["a", "b"],
            TypeError,
            r"`y_true` must hold strings only or numbers only; got 1 at position 1 of sequence 0\.",
        ),
        (
            np.array([0.0, np.nan]),
            [0, 1],
            ValueError,
            r"`y_true` must not contain NaN; got NaN at position 1 of sequence 0\.",
        ),
        (
            [0, 1],
            [0, float("nan")],
            TypeError,
            r"`y_pred` must hold strings only or numbers only; got nan at position 1",
        ),
        (
            [np.array(["a"]), np.array([], dtype=str)],
            [["a"], ["b"]],
            ValueError,
            r"`y_true` must have labels of shape \(T,\) with T >= 1 per sequence; got shape "
            r"\(0,\) at sequence 1\.",
        ),
        (
            [np.zeros((3, 2))],
            [[0, 1, 1]],
            ValueError,
            r"`y_true` must have labels of shape \(T,\).*; got shape \(3, 2\) at sequence 0\.",
        ),
        (np.zeros((2, 2, 2)), [0], ValueError, r"1 dimension .* or 2 .*; got 3\."),
        ("abc", "abc", TypeError, r"`y_true` must be an array or a list; got str\."),
        (["a"], {"a": 1}, TypeError, r"`y_pred` must be an array or a list; got dict\."),
        (
            [["a"], "b"],
            [["a"], ["b"]],
            TypeError,
            r"`y_true` must hold one array or list per sequence; got 'b' at sequence 1\.",
        ),
        (
            np.array([1j]),
            [0],
            TypeError,
            r"`y_true` must hold strings or numbers; got dtype complex128 at sequence 0\.",
        ),
        (
            [(0, 3, "a"), (2, 5, "b")],
            [(0, 5, "a")],
            ValueError,
            r"`y_true` must not overlap; got one that starts at 2 before another ends at 3 in "
            r"sequence 0\.",
        ),
        (
            [(0, 5, "a")],
            [(0, 3, "a"), (4, 4, "b")],
            ValueError,
            r"`y_pred` must have 0 <= start < end; got start=4 and end=4 as segment 1 of "
            r"sequence 0\.",
        ),
        (
            [[(0, 5, "a")]],
            [[(-1, 3, "a")]],
            ValueError,
            r"`y_pred` must have 0 <= start < end; got start=-1 and end=3 as segment 0",
        ),
        (
            [[(0, 5, "a")]],
            [[(0.5, 3, "a")]],
            TypeError,
            r"`y_pred` must be \(int, int, str or number\); got \(0\.5, 3, 'a'\) as segment 0",
        ),
        (
            [[(0, 5, "a")]],
            [[(0, 5, "a", 0.3)]],
            TypeError,
            r"`y_pred` must be \(start, end, label\) tuples with an exclusive end; got "
            r"\(0, 5, 'a', 0\.3\) as segment 0 of sequence 0\.",
        ),
        (
            [Segment(0, 4, 1), Segment(4, 6, 0)],
            [(0, 5, 1)],
            ValueError,
            r"`y_true` must not overlap; got one that starts at 4 before another ends at 5 in ",
        ),
        (
            ["a", "a"],
            [(0, 5, "a")],
            ValueError,
            r"Segments of `y_pred` must end at or before the length of the sequence, 2; got 5 at "
            r"sequence 0\.",
        ),
    ],
)
def test_metrics_refuse(metric, y_true, y_pred, error, message):
    with pytest.raises(error, match=message):
        metric(y_true, y_pred)


@pytest.mark.parametrize("metric", [segment_precision_recall_f1, boundary_precision_recall_f1])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": -1}, ValueError, r"`tolerance` must be a number of .* >= 0; got -1\."),
        ({"tolerance": "1"}, ValueError, r"`tolerance` must be a number .* >= 0; got '1'\."),
        ({"tolerance": np.nan}, ValueError, r"`tolerance` must be .* >= 0; got nan\."),
        ({"average": "weighted"}, ValueError, r"`average` must be .*; got 'weighted'\."),
        ({"zero_division": 2}, ValueError, r"`zero_division` must be .*; got 2\."),
        ({"labels": "ab"}, TypeError, r"`labels` must be a list of labels; got 'ab'\."),
        ({"labels": []}, ValueError, r"`labels` must name at least one label; got an empty list"),
        ({"labels": ["a", "a"]}, ValueError, r"must not repeat a label; got 'a' again at index 1"),
        ({"labels": ["a", 0]}, ValueError, r"`labels\[1\]` must be a string like .*; got 0\."),
        (
            {"labels": ["a"], "ignore_label": "a"},
            ValueError,
            r"`labels` must not contain `ignore_label`; got 'a' in both\.",
        ),
        ({"ignore_label": 0}, ValueError, r"`ignore_label` must be a string like .*; got 0\."),
        ({"ignore_label": ["a"]}, TypeError, r"`ignore_label` must be one label, .*; got \['a'\]"),
    ],
)
def test_scores_refuse_options(metric, options, error, message):
    with pytest.raises(error, match=message):
        metric(["a", "b"], ["a", "b"], **options)


def test_boundary_kind_is_checked():
    with pytest.raises(ValueError, match=r"`kind` must be 'onset', 'offset' or 'both'; got 'end'"):
        boundary_precision_recall_f1(["a"], ["a"], kind="end")
    with pytest.raises(ValueError, match=r"`kind` must be .*; got None\."):
        boundary_errors(["a"], ["a"], tolerance=1, kind=None)


@pytest.mark.parametrize("metric", [segment_error_rate, frame_error_rate, covering])
def test_ignore_label_is_checked(metric):
    with pytest.raises(ValueError, match=r"`ignore_label` must be a number like .*; got 'a'\."):
        metric([0, 1], [0, 1], ignore_label="a")


def test_frame_error_rate_refuses_gaps():
    message = (
        r"Segments of `y_pred` must cover positions 0 to 5 without a gap; got none from 2 to 3"
    )
    with pytest.raises(ValueError, match=message):
        frame_error_rate(list("aabbb"), [(0, 2, "a"), (3, 5, "b")])
    with pytest.raises(ValueError, match=r"`y_true` .* positions 0 to 5 .* from 4 to 5 at sequen"):
        frame_error_rate([(0, 4, "a")], [(0, 5, "a")])
    with pytest.raises(ValueError, match=r"at least one position to divide by; got 0"):
        frame_error_rate(["a"], ["a"], ignore_label="a")

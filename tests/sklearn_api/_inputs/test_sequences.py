"""Ragged X and y: forms, layouts, segments and the messages for bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator

from flash_semicrf.problem.segments import Segment
from sklearn_api._inputs.sequences import Layout, check_X, object_array
from sklearn_api._inputs.targets import check_y, encode_labels


class Holder(BaseEstimator):
    """Something for check_X to set n_features_in_ on."""


def ragged(*lengths, num_features=2):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, num_features)) for n in lengths]


def checked(X, groups=None, **kwargs):
    return check_X(Holder(), X, groups, reset=True, **kwargs)


def layout(*lengths, kind="many"):
    return Layout(kind, np.array(lengths))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", [list, tuple, object_array])
def test_check_X_many_forms(form, dtype):
    X = ragged(3, 5)
    sequences = checked(form(X), dtype=dtype)
    assert sequences.layout.kind == "many"
    assert sequences.lengths.tolist() == [3, 5]
    for value, x in zip(sequences.values, X, strict=True):
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, x.astype(dtype))


@pytest.mark.parametrize("convert", [torch.from_numpy, np.ndarray.tolist])
def test_check_X_converts_each_sequence(convert):
    X = ragged(3, 5)
    sequences = checked([convert(x) for x in X])
    np.testing.assert_allclose(sequences.values[1], X[1], rtol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((4, 3, 2)), torch.zeros(4, 3, 2)])
def test_check_X_three_dimensions(array):
    sequences = checked(array)
    assert sequences.layout.kind == "many"
    assert sequences.lengths.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("convert", [np.asarray, np.ndarray.tolist, torch.from_numpy])
def test_check_X_two_dimensions_are_one_sequence(convert):
    sequences = checked(convert(ragged(4)[0]))
    assert sequences.layout.kind == "single"
    assert sequences.lengths.tolist() == [4]


def test_check_X_groups_split_rows():
    x = ragged(6)[0]
    sequences = checked(x, groups=["b", "b", "a", "a", "a", "c"])
    assert sequences.lengths.tolist() == [2, 3, 1]
    np.testing.assert_array_equal(np.concatenate(sequences.values), x.astype(np.float32))
    restored = sequences.layout.restore([value[:, 0] for value in sequences.values])
    np.testing.assert_array_equal(restored, x[:, 0].astype(np.float32))


@pytest.mark.parametrize("nest", [lambda frame: frame, lambda frame: [frame]])
def test_check_X_remembers_feature_names(nest):
    pd = pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")
    holder = Holder()
    check_X(holder, nest(pd.DataFrame({"a": [1.0], "b": [2.0]})), reset=True)
    assert holder.feature_names_in_.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="feature names should match"):
        check_X(holder, nest(pd.DataFrame({"a": [1.0], "c": [2.0]})))


def test_layout_restore_keeps_equal_lengths_apart():
    outputs = layout(2, 2).restore([np.zeros(2), np.ones(2)])
    assert outputs.shape == (2,) and outputs.dtype == object


@pytest.mark.parametrize(
    ("X", "groups", "message"),
    [
        ([], None, "`X` must hold at least 1 sequence; got 0 sequences"),
        (
            [np.zeros((2, 3)), np.zeros((4, 5))],
            None,
            "must have 3 features, as in sequence 0; got 5",
        ),
        (
            [np.zeros((2, 3)), np.zeros((0, 3))],
            None,
            "Sequence 1 of `X`: Found array with 0 sample",
        ),
        (
            [np.zeros((2, 3)), np.full((2, 3), np.nan)],
            None,
            "Sequence 1 of `X`: Input X contains NaN",
        ),
        ([np.zeros((2, 3)), np.full((1, 3), np.inf)], None, "Sequence 1 of `X`: .* infinity"),
        ([np.zeros((2, 3)), np.zeros(3)], None, "Sequence 1 of `X`: Expected 2D array"),
        (np.zeros((3, 2)), [0, 0], "`groups` must have one id per row of `X`: 3; got 2"),
        (np.zeros((3, 2)), 3, r"one id per row of `X`: 3; got shape \(\)"),
        (np.zeros((3, 2)), [0, 1, 0], "id 0 of `groups` appears again at row 2"),
        ([np.zeros((3, 2))], [0, 0, 0], "`X` already holds 1 sequences"),
    ],
)
def test_check_X_bad_input(X, groups, message):
    with pytest.raises(ValueError, match=message):
        checked(X, groups)


def test_check_X_number_of_features_as_in_fit():
    holder = Holder()
    check_X(holder, ragged(3), reset=True)
    with pytest.raises(ValueError, match="must have 2 features, as in fit; got 3 in sequence 1"):
        check_X(holder, [np.zeros((2, 2)), np.zeros((2, 3))])


def test_check_y_runs_do_not_cross_sequences():
    gold = check_y([["a", "a", "b"], ["b", "b"]], layout(3, 2))
    assert gold.sequence.tolist() == [0, 0, 1]
    assert gold.start.tolist() == [0, 2, 0]
    assert gold.stop.tolist() == [2, 3, 2]
    assert gold.labels.tolist() == ["a", "b", "b"]
    assert gold.position_labels.tolist() == ["a", "a", "b", "b", "b"]


@pytest.mark.parametrize(
    "segments",
    [
        [[(0, 2, "a"), (2, 3, "a")], [(0, 2, "b")]],
        [[Segment(0, 1, "a"), Segment(2, 2, "a")], [Segment(0, 1, "b")]],
    ],
)
def test_check_y_segments_keep_neighbours_apart(segments):
    gold = check_y(segments, layout(3, 2))
    assert gold.start.tolist() == [0, 2, 0]
    assert gold.stop.tolist() == [2, 3, 2]
    assert gold.labels.tolist() == ["a", "a", "b"]


def test_check_y_single_and_groups():
    assert check_y([1, 1, 2], layout(3, kind="single")).labels.tolist() == [1, 2]
    assert check_y([(0, 3, "x")], layout(3, kind="single")).stop.tolist() == [3]
    gold = check_y(np.array([1, 1, 1]), layout(2, 1, kind="groups"))
    assert gold.sequence.tolist() == [0, 1]
    gold = check_y([[(0, 2, 5)], [(0, 1, 5)]], layout(2, 1, kind="groups"))
    assert gold.stop.tolist() == [2, 1]
    assert check_y(torch.tensor([[1, 2], [2, 2]]), layout(2, 2)).labels.tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("y", "lengths", "message"),
    [
        (None, (2,), "requires y to be passed"),
        ([[0, 1]], (2, 2), "one entry per sequence of `X`: 2; got 1"),
        ([[0, 1], [0]], (2, 2), "Sequence 1 has 2 positions in `X` and 1 labels in `y`"),
        ([[0.5, 1.2], [0, 1]], (2, 2), "Unknown label type"),
        ([[0, np.nan], [0, 1]], (2, 2), "Input y contains NaN"),
        ([[[0], [1]], [[[0]]]], (2, 1), "Sequence 1 of `y`"),
        ([[(0, 1, "a"), (2, 3, "b")]], (3,), "starts at 1, got positions 2..2 with label 'b'"),
        ([[(0, 4, "a")]], (3,), "must tile positions 0..2 in order"),
        ([[(0, 2, "a")]], (3,), "must tile its 3 positions; they end after 2"),
    ],
)
def test_check_y_bad_input(y, lengths, message):
    with pytest.raises(ValueError, match=message):
        check_y(y, layout(*lengths))


def test_encode_labels_by_index_among_the_classes():
    gold = check_y([["b", "a"], ["c"]], layout(2, 1))
    classes = np.array(["a", "b", "c"])
    table = encode_labels(gold, classes)
    assert table.label.tolist() == [1, 0, 2]
    assert table.sequence.dtype == torch.int64
    assert classes[table.label.numpy()].tolist() == ["b", "a", "c"]


@pytest.mark.parametrize("label", ["z", 7])
def test_encode_labels_unseen_label(label):
    gold = check_y([[label], [label]], layout(1, 1))
    with pytest.raises(ValueError, match=f"only the classes .*; got {label!r} in sequence"):
        encode_labels(gold, np.array(["a", "b"]))

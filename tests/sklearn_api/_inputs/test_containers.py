"""Containers of X: which forms hold sequences, and the messages for the others."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator

from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.sequences import check_X, object_array


def sequences():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).round(2) for n in (3, 5, 3)]


class Frame:
    """As much of a frame as polars has: a shape and columns, no `ndim`."""

    def __init__(self, array):
        self.array, self.shape, self.columns = array, array.shape, ["u", "v"]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype=dtype)

    def __len__(self):
        return len(self.array)


def series(X):
    pd = pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")
    return pd.Series(X, index=range(7, 7 + len(X)))


FORMS = {
    "deque": deque,
    "dict values": lambda X: dict(enumerate(X)).values(),
    "generator": lambda X: (x for x in X),
    "map": lambda X: map(np.asarray, X),
    "object array": object_array,
    "Series of arrays": series,
    "tuple of frames": lambda X: tuple(map(Frame, X)),
    "masked arrays": lambda X: [np.ma.masked_greater(x, 99) for x in X],
    "nested lists": lambda X: [x.tolist() for x in X],
    "bfloat16": lambda X: [torch.from_numpy(x).bfloat16() for x in X],
    "lists of rows": lambda X: [list(x) for x in X],
}


@pytest.mark.parametrize("form", FORMS)
def test_check_X_takes_any_ordered_collection(form):
    X = sequences()
    found = check_X(BaseEstimator(), FORMS[form](X), reset=True)
    assert found.layout.kind == "many"
    for value, x in zip(found.values, X, strict=True):
        expected = torch.from_numpy(x).bfloat16().float() if form == "bfloat16" else x
        np.testing.assert_array_equal(value, np.asarray(expected, dtype=np.float32))


BAD = {
    "dict": (dict(enumerate(sequences())), TypeError, "ordered collection .*; got a dict"),
    "set": ({1, 2}, TypeError, "got a set"),
    "string": ("abc", TypeError, "got 'abc'"),
    "None": (None, TypeError, "got None"),
    "number": (3, TypeError, "got 3"),
    "1-D array": (np.zeros(4), ValueError, r"shape \(4,\)\. Reshape .* `x.reshape\(-1, 1\)`"),
    "list of numbers": ([1.0, 2.0], ValueError, r"shape \(2,\)\. Reshape your data"),
    "4-D array": (np.zeros((1, 2, 3, 4)), ValueError, r"got an array of shape \(1, 2, 3, 4\)\.$"),
    "signals of equal length": (
        [np.zeros(4), np.zeros(4)],
        ValueError,
        r"list of 1-D arrays.*`\[x.reshape\(-1, 1\) for x in X\]`",
    ),
    "ragged signals": ([[1.0, 2.0], [1.0]], ValueError, r"1-D arrays.*x.reshape\(-1, 1\)"),
    "a signal among sequences": (
        [np.zeros((4, 1)), np.zeros(4)],
        ValueError,
        r"Sequence 1 of `X`: .*got \(4,\)\. .*x.reshape\(-1, 1\)",
    ),
    "dicts": (
        [[{"w": "a"}], [{"w": "b"}]],
        TypeError,
        r"got \{'w': 'a'\} at position 0 of sequence 0. .*TokenFeatures",
    ),
    "words": ([["a", "b"], ["c", "d"]], TypeError, "got 'a' at position 0 .*TokenFeatures"),
    "texts": (["a b", "c"], TypeError, "got 'a b' at index 0.*TokenFeatures"),
    "masked": (
        [np.ma.masked_less(np.arange(4.0).reshape(2, 2), 1)],
        ValueError,
        r"`X\[0\]` must not mask entries.* index \(0, 0\)",
    ),
    "sparse tensor": (torch.eye(2).to_sparse(), ValueError, "layout torch.sparse_coo"),
    "NaN": (
        [np.zeros((2, 2)), np.array([[0, 0], [0, np.nan]])],
        ValueError,
        r"Sequence 1 of `X`: Input X contains NaN, at position 1, feature 1; .*SimpleImputer",
    ),
    "infinity in one sequence": (
        np.array([[0.0, -np.inf]]),
        ValueError,
        "Sequence 0 of `X`: Input X contains infinity, at position 0, feature 1",
    ),
    "NaN in a sparse one": (
        [sp.csr_array([[0.0, 1.0], [0.0, 0.0], [np.nan, 0.0]])],
        ValueError,
        "NaN, at position 2, feature 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_check_X_refuses_in_its_own_words(case):
    X, error, message = BAD[case]
    with pytest.raises(error, match=message) as raised:
        check_X(BaseEstimator(), X, reset=True, accept_sparse=True)
    assert "HistGradient" not in str(raised.value)
    assert "reshape(1, -1)" not in str(raised.value)


def test_read_layout_of_what_has_no_features_yet():
    assert read_layout([[{"w": 1}], [{"w": 2}, {"w": 3}]]).lengths.tolist() == [1, 2]
    assert read_layout([["a", "b"], ["c", "d"]]).lengths.tolist() == [2, 2]
    assert read_layout([np.zeros(3), np.zeros(3)]).lengths.tolist() == [3, 3]
    assert read_layout(np.zeros(4)).lengths.tolist() == [4]
    assert read_layout([[1, 2], [3, 4], [5, 6]]).lengths.tolist() == [3]


NAMES = ["u", "v"]


def frames(*columns):
    pd = pytest.importorskip("pandas", reason="pandas is optional (in the test extra)")
    return [
        x if names is None else pd.DataFrame(x, columns=names)
        for x, names in zip(sequences(), columns, strict=True)
    ]


def test_check_X_compares_feature_names_of_every_sequence():
    holder = BaseEstimator()
    with pytest.raises(ValueError, match="those of sequence 0, .* got 'v' where 'u' .*sequence 2"):
        check_X(holder, frames(NAMES, NAMES, NAMES[::-1]), reset=True)
    check_X(holder, frames(NAMES, NAMES, NAMES), reset=True)
    assert holder.feature_names_in_.tolist() == NAMES
    with pytest.raises(ValueError, match="those of fit, .* got 'w' where 'v' .* of sequence 1"):
        check_X(holder, frames(NAMES, ["u", "w"], NAMES))


@pytest.mark.parametrize("place", [0, 1])
def test_check_X_warns_where_only_some_sequences_have_names(place):
    columns = [NAMES, NAMES, NAMES]
    columns[place] = None
    holder = BaseEstimator()
    with pytest.warns(UserWarning, match=f"Sequence {place} of `X` has no feature names, unlike"):
        check_X(holder, frames(*columns), reset=True)
    assert holder.feature_names_in_.tolist() == NAMES
    with pytest.warns(UserWarning, match=f"Sequence {place} of .* unlike fit"):
        check_X(holder, frames(*columns))
    check_X(holder, sequences(), reset=True)
    assert not hasattr(holder, "feature_names_in_")
    with pytest.warns(UserWarning, match="BaseEstimator was fitted without them"):
        check_X(holder, frames(None, NAMES, None))


@pytest.mark.parametrize("missing", [None, np.nan])
def test_check_X_groups_without_an_id(missing):
    groups = np.array([1, 1, missing], dtype=object)
    with pytest.raises(ValueError, match="an id for every row of `X`; got .* at row 2"):
        check_X(BaseEstimator(), np.zeros((3, 1)), groups, reset=True)
    mixed = np.array([1, "a", "a"], dtype=object)  # ids need not be sortable
    assert check_X(BaseEstimator(), np.zeros((3, 1)), mixed, reset=True).lengths.tolist() == [1, 2]

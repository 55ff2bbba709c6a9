"""`as_sequences`: what scikit-learn's tools can index and split."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split

from sklearn_api import SemiCRFSegmenter, as_sequences

SEGMENTS = [[(0, 5, "a"), (5, 10, "b")], [(0, 4, "b"), (4, 10, "a")]] * 2


def labels():
    return [sum(([c] * (stop - start) for start, stop, c in rows), []) for rows in SEGMENTS]


def features(y):
    return [[[float(c == "b")] for c in one] for one in y]


@pytest.mark.parametrize("y", [labels(), [np.array(one) for one in labels()], SEGMENTS])
def test_as_sequences_of_equal_lengths_can_be_split_and_searched(y):
    X, y = as_sequences(features(labels())), as_sequences(y)
    assert X.shape == y.shape == (4,)
    model = SemiCRFSegmenter(max_epochs=2, max_duration=6, random_state=0)
    assert len(cross_val_score(model, X, y, cv=2, error_score="raise")) == 2
    search = GridSearchCV(model, {"alpha": [0.1, 1.0]}, cv=2, error_score="raise").fit(X, y)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
    assert search.predict(X_test).shape == (2,)
    assert 0 <= model.fit(X_train, y_train).score(X_test, y_test) <= 1


def test_as_sequences_keeps_what_it_is_given():
    arrays = [np.zeros((2, 1)), np.zeros((2, 1))]
    nested = as_sequences(arrays)
    assert nested.shape == (2,) and nested[0] is arrays[0]
    assert list(as_sequences(SEGMENTS)[0]) == SEGMENTS[0]
    assert as_sequences(np.zeros((3, 2, 1))).shape == (3,)


def test_as_sequences_of_one_sequence():
    with pytest.raises(ValueError, match="got 'a' at index 0. One sequence alone goes in a list"):
        as_sequences(["a", "b"])
    with pytest.raises(ValueError, match="at index 1"):
        as_sequences([[1, 2], 3])

"""TokenFeatures and the F1 of chunks: from words to a score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction import DictVectorizer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklearn_api import SemiCRFSegmenter
from sklearn_api.metrics import chunk_precision_recall_f1, make_segment_scorer
from sklearn_api.preprocessing import TokenFeatures

SENTENCES = [
    "the small cat sleeps on the mat",
    "a dog chases the cat",
    "the old dog sleeps",
    "she sees a small mat on the table",
]
TAGS = [
    "B-NP I-NP I-NP B-VP B-PP B-NP I-NP",
    "B-NP I-NP B-VP B-NP I-NP",
    "B-NP I-NP I-NP B-VP",
    "B-NP B-VP B-NP I-NP I-NP B-PP B-NP I-NP",
]


def tokens():
    sentences = [s.split() for s in SENTENCES]
    return [[{"w": w, "last": w[-1], "first": i == 0} for i, w in enumerate(s)] for s in sentences]


def test_token_features_rows_are_those_of_the_vectorizer():
    X = tokens()
    flat = [token for sentence in X for token in sentence]
    expected = DictVectorizer(dtype=np.float32).fit_transform(flat).toarray()
    rows = TokenFeatures().fit_transform(X)
    assert [x.shape[0] for x in rows] == [len(x) for x in X]
    np.testing.assert_array_equal(np.concatenate([x.toarray() for x in rows]), expected)


def test_token_features_hashed_and_strings():
    X = [[["a", "b"], []], [("b",)]]
    hashed = TokenFeatures(n_features=16).fit_transform(X)
    assert [x.shape for x in hashed] == [(2, 16), (1, 16)]
    named = TokenFeatures().fit(X)
    assert [x.toarray().tolist() for x in named.transform(X)] == [[[1, 1], [0, 0]], [[0, 1]]]
    assert named.transform([[["c"]]])[0].nnz == 0


@pytest.mark.parametrize(
    ("X", "error", "match"),
    [
        ([["word"]], TypeError, "'word' at position 0 of sequence 0"),
        ([[["a"]], []], ValueError, "sequence 1 has none"),
        ([], ValueError, "0 sequences"),
        ([[{"w": 1}, 3]], TypeError, "got 3 at position 1 of sequence 0"),
        (["word"], TypeError, "Sequence 0 of `X` must be a list of tokens; got 'word'"),
        ({"w": 1}, TypeError, "list of sequences of tokens; got a dict"),
    ],
)
def test_token_features_refuses(X, error, match):
    with pytest.raises(error, match=match):
        TokenFeatures().fit(X)


def test_token_features_bools_are_no_number_of_features():
    with pytest.raises(ValueError, match="`n_features` must be an integer >= 1; got True"):
        TokenFeatures(n_features=True).fit([[["a"]]])


def test_chunks_in_a_pipeline_and_a_grid():
    X, y = tokens(), [np.array(tags.split()) for tags in TAGS]
    crf = SemiCRFSegmenter(
        solver="lbfgs", tagging="bio", boundary_scores=True, single_position_labels="PP"
    )
    pipeline = make_pipeline(TokenFeatures(), crf)
    search = GridSearchCV(
        pipeline,
        {"semicrfsegmenter__alpha": [0.01, 100.0]},
        scoring=make_segment_scorer(chunk_precision_recall_f1),
        cv=2,
    )
    search.fit(X, y)
    assert search.best_params_ == {"semicrfsegmenter__alpha": 0.01}
    assert [" ".join(tags) for tags in search.predict(X)] == TAGS


def test_chunk_f1_of_broken_tags_and_lengths():
    score = chunk_precision_recall_f1([["B-A", "I-A", "I-B"]], [["I-A", "I-A", "B-B"]])
    assert score == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="in sequence 0"):
        chunk_precision_recall_f1([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="Sequence 1 of `y_pred`: .* got None at index 1"):
        chunk_precision_recall_f1([["O"], ["O", "O"]], [["O"], ["O", None]])

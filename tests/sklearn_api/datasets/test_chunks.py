"""The embedded sentences: their form, and that their tags follow the rules that are stated."""

from __future__ import annotations

import numpy as np
import pytest

from flash_semicrf.problem.segments import bio_to_segments
from sklearn_api.datasets import load_chunks
from sklearn_api.preprocessing import TokenFeatures

# Parts of speech that a chunk of each type may end with.
LAST = {
    "ADJP": {"ADJ", "ADV"},
    "ADVP": {"ADV"},
    "NP": {"NOUN", "PROPN", "PRON", "NUM", "ADJ"},
    "PP": {"ADP"},
    "PRT": {"ADP"},
    "SBAR": {"SCONJ"},
    "VP": {"VERB", "AUX", "PART"},
}


@pytest.fixture(scope="module")
def data():
    return load_chunks()


def chunks(data):
    """Yield (words, parts of speech, type) of every chunk and of every token outside."""
    for tokens, tags in zip(data.X, data.y, strict=True):
        for start, stop, kind in bio_to_segments(tags):
            part = tokens[start:stop]
            yield [t["word"] for t in part], [t["pos"] for t in part], kind


def test_form(data):
    assert data.X.shape == data.y.shape == data.groups.shape == (216,)
    assert data.X.dtype == data.y.dtype == object
    for tokens, tags in zip(data.X, data.y, strict=True):
        assert isinstance(tokens, list) and len(tokens) == len(tags)
        assert all(list(token) == data.feature_names for token in tokens)
        assert all(token["word"] and token["pos"].isalpha() for token in tokens)
        assert tags.dtype.kind == "U"
    X, y = load_chunks(return_X_y=True)
    assert X.tolist() == data.X.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(y, data.y, strict=True))
    X[0][0]["word"] = "changed"
    assert load_chunks().X[0][0]["word"] == "The"


def test_features_take_the_tokens(data):
    rows = TokenFeatures().fit_transform(data.X)
    assert [matrix.shape[0] for matrix in rows] == [len(tags) for tags in data.y]
    assert all(matrix.sum() == 2 * matrix.shape[0] for matrix in rows)


def test_description_states_the_facts(data):
    lengths = [len(tags) for tags in data.y]
    assert f"{len(lengths)} sentences" in data.DESCR
    facts = f"{min(lengths)} to {max(lengths)} tokens in a sentence, {sum(lengths):,} in all"
    assert facts in data.DESCR
    assert "\nMIT, as the package" in data.DESCR
    assert len(np.unique(data.groups)) == 12
    kinds = {kind for _, _, kind in chunks(data)}
    assert sorted(kinds - {"O"}) == data.target_names[1:] == sorted(LAST)


def test_a_third_of_the_words_of_a_text_are_new(data):
    def words(where):
        return [t["word"].lower() for i in np.flatnonzero(where) for t in data.X[i]]

    for text in np.unique(data.groups):
        known = set(words(data.groups != text))
        assert 0.25 < np.mean([word not in known for word in words(data.groups == text)]) < 0.4


def test_tags_are_well_formed(data):
    for tags in data.y:
        for before, tag in zip(["O", *tags[:-1]], tags, strict=True):
            assert tag == "O" or tag[:2] in ("B-", "I-")
            if tag.startswith("I-"):
                assert before[1:] == tag[1:]


def test_outside_are_conjunctions_and_punctuation(data):
    outside = {" ".join(words) for words, _, kind in chunks(data) if kind == "O"}
    assert {word for part in outside for word in part.split()} == {".", ",", "and", "but", "or"}
    for tokens, tags in zip(data.X, data.y, strict=True):
        assert (tokens[-1]["word"], tags[-1]) == (".", "O")


def test_chunks_end_with_their_heads(data):
    for words, pos, kind in chunks(data):
        if kind == "O":
            assert set(pos) <= {"CCONJ", "PUNCT"}
            continue
        assert pos[-1] in LAST[kind], (words, kind)
        assert (pos[0] in ("ADP", "DET")) <= (kind in ("PP", "PRT", "NP", "ADVP")), (words, kind)
        assert ("VERB" in pos or "AUX" in pos) == (kind == "VP"), (words, kind)


def test_words_of_one_kind_keep_their_part_of_speech(data):
    articles = [(w.lower(), p) for ws, ps, _ in chunks(data) for w, p in zip(ws, ps, strict=True)]
    fixed = {"the": "DET", "a": "DET", "an": "DET", "not": "PART", "and": "CCONJ", "of": "ADP"}
    for word, pos in articles:
        assert fixed.get(word, pos) == pos

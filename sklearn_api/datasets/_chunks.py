"""Sentences with their phrases as BIO chunks."""

from __future__ import annotations

import re
from typing import Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sklearn_api._inputs.sequences import object_array
from sklearn_api.datasets._files import read_text

# A chunk in brackets, starting with its type, or a token outside all chunks.
_PART = re.compile(r"\[(?P<type>[A-Z]+) (?P<tokens>[^\]]+)\]|(?P<outside>\S+)")


@overload
def load_chunks(*, return_X_y: Literal[False] = False) -> Bunch: ...
@overload
def load_chunks(*, return_X_y: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...
def load_chunks(*, return_X_y: bool = False) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """Load 216 English sentences with parts of speech and phrase chunks.

    Parameters
    ----------
    return_X_y : bool
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : Bunch
        X : object array of shape (216,)
            Element i is a list with a dict per token: its "word" and its part of speech, "pos", as
            accepted by `sklearn_api.preprocessing.TokenFeatures`.
        y : object array of shape (216,)
            Element i is a string array of shape (T_i,) of BIO tags, such as "B-NP".
        groups : str array of shape (216,)
            Text from which the sentence is taken.
        target_names, feature_names : list of str
            "O" and the types of chunks; the keys of a token.
        sampling_rate : None
            Positions are tokens, not points in time.
        hop, hop_unit : int, str
            Distance between positions, 1 token.
        DESCR : str
            Description, licence and citation.
    (X, y) : tuple
        If `return_X_y`.

    References
    ----------
    E. F. Tjong Kim Sang and S. Buchholz: Introduction to the CoNLL-2000 shared task: chunking.
    CoNLL, 127-132, 2000: source of the tags, but not of the sentences.

    Examples
    --------
    >>> from sklearn_api.datasets import load_chunks
    >>> chunks = load_chunks()
    >>> [token["word"] for token in chunks.X[0][:4]], chunks.y[0][:4].tolist()
    (['The', 'old', 'bridge', 'over'], ['B-NP', 'I-NP', 'I-NP', 'B-PP'])
    """
    sentences, tags, groups, text = [], [], [], ""
    for line in read_text("chunks.txt").splitlines():
        if line.startswith("# "):
            text = line[2:]
            continue
        tokens, column = _parse(line)
        sentences.append(tokens)
        tags.append(np.array(column))
        groups.append(text)
    X, y = object_array(sentences), object_array(tags)
    if return_X_y:
        return X, y
    types = {tag[2:] for tag in np.unique(np.concatenate(tags)).tolist()}
    return Bunch(
        X=X,
        y=y,
        groups=np.array(groups),
        target_names=["O", *sorted(types - {""})],
        feature_names=["word", "pos"],
        sampling_rate=None,
        hop=1,
        hop_unit="token",
        DESCR=read_text("chunks.rst"),
    )


def _parse(line: str) -> tuple[list[dict[str, str]], list[str]]:
    """Tokens and BIO tags of a line such as ``[NP The/DET cat/NOUN] [VP sleeps/VERB] ./PUNCT``."""
    tokens, tags = [], []
    for part in _PART.finditer(line):
        kind = part["type"]
        for i, token in enumerate((part["tokens"] or part["outside"]).split()):
            word, _, pos = token.rpartition("/")
            tokens.append({"word": word, "pos": pos})
            tags.append("O" if kind is None else f"{'I' if i else 'B'}-{kind}")
    return tokens, tags

"""CoNLL-2000 and the attributes of the CRFsuite tutorial. Standard library only: peers read it too.

The 19 templates: the words at -2..2, the pairs of words at (-1, 0) and (0, 1), the parts of speech
at -2..2, their pairs at (-2, -1), (-1, 0), (0, 1), (1, 2) and triples at (-2..0), (-1..1), (0..2).
"""

from __future__ import annotations

import gzip
from pathlib import Path

_WORDS = [(-2,), (-1,), (0,), (1,), (2,), (-1, 0), (0, 1)]
_PARTS = [(-2,), (-1,), (0,), (1,), (2,)]
_PARTS += [(-2, -1), (-1, 0), (0, 1), (1, 2), (-2, -1, 0), (-1, 0, 1), (0, 1, 2)]
TEMPLATES = [(0, offsets) for offsets in _WORDS] + [(1, offsets) for offsets in _PARTS]


def read_sentences(path: Path, limit: int | None = None) -> list[list[list[str]]]:
    """Sentences of [word, part of speech, BIO tag], blank lines between them."""
    sentences: list[list[list[str]]] = [[]]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if fields:
                sentences[-1].append(fields)
            elif sentences[-1]:
                sentences.append([])
    return [sentence for sentence in sentences if sentence][:limit]


def attributes(sentence: list[list[str]]) -> list[list[str]]:
    """Attributes of each token; the first and the last have one more that says so."""
    result = []
    for t in range(len(sentence)):
        found = []
        for field, offsets in TEMPLATES:
            if 0 <= t + offsets[0] and t + offsets[-1] < len(sentence):
                name = "|".join(f"{'wp'[field]}[{i}]" for i in offsets)
                value = "|".join(sentence[t + i][field] for i in offsets)
                found.append(f"{name}={value}")
        if t == 0:
            found.append("__BOS__")
        if t == len(sentence) - 1:
            found.append("__EOS__")
        result.append(found)
    return result

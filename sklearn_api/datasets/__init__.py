"""Real and synthetic sequences to segment.

Every loader reads a file inside the package (nothing is downloaded) and returns a
`sklearn.utils.Bunch`: ``X`` and ``y`` are 1-D object arrays with one array per sequence (for text,
``X`` has one list of tokens). Sequences with the same entry of ``groups`` must not be split between
training and test data. ``DESCR`` contains source, licence and citation.
"""

from sklearn_api.datasets._birdsong import load_birdsong
from sklearn_api.datasets._chunks import load_chunks
from sklearn_api.datasets._ecg import load_ecg
from sklearn_api.datasets._gene_structure import load_gene_structure
from sklearn_api.datasets._synthetic import make_segmentations

__all__ = [
    "load_birdsong",
    "load_chunks",
    "load_ecg",
    "load_gene_structure",
    "make_segmentations",
]

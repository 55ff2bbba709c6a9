"""Parts of a genome with the structure of their genes."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sklearn_api._inputs.sequences import object_array
from sklearn_api.datasets._files import read_arrays, read_text


@overload
def load_gene_structure(*, return_X_y: Literal[False] = False) -> Bunch: ...
@overload
def load_gene_structure(*, return_X_y: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...
def load_gene_structure(*, return_X_y: bool = False) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """Load six parts of the C. elegans genome with annotated gene structure.

    Parameters
    ----------
    return_X_y : bool
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : Bunch
        X : object array of shape (6,)
            Element i is a float32 array of shape (T_i, 4): A, C, G and T, one-hot.
        y : object array of shape (6,)
            Element i is a string array of shape (T_i,), such as "CDS+" or "intergenic".
        segments : list of list of (start, end, label)
            The labels `y` as half-open segments.
        groups : str array of shape (6,)
            Chromosome: "I" to "V", "X".
        target_names, feature_names : list of str
            The labels; the names of the columns.
        sampling_rate : None
            Positions are bases, not points in time.
        hop, hop_unit : int, str
            Distance between positions, 1 bp.
        DESCR : str
            Description, licence and citation.
    (X, y) : tuple
        If `return_X_y`.

    References
    ----------
    P. Davis et al.: WormBase in 2022: data, processes, and tools for analyzing Caenorhabditis
    elegans. Genetics 220(4):iyac003, 2022.

    Examples
    --------
    >>> from sklearn_api.datasets import load_gene_structure
    >>> genes = load_gene_structure()
    >>> genes.X[5].shape, str(genes.groups[5])
    ((177189, 4), 'X')
    >>> genes.segments[5][0]
    (0, 150, 'intergenic')
    """
    arrays = read_arrays("celegans_1pct.npz")
    chromosomes, names = arrays["seqs"].tolist(), arrays["labels"]
    tables = [arrays[f"{name}_seg"] for name in chromosomes]
    X = object_array(
        [_one_hot(arrays[f"{name}_seq2bit"], int(arrays[f"{name}_len"])) for name in chromosomes]
    )
    y = object_array([np.repeat(names[table[:, 2]], table[:, 1] - table[:, 0]) for table in tables])
    if return_X_y:
        return X, y
    return Bunch(
        X=X,
        y=y,
        segments=[
            [(start, end, str(names[label])) for start, end, label in table.tolist()]
            for table in tables
        ],
        groups=arrays["seqs"],
        target_names=names.tolist(),
        feature_names=["A", "C", "G", "T"],
        sampling_rate=None,
        hop=1,
        hop_unit="bp",
        DESCR=read_text("gene_structure.rst"),
    )


def _one_hot(packed: np.ndarray, length: int) -> np.ndarray:
    """Unpack four bases per byte, low bits first, to shape (length, 4)."""
    bases = (packed[:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3
    rows: np.ndarray = np.eye(4, dtype=np.float32)[bases.ravel()[:length]]
    return rows

"""Reading the files inside the package, and packing sequences."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np


def read_arrays(name: str) -> dict[str, np.ndarray]:
    """Read every array of ``data/{name}``, an npz file."""
    # A resource need not be a file on disk (zipped packages), so it is opened as a stream.
    with (_data() / name).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def read_text(name: str) -> str:
    """Read the text file ``data/{name}``."""
    return (_data() / name).read_text(encoding="utf-8")


def object_array(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Pack arrays into a 1-D object array, also when all have one length."""
    packed = np.empty(len(sequences), dtype=object)
    # `packed[:] = sequences` would try to broadcast sequences of equal length.
    for i, sequence in enumerate(sequences):
        packed[i] = sequence
    return packed


def _data():
    return resources.files("sklearn_api.datasets") / "data"

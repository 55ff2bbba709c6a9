"""Access to the files inside the package."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def read_arrays(name: str) -> dict[str, np.ndarray]:
    """Read every array of ``data/{name}``, an npz file."""
    # A resource need not be a file on disk (zipped packages), so it is opened as a stream.
    with (_data() / name).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def read_text(name: str) -> str:
    """Read the text file ``data/{name}``."""
    return (_data() / name).read_text(encoding="utf-8")


def _data() -> Traversable:
    return resources.files("sklearn_api.datasets") / "data"

"""Streaming algorithms, which never build an edge tensor: a reference loop, and kernels.

Release 0.2.0 had public names here; they are those of `flash_semicrf.compat`.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Looked up when asked for: everything in `compat` stands on this package.
    compat = importlib.import_module("flash_semicrf.compat")
    if name in compat.__all__:
        return getattr(compat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

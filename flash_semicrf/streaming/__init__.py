"""Streaming algorithms, which build no edge tensor: a reference loop, and kernels.

Public names of release 0.2.0 are importable from here; see `flash_semicrf.compat`.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Imported on demand: `compat` depends on this package.
    compat = importlib.import_module("flash_semicrf.compat")
    if name in compat.__all__:
        return getattr(compat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

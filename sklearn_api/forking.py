"""Forked children of a process that has computed with torch.

torch's OpenMP threads do not live on in a forked child, and the first operation there that asks for
them waits for ever. joblib's "multiprocessing" backend forks. A forked child therefore uses one
thread, as the workers of torch's own `DataLoader` do.
"""

from __future__ import annotations

import os

import torch

__all__ = ["use_one_thread_in_forked_children"]

_registered = False


def use_one_thread_in_forked_children() -> None:
    """Have every child forked from now on start with ``torch.set_num_threads(1)``."""
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
        _registered = True

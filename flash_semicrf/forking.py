"""Single-threaded torch in forked child processes.

torch's OpenMP threads do not exist in a forked child, and its first parallel operation would wait
for them forever. joblib's "multiprocessing" backend, gunicorn and many data loaders fork. A child
therefore starts with one thread, as the workers of torch's own `DataLoader` do.
"""

from __future__ import annotations

import os

import torch

__all__: list[str] = []

if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

"""Compilation of the CPU kernels, shared out between the processes of a test run.

All kernels take minutes to compile, and nearly every test file needs the same few first: without
this, every process would compile those.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flash_semicrf.inference.expectations import _direction
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import random_problem

__all__ = ["compile_kernels"]


def _passes(**options) -> None:
    """Log Z, gradients, the best segmentation and samples of a few sequences."""
    problem = random_problem(3, 10, 4, 3, **options)
    kernels = BACKENDS["numba"]
    kernels.gradients(problem, set(problem.parameters()))
    kernels.viterbi(problem)
    kernels.sample(problem, 1, 0)


def _tangents(**options) -> None:
    _passes(**options)
    problem = random_problem(3, 10, 4, 3, **options)
    BACKENDS["numba"].tangents(problem, _direction(problem), set(problem.parameters()))


def _short(**options) -> None:
    """A batch that goes to the kernel of short sequences."""
    problem = random_problem(40, 10, 4, 3, **options)
    BACKENDS["numba"].gradients(problem, set(problem.parameters()))


def _n_best(**options) -> None:
    n_best(random_problem(3, 10, 4, 3, **options), 2)


PARTS = [
    (_tangents, {}),
    (_tangents, {"tail": True}),
    (_tangents, {"by_duration": True}),
    (_tangents, {"by_duration": True, "tail": True}),
    (_passes, {"dtype": torch.float32}),
    (_passes, {"dtype": torch.float32, "tail": True}),
    (_n_best, {}),
    (_n_best, {"by_duration": True}),
    (_short, {}),
    (_short, {"dtype": torch.float32}),
]
"""What is compiled together, the longest first; no two parts have a kernel in common."""


def compile_kernels(claims: Path) -> None:
    """Compile the parts that no other process has claimed by a file in the folder `claims`."""
    for number, (compiled, options) in enumerate(PARTS):
        try:
            (claims / f"kernels-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        compiled(boundary=True, ends=True, **options)

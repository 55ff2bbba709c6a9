"""Kernels are compiled once for each dtype, with and without a tail: not for each layout too."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import NamedTuple

import numba
import numpy as np
import pytest

from flash_semicrf.inference.information import entropy
from flash_semicrf.inference.nbest import n_best
from flash_semicrf.streaming import cpu
from flash_semicrf.streaming.cpu import jit
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import random_problem

ODD = re.compile(r"readonly|'C', True|'[FA]'|\dd, [FA]\b")
"""Of an array that is not contiguous or not writable, as numba prints it, alone and in tuples."""

SHAPES = [(2, 9, 4, 3), (2, 9, 4, 1), (2, 9, 1, 3), (1, 1, 1, 1), (2, 9, 20, 8), (2, 9, 3, 9)]


class Records(NamedTuple):
    """A record as kernels take them."""

    rows: np.ndarray
    number: int


def kernels() -> dict[str, jit.Kernel]:
    walk = pkgutil.walk_packages(cpu.__path__, f"{cpu.__name__}.")
    return {
        f"{info.name}.{name}": value
        for info in walk
        for name, value in vars(importlib.import_module(info.name)).items()
        if isinstance(value, jit.Kernel)
    }


def run_everything(problem) -> None:
    kernel, wanted = BACKENDS["numba"], set(problem.parameters())
    kernel.log_partition(problem)
    kernel.gradients(problem, wanted)
    kernel.viterbi(problem)
    kernel.sample(problem, 2, 0)
    leaves = {name: x.detach().requires_grad_() for name, x in problem.parameters().items()}
    entropy(problem.replace(**leaves)).sum().backward()
    n_best(problem, 2)


@pytest.mark.parametrize("by_duration", [False, True])
def test_arrays_of_any_problem_are_contiguous_and_writable(by_duration):
    for shape in SHAPES:
        for given in (False, True):
            problem = random_problem(*shape, by_duration=by_duration, boundary=given, ends=given)
            run_everything(problem)
            turned = {
                name: value.mT.contiguous().mT
                for name, value in problem.parameters().items()
                if value.dim() > 1
            }
            run_everything(problem.replace(**turned))
    run_everything(random_problem(40, 9, 4, 3, by_duration=by_duration))
    for shape in SHAPES:
        for given in ({"spans": True}, {"moves": True}):
            run_everything(random_problem(*shape, by_duration=by_duration, **given))
    found = {
        name: signature
        for name, kernel in kernels().items()
        for signature in map(str, kernel.signatures)
        if ODD.search(signature)
    }
    assert not found


@pytest.mark.parametrize("inside", [False, True])
def test_odd_arrays_are_recognised(inside):
    ordinary, turned = np.zeros((2, 3)), np.zeros((2, 3)).T
    locked = np.broadcast_to(np.zeros(3), (1, 3)).view()
    for array, odd in ((ordinary, False), (turned, True), (turned[::2], True), (locked, True)):
        pair = (numba.typeof(Records(array, 1) if inside else array), numba.int64)
        assert bool(ODD.search(str(pair))) == odd, pair


def test_every_kernel_is_looked_at():
    assert len(kernels()) >= 14
    assert all(kernel.signatures is not None for kernel in kernels().values())

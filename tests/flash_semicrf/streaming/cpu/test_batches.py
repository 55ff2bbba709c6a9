"""Batches that are mostly padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flash_semicrf.streaming.cpu import batches
from flash_semicrf.streaming.dispatch import BACKENDS
from flash_semicrf.testing import assert_close, random_problem

NUMBA = BACKENDS["numba"]


@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [5, 400, 6], [1, 2, 9, 40, 200, 1000]])
def test_groups_have_every_sequence_once(lengths):
    groups = batches.groups_of(np.array(lengths), max(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    if len(groups) > 1:
        for group in groups:
            chosen = np.array(lengths)[group]
            assert chosen[-1] == chosen.max() <= 4 * chosen.min()


@pytest.mark.kernels
@pytest.mark.parametrize("by_duration", [False, True], ids=["static", "by duration"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_by_length(monkeypatch, by_duration, dtype):
    options = {"boundary": True, "ends": True, "tail": True, "by_duration": by_duration}
    problem = random_problem(9, 70, 4, 3, dtype=dtype, **options)
    problem = problem.replace(lengths=torch.tensor([3, 70, 2, 3, 1, 11, 2, 4, 2]))
    wanted = set(problem.parameters())
    expected, gradients = NUMBA.gradients(problem, wanted)
    monkeypatch.setattr(batches, "_FEW", 0)
    assert len(batches.groups_of(problem.lengths.numpy(), 70)) == 3
    log_z, found = NUMBA.gradients(problem, wanted)
    assert_close(log_z, expected)
    assert set(found) == wanted
    for name, value in found.items():
        assert value.dtype == gradients[name].dtype
        assert_close(value, gradients[name], dtype)

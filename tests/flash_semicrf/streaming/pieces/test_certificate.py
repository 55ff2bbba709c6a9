from __future__ import annotations

import math

import pytest
import torch

from flash_semicrf.streaming.pieces.certificate import certificate_of
from flash_semicrf.streaming.windows import Windows


def windows(left: torch.Tensor, right: torch.Tensor, backward: bool = False) -> Windows:
    """Windows of two pieces: `left` where the first one arrives, `right` where the second is."""
    nothing = torch.zeros_like(left)
    rows = torch.stack([torch.stack([nothing, left]), torch.stack([right, nothing])])
    same = torch.zeros_like(rows)
    left_out = torch.tensor([[0.0, 7.0], [2.0, 0.0]], dtype=torch.float64)
    return Windows(same, rows, left_out) if backward else Windows(rows, None, left_out)


FOLLOWS = torch.tensor([False, True])


def test_windows_that_differ_by_a_factor_are_certain():
    left = torch.randn(4, 3, dtype=torch.float64)
    found = certificate_of(windows(left, left - 3.5), FOLLOWS)
    assert found.certain.tolist() == [True, True]
    assert found.scale.tolist() == [0.0, pytest.approx(3.5 + 5.0)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("off", [1e-9, 1.0, -math.inf, math.inf, math.nan])
def test_one_entry_that_differs_is_enough(off, backward):
    left = torch.randn(4, 3, dtype=torch.float64)
    right = left.clone()
    right[2, 1] += off
    found = certificate_of(windows(left, right, backward), FOLLOWS)
    assert found.certain.tolist() == [True, False]


def test_what_neither_piece_reaches_does_not_count():
    left = torch.randn(4, 3, dtype=torch.float64)
    left[1:, 2] = -torch.inf
    assert certificate_of(windows(left, left + 1), FOLLOWS).certain.all()
    nothing = torch.full_like(left, -torch.inf)
    assert certificate_of(windows(nothing, nothing), FOLLOWS).certain.tolist() == [True, False]


def test_large_logarithms_may_differ_by_their_rounding():
    left = 1e8 + torch.randn(4, 3, dtype=torch.float64)
    right = left.clone()
    right[0, 0] += 4 * math.ulp(1e8)
    assert certificate_of(windows(left, right), FOLLOWS).certain.all()
    right[0, 0] += 1e-3
    assert not certificate_of(windows(left, right), FOLLOWS).certain.all()


def test_a_mask_does_not_hide_what_others_differ_by():
    left = torch.randn(4, 3, dtype=torch.float64)
    left[:, 2] -= 1e9
    right = left.clone()
    right[:, 2] += 3e-7
    found = certificate_of(windows(left, right - 2.0), FOLLOWS)
    assert found.certain.all() and found.scale[1].item() == pytest.approx(7.0, abs=1e-13)
    right[1, 0] += 1e-9
    assert not certificate_of(windows(left, right), FOLLOWS).certain.all()


def test_constants_of_both_directions():
    left = torch.randn(4, 3, dtype=torch.float64)
    found = certificate_of(windows(left, left + 2.5, backward=True), FOLLOWS)
    assert found.back.tolist() == [0.0, pytest.approx(2.5)]
    assert certificate_of(windows(left, left), FOLLOWS).back.tolist() == [0.0, 0.0]

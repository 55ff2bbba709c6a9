"""When log Z comes from two halves of a sequence."""

from __future__ import annotations

import pytest

from flash_semicrf.streaming.triton.backend import HAS_TRITON
from flash_semicrf.testing import random_problem

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
]


def pays(B: int, T: int, K: int, C: int, **options: bool) -> bool:
    from flash_semicrf.streaming.triton.static.plan import plan_of

    plan = plan_of(random_problem(1, 2, K, C, **options))
    return plan.pays_in_halves(B, T, K)


@pytest.mark.parametrize(
    "sizes",
    [
        (4, 1000, 100, 24),
        (32, 1000, 32, 8),
        (64, 200, 16, 64),
        (8, 10_000, 100, 24),
        (1, 10_000, 1000, 24),
        (1, 500, 1000, 24),
    ],
)
def test_few_sequences_come_in_halves(sizes):
    assert pays(*sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        (256, 1000, 100, 24),  # enough of them to fill a device
        (4, 100, 16, 24),  # short
        (100, 2000, 1000, 24),  # more terms in the middle than are saved
    ],
)
def test_others_come_as_a_whole(sizes):
    assert not pays(*sizes)


def test_sequences_with_a_tail_come_as_a_whole():
    assert not pays(4, 1000, 100, 24, tail=True)


@pytest.mark.parametrize("rows", [4, 8])
def test_no_half_has_more_steps_than_are_launched(rows):
    from flash_semicrf.streaming.triton.static import plan

    layout = plan.plan_of(random_problem(1, 2, 3, 2), rows=rows)
    longest = 0
    for length in range(1, 100):
        left, right = plan.steps_of_halves.fn(length, rows)
        assert left + right == length and left % rows == 0
        longest = max(longest, left, right)
        assert longest <= layout.longest_half(length)

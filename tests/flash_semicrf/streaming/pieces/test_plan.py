from __future__ import annotations

import itertools

import pytest

from flash_semicrf.streaming.pieces.plan import SHORTEST, Slots, cuts_of, within_memory

GPU = Slots(528, 1500, patient=False)
SIZES = [*itertools.product([1, 3, 40], [1, 1000, 30_000, 10**6], [1, 20, 100, 3000])]


@pytest.mark.parametrize(("batch_size", "num_positions", "max_duration"), SIZES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("slots", [GPU, Slots(8, 1000, patient=True)], ids=["gpu", "cpu"])
def test_cuts_are_worth_it_and_hold_a_window(
    batch_size, num_positions, max_duration, directions, slots
):
    cuts = cuts_of(batch_size, num_positions, max_duration, directions, slots)
    for cut in cuts:
        assert cut.length % cut.span == 0 and cut.warm % cut.span == 0 and cut.span % 32 == 0
        assert cut.warm >= 2 * max_duration and cut.length >= max_duration
        assert cut.length + directions * cut.warm + slots.overhead <= num_positions
        rows = batch_size * -(-num_positions // cut.length)
        assert rows <= slots.passes // directions + batch_size
    assert all(a.warm < b.warm for a, b in itertools.pairwise(cuts))


def test_short_sequences_and_full_batches_stay_whole():
    assert cuts_of(64, 200, 16, 1, GPU) == ()
    assert cuts_of(4, 1000, 100, 2, GPU) == ()
    assert cuts_of(600, 10**6, 100, 1, GPU) == ()
    assert cuts_of(1, 10**6, 100, 1, Slots(1, 1000, patient=True)) == ()


@pytest.mark.parametrize("slots", [GPU, Slots(10_000, 1000, patient=False), Slots(64, 1000, True)])
def test_nothing_below_the_shortest_is_cut(slots):
    for num_positions, max_duration in itertools.product(range(1, SHORTEST), (1, 20, 100)):
        assert cuts_of(1, num_positions, max_duration, 1, slots) == ()


def test_two_threads_take_half_of_a_sequence_each():
    (cut,) = cuts_of(1, 10**6, 100, 1, Slots(2, 1000, patient=True))
    assert 10**6 / 2 <= cut.length <= 10**6 / 2 + cut.span
    assert cuts_of(1, 10**6, 100, 2, Slots(2, 1000, patient=True)) == ()


LANES = Slots(256, 1000, patient=False, together=16, least=8, slower=3)


@pytest.mark.parametrize("num_positions", [20_000, 100_000, 10**6])
@pytest.mark.parametrize("directions", [1, 2])
def test_pieces_that_are_done_together_fill_their_groups(num_positions, directions):
    for cut in cuts_of(1, num_positions, 30, directions, LANES):
        pieces = -(-num_positions // cut.length)
        assert pieces <= LANES.passes // directions
        # Rounding a piece up to whole spans may leave the last group with fewer.
        groups = max(1, round(pieces / LANES.together))
        assert groups * LANES.together - pieces < LANES.together / 2
        least = LANES.slower * (cut.length + directions * cut.warm)
        assert 3 * (least + LANES.overhead) <= 2 * num_positions


def test_short_sequences_stay_out_of_lanes_that_are_mostly_warm_up():
    assert cuts_of(1, 4000, 100, 2, LANES) == ()
    for num_positions in (20_000, 100_000):
        assert len(cuts_of(1, num_positions, 30, 2, LANES)) == 1  # the longer warm-up would not pay
    assert len(cuts_of(1, 10**6, 30, 2, LANES)) == 2


def test_a_gpu_tries_a_short_warm_up_first():
    first, second = cuts_of(1, 10**6, 100, 2, GPU)
    assert first.warm < 500 and second.warm > 3000


def test_gradients_of_all_pieces_fit_into_memory():
    assert within_memory(GPU, 24 * 24) == GPU
    for size in (10**5, 10**6, 10**7, 10**8):
        slots = within_memory(GPU, size)
        assert slots.passes == 1 or slots.passes * size * 8 <= 2**28
    assert cuts_of(1, 10**6, 100, 2, within_memory(GPU, 10**8)) == ()

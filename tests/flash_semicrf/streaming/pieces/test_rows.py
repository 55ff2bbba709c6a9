from __future__ import annotations

import torch

from benchmarks.forgetting import draw
from flash_semicrf.streaming.pieces.plan import Cut
from flash_semicrf.streaming.pieces.rows import (
    by_boundary,
    by_position,
    by_sequence,
    last_rows,
    pieces_of,
    problem_of,
    running,
)

CUT = Cut(length=64, warm=32, span=32)
LENGTHS = [300, 20, 129, 256]


def test_pieces_tile_their_sequences():
    lengths = torch.tensor(LENGTHS)
    for both in (False, True):
        pieces = pieces_of(lengths, CUT, both)
        assert pieces.pieces_of_each.tolist() == [5, 1, 3, 4]
        for b, n in enumerate(LENGTHS):
            own = pieces.sequence == b
            begin, stop = pieces.begin[own].tolist(), pieces.stop[own].tolist()
            assert begin == [0, *stop[:-1]] and stop[-1] == n
            assert ((pieces.first <= pieces.begin) & (pieces.last >= pieces.stop))[own].all()
            ends = torch.tensor(stop) + 32 * both
            assert pieces.last[own].tolist() == ends.clamp(max=n).tolist()
        assert pieces.width == int((pieces.last - pieces.first).max())


def test_nothing_to_cut():
    assert pieces_of(torch.tensor([100, 128, 3]), CUT, True) is None
    assert pieces_of(torch.tensor([0]), CUT, True) is None


def test_rows_hold_their_positions_and_are_put_together_again():
    p = draw("random", LENGTHS, 4, 3)
    pieces = pieces_of(p.lengths, CUT, both=True)
    rows = problem_of(p, pieces)
    assert rows.scores.shape == (13, pieces.width, 3)
    for r in range(13):
        b, first, last = (int(x[r]) for x in (pieces.sequence, pieces.first, pieces.last))
        assert torch.equal(rows.scores[r, : last - first], p.scores[b, first:last])
        assert int(rows.lengths[r]) == last - first
    together = by_position(rows.scores, pieces, p.lengths, p.num_positions)
    for b, n in enumerate(LENGTHS):
        assert torch.equal(together[b, :n], p.scores[b, :n])
        assert not together[b, n:].any()


def test_sums_and_ends_of_sequences():
    pieces = pieces_of(torch.tensor(LENGTHS), CUT, both=True)
    values = torch.arange(26.0, dtype=torch.float64).view(13, 2)
    sums = by_sequence(values, pieces)
    assert torch.equal(sums[1], values[5]) and torch.equal(sums[2], values[6:9].sum(0))
    assert torch.equal(last_rows(values, pieces), values[[4, 5, 8, 12]])
    alone = pieces_of(torch.tensor([300]), CUT, both=True)
    assert torch.equal(by_sequence(values[:5], alone), values[:5].sum(0, keepdim=True))


def test_boundaries_belong_to_the_position_before():
    pieces = pieces_of(torch.tensor(LENGTHS), CUT, both=True)
    number = torch.arange(13.0).view(-1, 1, 1).expand(13, pieces.width + 1, 1)
    found = by_boundary(number, pieces, 300)[..., 0]
    assert found.shape == (4, 301)
    assert found[0, [0, 1, 64, 65, 128, 129, 256, 257, 300]].tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4]
    assert found[2, [0, 64, 65, 129]].tolist() == [6, 6, 7, 8]
    t = pieces.first[:, None] + torch.arange(pieces.width + 1)
    together = by_boundary(t[..., None], pieces, 300)[..., 0]
    for b, n in enumerate(LENGTHS):
        assert torch.equal(together[b, : n + 1], torch.arange(n + 1))


def test_running_sums_of_each_sequence():
    pieces = pieces_of(torch.tensor(LENGTHS), CUT, both=True)
    values = torch.tensor([1.0, 2, 3, 4, 5, 100, 1, 1, 1, 0, 2, 0, 7], dtype=torch.float64)
    sums = [1.0, 3, 6, 10, 15, 100, 1, 2, 3, 0, 2, 2, 9]
    assert running(values, pieces).tolist() == sums
    sums = [15.0, 14, 12, 9, 5, 100, 3, 2, 1, 9, 9, 7, 7]
    assert running(values, pieces, from_end=True).tolist() == sums
    values[5] = torch.nan
    assert running(values, pieces)[6:].isfinite().all()

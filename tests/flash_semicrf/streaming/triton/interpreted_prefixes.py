"""Running scores in chunks, in Triton's interpreter; see `interpreted.py`."""

from __future__ import annotations

import torch

from flash_semicrf.streaming.triton.prefixes import prefixes_of
from flash_semicrf.streaming.triton.records import problem_of
from flash_semicrf.testing import random_problem
from tests.flash_semicrf.streaming.triton.interpreter_cases import INTERPRETED

pytestmark = INTERPRETED


def test_chunks_do_not_show():
    p = random_problem(2, 600, 3, 3, boundary=True).replace(lengths=torch.tensor([600, 511]))
    p.scores[0, 100, 1] = p.scores[1, 300, 0] = -torch.inf
    p.scores[0, 240:250, 2] = -1e9 - torch.rand(10, dtype=torch.float64)
    p.scores[0, 400:405] -= 30_000.0
    found = prefixes_of(problem_of(p), 4)
    for b, length in enumerate(p.lengths.tolist()):
        scores = p.scores[b, :length].clone()
        forbidden, deep = scores == -torch.inf, scores < -1e8
        common = torch.zeros(length, 1, dtype=torch.float64)
        if b == 0:
            common[400:405, 0] = scores[400:405].amax(1)
        usual = (scores - common).masked_fill(deep, 0.0)
        total = torch.nn.functional.pad(usual, (0, 0, 1, 0)).cumsum(0)
        end = torch.nn.functional.pad(p.end_scores[b, :length], (0, 0, 1, 0))
        start = torch.nn.functional.pad(p.start_scores[b, :length], (0, 0, 0, 1))
        rows = slice(length + 1)
        torch.testing.assert_close(found.sink[b, rows], total + end)
        torch.testing.assert_close(found.source[b, rows], start - total)
        masks = scores.masked_fill(~deep | forbidden, 0.0)
        below = torch.nn.functional.pad(masks, (0, 0, 1, 0)).cumsum(0)
        torch.testing.assert_close(found.deep[b, rows], below)
        t = torch.arange(1, length + 1)[:, None]
        born = torch.nn.functional.pad(torch.where(forbidden, t, 0), (0, 0, 1, 0)).cummax(0).values
        assert torch.equal(found.born[b, rows], born.int())
        torch.testing.assert_close(found.common[b], common.sum())
    # A segment without masks has exactly none of them, wherever its chunks are.
    assert not (found.deep[0, 590] - found.deep[0, 251]).any()

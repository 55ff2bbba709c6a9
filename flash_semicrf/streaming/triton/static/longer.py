"""Segments longer than K at the cuts of pieces, for static transitions, in plain PyTorch.

The passes keep what is older than their windows from block to block and do not hand it out. At a
cut t it is a sum over all boundaries of the piece on one side, of messages that the passes store:

    longer_t(c) = S_t + LSE_{s < t-K} [gamma_s + source_s + D_K + (t-s-K) tail + deep_t - deep_s]

over the starts that no forbidden position before t cut off, and from the end likewise, with the
sink's end in place of the start. Cost O(TC) for each of two cuts, in parallel; float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.triton.posterior import running_scores
from flash_semicrf.streaming.triton.prefixes import inputs_of

__all__ = ["longer_after", "longer_before"]


def longer_before(p: Potentials, core: Tensor, gamma: Tensor) -> Tensor:
    """Log-sum of the segments that have more than K positions before each of the core's bounds.

    Parameters
    ----------
    p : Potentials
    core : int64 Tensor of shape (B, 2)
    gamma : float64 Tensor of shape (B, T + 1, C)

    Returns
    -------
    float64 Tensor of shape (B, 2, 1, C)
        In the frame of alpha, without end scores.
    """
    inputs = inputs_of(p)
    x, running = inputs.prefixes, running_scores(p, inputs)
    opened = gamma + x.source

    def at(t: Tensor) -> Tensor:
        distance = t - _boundaries(p)
        live = (distance > p.max_duration) & (_boundaries(p) >= _rows(x.born, t))
        # First the difference: it is 0 where no deep score is inside, and costs no digits then.
        terms = opened + (_rows(x.deep, t) - x.deep) + _duration_scores(p, distance)
        return torch.where(live, terms, -torch.inf).logsumexp(1) + _rows(running, t)[:, 0]

    return _of_both(core, at)


def longer_after(p: Potentials, core: Tensor, beta: Tensor) -> Tensor:
    """The same of the segments that have more than K positions after each bound; frame of beta."""
    inputs = inputs_of(p)
    x, running = inputs.prefixes, running_scores(p, inputs)
    closed = beta + x.sink
    inside = _boundaries(p) <= p.lengths[:, None, None]

    def at(t: Tensor) -> Tensor:
        distance = _boundaries(p) - t
        live = (distance > p.max_duration) & inside & (x.born <= t)
        terms = closed + (x.deep - _rows(x.deep, t)) + _duration_scores(p, distance)
        return torch.where(live, terms, -torch.inf).logsumexp(1) - _rows(running, t)[:, 0]

    return _of_both(core, at)


def _of_both(core: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([at(core[:, i, None, None]) for i in range(2)], 1)[:, :, None]


def _boundaries(p: Potentials) -> Tensor:
    return torch.arange(p.num_positions + 1, device=p.device)[:, None]


def _rows(of: Tensor, t: Tensor) -> Tensor:
    """Rows (B, 1, C) at boundaries t (B, 1, 1)."""
    return of.gather(1, t.expand(-1, 1, of.shape[2]))


def _duration_scores(p: Potentials, distance: Tensor) -> Tensor:
    """Scores of durations above K; of others arbitrary."""
    if p.duration_tail is None:
        raise ValueError("a problem without a duration tail has no segments longer than K")
    tail, last = (_logs(x) for x in (p.duration_tail, p.duration_bias[-1]))
    return last + (distance - p.max_duration) * tail


def _logs(values: Tensor) -> Tensor:
    values = values.detach().double()
    return torch.where(values > NEG_INF, values, -torch.inf)

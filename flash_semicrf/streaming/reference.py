"""Plain loop over positions: the oracle that every kernel must match.

    alpha_t(c) = LSE_{k=1..K} [ S_t(c) - S_{t-k}(c) + D_k(c) + start_{t-k}(c) + gamma_{t-k}(k, c) ]
                 + end_{t-1}(c)
    gamma_s(k, c) = LSE_{c'} [ alpha_s(c') + A_k[c', c] + transition_scores_s[c', c] ]
                    + segment_scores_s(k, c),   at s = 0 the initial term in place of the LSE

With a duration tail one more term of the first sum stands for all durations above K,

    G_t(c) = scores[t-1, c] + duration_tail[c] + LSE [ G_{t-1}(c), the term of duration K at t-1 ]

in float64 (float32 on devices without it), differentiable by autograd, for the log and the max
semiring. Cost T(KC + C²) with static transitions, T·K·C² by duration; memory under autograd
O(T·K·C). It also runs on devices without kernels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.potentials import (
    BY_SEQUENCE,
    NEG_INF,
    Potentials,
    accumulator_dtype,
    first_term,
    ignored,
)
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.streaming.streams import streams, uniform

__all__ = ["ReferenceBackend", "blank_and_upcast", "log_partition", "sample", "viterbi"]

_MASK = 1e4


def log_partition(potentials: Potentials, semiring: Literal["log", "max"] = "log") -> Tensor:
    """Log Z, or the best score with ``semiring="max"``.

    Parameters
    ----------
    potentials : Potentials
    semiring : {"log", "max"}

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable; -inf, with gradient 0, if no segmentation is feasible.
    """
    p = blank_and_upcast(potentials)
    alpha, _ = _messages(p, semiring)
    return _total(_final(p, alpha), semiring)


def blank_and_upcast(potentials: Potentials) -> Potentials:
    """Problem in the accumulator's dtype, -inf for forbidden values and 0 for what is ignored."""
    p = potentials
    # Compared in its own dtype: NEG_INF as a float32 is above NEG_INF as a float64.
    dead = {name: value <= NEG_INF for name, value in p.parameters().items()}
    p = p.to(accumulator_dtype(p.device))
    clean = {n: v.masked_fill(dead[n], -torch.inf) for n, v in p.parameters().items()}
    for name in clean.keys() & set(BY_SEQUENCE):
        clean[name] = clean[name].masked_fill(ignored(p, name), 0.0)
    return p.replace(**clean)


def _final(p: Potentials, alpha: list[Tensor]) -> Tensor:
    """alpha at each sequence's end plus the final scores, (B, C)."""
    rows = torch.stack(alpha)[p.lengths, torch.arange(p.batch_size, device=p.device)]
    return rows if p.final_scores is None else rows + p.final_scores


def _messages(p: Potentials, semiring: Literal["log", "max"]) -> tuple[list[Tensor], list[Tensor]]:
    """alpha_0..alpha_T, each (B, C), and the window terms of each t >= 1, each (B, k, C).

    The terms are without end scores. With a duration tail, those of t > K have a row k = K + 1 for
    all longer durations.
    """
    sums = _sums(p)
    first = first_term(p)
    k_shape = (p.batch_size, p.max_duration, p.num_labels)
    sources = [_with_spans(p, first.expand(k_shape), 0)]  # gamma_s by duration, (B, K, C)
    alpha = [p.scores.new_zeros(p.batch_size, p.num_labels)]
    windows: list[Tensor] = []
    for t in range(1, p.num_positions + 1):
        longest = min(t, p.max_duration)
        source = torch.stack([sources[t - k][:, k - 1] for k in range(1, longest + 1)], 1)
        span = torch.arange(t - 1, t - 1 - longest, -1, device=p.device)
        window = source + _content(sums, span, [t]) + p.duration_bias[:longest]
        if p.start_scores is not None:
            window = window + p.start_scores[:, span]
        if p.duration_tail is not None and t > p.max_duration:
            longer = _sum(windows[-1][:, p.max_duration - 1 :], 1, semiring)
            longer = longer + (p.scores[:, t - 1] + p.duration_tail)
            window = torch.cat([window, longer[:, None]], 1)
        windows.append(window)
        if p.end_scores is not None:
            window = window + p.end_scores[:, t - 1, None]
        alpha.append(_sum(window, 1, semiring))
        if t < p.num_positions:
            gamma = _sum(alpha[t][:, None, :, None] + _transition(p, t), 2, semiring)
            sources.append(_with_spans(p, gamma.expand(k_shape), t))
    return alpha, windows


def _transition(p: Potentials, s: int) -> Tensor:
    """Transitions into the segments that start at s > 0, (B or 1, K or 1, C_src, C_dst)."""
    transition = p.transition if p.transition.dim() == 3 else p.transition[None]
    return (
        transition[None]
        if p.transition_scores is None
        else (transition + p.transition_scores[:, s, None])
    )


def _with_spans(p: Potentials, source: Tensor, s: int) -> Tensor:
    """(B, K, C) with the scores of the segments that start at s."""
    return source if p.segment_scores is None else source + p.segment_scores[:, s]


def _sums(p: Potentials) -> tuple[Tensor, Tensor, Tensor]:
    """Running sums (B, T+1, C) of the scores, the masks, and the number of forbidden positions."""
    finite = torch.where(p.scores == -torch.inf, 0.0, p.scores)
    # Masks (-1e9, say) are summed separately: later sums would lose their precision.
    is_mask = finite.abs() > _MASK
    usual, masks = finite.masked_fill(is_mask, 0.0), finite.masked_fill(~is_mask, 0.0)
    blocked = (p.scores == -torch.inf).to(finite)
    return _running_sum(usual), _running_sum(masks), _running_sum(blocked)


def _running_sum(x: Tensor) -> Tensor:
    """Sum of the entries before each position, (B, T, C) to (B, T+1, C)."""
    return torch.nn.functional.pad(x, (0, 0, 1, 0)).cumsum(1)


def _content(
    sums: tuple[Tensor, Tensor, Tensor],
    start: int | list[int] | Tensor,
    stop: int | list[int] | Tensor,
) -> Tensor:
    """Sums of the scores of positions [start, stop), (B, k, C); -inf where one forbids."""
    usual, masks, blocked = (x[:, stop] - x[:, start] for x in sums)
    return (usual + masks).masked_fill(blocked > 0, -torch.inf)


def _backward_messages(p: Potentials) -> list[Tensor]:
    """beta_0..beta_T of the log semiring, each (B, C); -inf after a sequence's end.

    beta_s(c') = LSE_{k,c} [A_k[c', c] + S_{s+k}(c) - S_s(c) + D_k(c) + start_s(c)
                            + end_{s+k-1}(c) + beta_{s+k}(c)]

    With a duration tail, R_{s+K}(c) takes the place of the last two terms for all durations above
    K: R_t(c) = scores[t, c] + duration_tail[c] + LSE [end_t(c) + beta_{t+1}(c), R_{t+1}(c)].
    """
    sums = _sums(p)
    nothing = p.scores.new_zeros(p.num_labels)
    final = nothing if p.final_scores is None else p.final_scores
    final = final.expand(p.batch_size, -1)
    beta = [final] * (p.num_positions + 1)
    rest = [torch.full_like(final, -torch.inf)] * (p.num_positions + 1)
    for s in range(p.num_positions, -1, -1):
        at_end = (p.lengths == s)[:, None]
        longest = min(p.max_duration, p.num_positions - s)
        value = torch.full_like(final, -torch.inf)
        if longest:
            span = torch.arange(s + 1, s + 1 + longest, device=p.device)
            eta = _content(sums, [s], span) + p.duration_bias[:longest]
            eta = eta + torch.stack(beta[s + 1 : s + 1 + longest], 1)
            if p.start_scores is not None:
                eta = eta + p.start_scores[:, s, None]
            if p.end_scores is not None:
                eta = eta + p.end_scores[:, span - 1]
            if p.segment_scores is not None:
                eta = eta + p.segment_scores[:, s, :longest]
            transition = _transition(p, s)
            arriving = transition[:, :longest] + eta[:, :, None]  # (B, k, C_src, C_dst)
            if p.duration_tail is not None and s + p.max_duration < p.num_positions:
                longer = _content(sums, s, s + p.max_duration) + p.duration_bias[-1]
                longer = longer + rest[s + p.max_duration]
                if p.start_scores is not None:
                    longer = longer + p.start_scores[:, s]
                if p.segment_scores is not None:
                    longer = longer + p.segment_scores[:, s, -1]
                longer = transition[:, -1:] + longer[:, None, None]
                arriving = torch.cat([arriving, longer], 1)
            value = _sum(arriving.transpose(1, 2).flatten(2), -1, "log")
        value = torch.where(s > p.lengths[:, None], -torch.inf, value)
        beta[s] = torch.where(at_end, final, value)
        if p.duration_tail is not None and s:
            closed = beta[s] if p.end_scores is None else beta[s] + p.end_scores[:, s - 1]
            longer = _sum(torch.stack([closed, rest[s]], 1), 1, "log")
            rest[s - 1] = longer + (p.scores[:, s - 1] + p.duration_tail)
    return beta


def _sum(x: Tensor, dim: int, semiring: Literal["log", "max"]) -> Tensor:
    """Semiring sum over one axis, whose gradient is 0 if all entries are -inf."""
    if semiring == "max":
        return x.amax(dim)
    dead = (x == -torch.inf).all(dim)
    safe = torch.where(dead.unsqueeze(dim), 0.0, x)
    return torch.where(dead, -torch.inf, torch.logsumexp(safe, dim))


def _total(final: Tensor, semiring: Literal["log", "max"]) -> Tensor:
    return _sum(final, -1, semiring)


def viterbi(potentials: Potentials) -> tuple[Tensor, SegmentTable]:
    """Best segmentation of each sequence; ties: the shortest last segment, then the lowest label.

    Parameters
    ----------
    potentials : Potentials

    Returns
    -------
    scores : float64 Tensor of shape (B,)
        -inf if nothing is feasible; such a sequence has no rows in the table.
    table : SegmentTable
    """
    p = blank_and_upcast(potentials)
    with torch.no_grad():
        alpha, windows = _messages(p, "max")
        final = _final(p, alpha)
        scores = _total(final, "max")
        rows: list[tuple[int, int, int, int]] = []
        for b in range(p.batch_size):
            if scores[b] > -torch.inf:
                rows += _walk(p, b, [a[b] for a in alpha], [w[b] for w in windows], final[b])
    columns = torch.tensor(rows, dtype=torch.int64, device=p.device).reshape(-1, 4)
    return scores, SegmentTable(*columns.unbind(1))


def _walk(
    p: Potentials, b: int, alpha: list[Tensor], windows: list[Tensor], value: Tensor
) -> list[tuple[int, int, int, int]]:
    """Rows of sequence b from its end to its start, where `value` (C,) ranks the last label."""
    t = int(p.lengths[b])
    rows = []
    while t > 0:
        tied = (value == value.max()).nonzero()[:, 0].tolist()
        k, label = min((_duration(p, windows, t, c), c) for c in tied)
        rows.append((b, t - k, t, label))
        t -= k
        value = alpha[t] + _arriving(p, b, t, min(k, p.max_duration), label)
    return rows[::-1]


def _arriving(p: Potentials, b: int, s: int, k: int, label: int) -> Tensor:
    """Transitions (C,) of sequence b into a segment of s, k and a label, from each label before."""
    transition = p.transition[k - 1] if p.transition.dim() == 3 else p.transition
    row = transition[:, label]
    if p.transition_scores is None or s == 0:
        return row
    return row + p.transition_scores[b, s, :, label]


def _duration(p: Potentials, windows: list[Tensor], t: int, label: int) -> int:
    """Duration of the best segment that ends at t, the shortest of equals."""
    # argmax returns the first of equal entries.
    k = int(windows[t - 1][:, label].argmax()) + 1
    if k <= p.max_duration:
        return k
    terms = windows[t - k + p.max_duration - 1][:, label]
    while len(terms) > p.max_duration and terms[-1] > terms[-2]:
        k += 1
        terms = windows[t - k + p.max_duration - 1][:, label]
    return k


def sample(potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
    """Draw segmentations from the end: the last label, then durations and labels alternately.

    Parameters
    ----------
    potentials : Potentials
    num_samples : int
    seed : int
        Seed of the random numbers of `flash_semicrf.streaming.streams`.

    Returns
    -------
    SegmentTable
        `sequence` is sample * B + b; there are no rows if nothing is feasible.
    """
    p = blank_and_upcast(unrolled(potentials))
    stream = streams(seed, num_samples, p.batch_size)
    with torch.no_grad():
        alpha, windows = _messages(p, "log")
        final = _final(p, alpha)
    rows: list[tuple[int, int, int, int]] = []
    for j in range(num_samples):
        for b in range(p.batch_size):
            if bool((final[b] > -torch.inf).any()):
                messages = [a[b] for a in alpha], [w[b] for w in windows]
                drawn = _draw_walk(p, b, *messages, final[b], stream[:, j, b])
                rows += [(j * p.batch_size + b, *row) for row in drawn]
    columns = torch.tensor(rows, dtype=torch.int64, device=p.device).reshape(-1, 4)
    return SegmentTable(*columns.unbind(1))


def _draw_walk(
    p: Potentials,
    b: int,
    alpha: list[Tensor],
    windows: list[Tensor],
    value: Tensor,
    stream: np.ndarray,
) -> list[tuple[int, int, int]]:
    """One sample of sequence b, (start, stop, label); `value` (C,) weighs the last label."""
    length = int(p.lengths[b])
    numbers = np.arange(2 * length, dtype=np.uint64)
    draws = iter(uniform(stream[0], stream[1], numbers).tolist())
    t = length
    rows = []
    while t > 0:
        label = _draw(value, next(draws))
        k = _draw(windows[t - 1][:, label], next(draws)) + 1
        rows.append((t - k, t, label))
        t -= k
        value = alpha[t] + _arriving(p, b, t, k, label)
    return rows[::-1]


def _draw(logs: Tensor, u: float) -> int:
    """Index drawn with weights exp(logs): the first at which the cumulative share exceeds u."""
    shares = torch.softmax(logs, 0)
    above = (shares.cumsum(0) > u).nonzero()[:, 0].tolist()
    return above[0] if above else int(shares.nonzero()[-1])


class ReferenceBackend:
    """Plain loop as a backend, for any device and problem; slow."""

    name = "reference"

    def why_not(self, potentials: Potentials) -> str | None:
        """None: every problem is supported."""
        return None

    def log_partition(self, potentials: Potentials) -> Tensor:
        """Log Z; see `flash_semicrf.streaming.dispatch.Backend`."""
        with torch.no_grad():
            return log_partition(potentials)

    def gradients(
        self, potentials: Potentials, wanted: set[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log Z and gradients; see `flash_semicrf.streaming.dispatch.Backend`."""
        if wanted <= set(BY_SEQUENCE):
            return _differentiate(potentials, wanted)
        # Gradients of shared parameters are needed for each sequence: one sequence at a time.
        sequences = range(potentials.batch_size)
        parts = [_differentiate(_sequence(potentials, b), wanted) for b in sequences]
        found = {
            name: torch.cat([g[name] if name in BY_SEQUENCE else g[name][None] for _, g in parts])
            for name in wanted
        }
        return torch.cat([log_z for log_z, _ in parts]), found

    def messages(self, potentials: Potentials) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward messages; see `flash_semicrf.streaming.dispatch.Backend`."""
        with torch.no_grad():
            p = blank_and_upcast(potentials)
            alpha, _ = _messages(p, "log")
            log_z = _total(_final(p, alpha), "log")
            return log_z, torch.stack(alpha, 1), torch.stack(_backward_messages(p), 1)

    def tangents(
        self, potentials: Potentials, direction: Potentials, wanted: set[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Derivatives of the gradient; see `flash_semicrf.streaming.dispatch.Backend`."""
        sequences = range(potentials.batch_size)
        parts = [
            _tangents(_sequence(potentials, b), _sequence(direction, b), wanted) for b in sequences
        ]
        log_z, mean, products = zip(*parts, strict=True)
        found = {}
        for name in wanted:
            each = [p[name] if name in BY_SEQUENCE else p[name][None] for p in products]
            found[name] = torch.cat(each)
        return torch.cat(log_z), torch.stack(mean), found

    def max_messages(self, potentials: Potentials) -> Tensor:
        """Messages of the max pass; see `flash_semicrf.streaming.dispatch.Backend`."""
        with torch.no_grad():
            return torch.stack(_messages(blank_and_upcast(potentials), "max")[0], 1)

    def viterbi(self, potentials: Potentials) -> tuple[Tensor, SegmentTable]:
        """Best segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return viterbi(potentials)

    def sample(self, potentials: Potentials, num_samples: int, seed: int) -> SegmentTable:
        """Draw segmentations; see `flash_semicrf.streaming.dispatch.Backend`."""
        return sample(potentials, num_samples, seed)


def _sequence(p: Potentials, b: int) -> Potentials:
    """The problem of one sequence of a batch."""
    own = {n: v[b : b + 1] for n, v in p.parameters().items() if n in BY_SEQUENCE}
    return p.replace(lengths=p.lengths[b : b + 1], **own)


def _differentiate(p: Potentials, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log Z of each sequence and the gradient of their sum."""
    leaves = {name: value.detach() for name, value in p.parameters().items()}
    for name in wanted - leaves.keys():
        leaves[name] = torch.zeros_like(p.scores)
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    names = sorted(wanted)
    with torch.enable_grad():
        log_z = log_partition(Potentials(**leaves, lengths=p.lengths))
        feasible = log_z[log_z > -torch.inf].sum()
        found = torch.autograd.grad(
            feasible, [leaves[n] for n in names], allow_unused=True, materialize_grads=True
        )
    return log_z.detach(), dict(zip(names, found, strict=True))


def _tangents(
    p: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`ReferenceBackend.tangents` of one sequence, by differentiating twice."""
    wide = accumulator_dtype(p.device)
    leaves = {name: value.detach().to(wide, copy=True) for name, value in p.parameters().items()}
    towards = direction.parameters()
    for name in towards.keys() - leaves.keys():
        leaves[name] = torch.zeros_like(leaves["scores"])
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    names = sorted(wanted)
    with torch.enable_grad():
        log_z = log_partition(Potentials(**leaves, lengths=p.lengths))
        if not bool(log_z > -torch.inf):
            zeros = {name: torch.zeros_like(leaves[name]) for name in names}
            return log_z.detach(), log_z.new_zeros(()), zeros
        first = torch.autograd.grad(
            log_z.sum(), [leaves[n] for n in towards], create_graph=True, materialize_grads=True
        )
        terms = ((d * g).sum() for d, g in zip(towards.values(), first, strict=True))
        mean = sum(terms, log_z.new_zeros(()))
        second = torch.autograd.grad(
            mean, [leaves[n] for n in names], allow_unused=True, materialize_grads=True
        )
    return log_z.detach(), mean.detach(), dict(zip(names, second, strict=True))

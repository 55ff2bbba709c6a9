"""Back-pointers of the best segmentation, for code written for release 0.2.0.

Decoding itself needs none: `flash_semicrf.viterbi` walks back from the messages alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.compat.cumulative import maximum_start, potentials_of_cumulative
from flash_semicrf.problem.potentials import NEG_INF, Potentials, first_term
from flash_semicrf.problem.unroll import unrolled
from flash_semicrf.streaming.dispatch import choose

__all__ = ["semi_crf_streaming_viterbi_with_backpointers"]


def semi_crf_streaming_viterbi_with_backpointers(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    *,
    backend: str = "auto",
    **options: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best scores, and the best segment that ends at every position with every label.

    Without `initial_scores` the first segment's transition term is, as in release 0.2.0, the
    largest over its free source label; `viterbi` takes their log-sum-exp. Cost is T(KC + C²) beyond
    that of the messages, in tensor operations; memory O(TC). With a duration tail, K is T.

    Parameters
    ----------
    cum_scores, transition, duration_bias, lengths, K
        As for `flash_semicrf.compat.semi_crf_streaming_forward`.
    backend : str
        As for `flash_semicrf.log_partition`.
    **options
        Optional parameters of `flash_semicrf.Potentials`: "start_scores", ...

    Returns
    -------
    max_scores : Tensor of shape (B,)
        In the dtype of `cum_scores`; -inf where nothing is feasible.
    bp_k : int64 Tensor of shape (B, T, C)
        Duration, in positions, of the best segment of label c whose last position is t; 0 where
        there is none, and after the end of a sequence. Ties: the shortest.
    bp_c : int64 Tensor of shape (B, T, C)
        Label of the preceding segment, or -1 for the first. Ties: the label whose own best segment
        is the shortest, then the lowest label, so that walking back gives the segmentation that
        `flash_semicrf.viterbi` finds with the same initial scores.
    final_labels : int64 Tensor of shape (B,)
        Label of the best last segment; -1 where nothing is feasible. Ties: the shortest segment,
        then the lowest label.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; the message names it.
    """
    p = potentials_of_cumulative(cum_scores, transition, duration_bias, lengths, K, **options)
    p = maximum_start(p)
    with torch.no_grad():
        alpha = choose(backend, p).max_messages(p)
        p = unrolled(p)
        bp_k, bp_c = _back_pointers(p, alpha)
        rows = torch.arange(p.batch_size, device=p.device)
        final = alpha[rows, p.lengths]
        if p.final_scores is not None:
            final = final + p.final_scores
        best = final.amax(-1)
        candidate = torch.where(
            final == best[:, None], bp_k[rows, p.lengths - 1], p.max_duration + 1
        )
        feasible = best > NEG_INF
        labels = torch.where(feasible, candidate.argmin(-1), -1)
    return best.to(cum_scores.dtype), bp_k, bp_c, labels


def _back_pointers(p: Potentials, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """(bp_k, bp_c), both (B, T, C), from the max messages (B, T+1, C)."""
    inside = (torch.arange(p.num_positions, device=p.device) < p.lengths[:, None])[..., None]
    scores = p.scores.to(alpha)
    allowed = scores > NEG_INF
    best = torch.full_like(alpha[:, 1:], -torch.inf)
    bp_k = torch.zeros_like(best, dtype=torch.int64)
    source = _sources(p, alpha, 1)
    content = torch.zeros_like(best)  # scores of the k positions up to t
    for k in range(1, min(p.max_duration, p.num_positions) + 1):
        if p.transition.dim() == 3 and k > 1:
            source = _sources(p, alpha, k)
        # Entry i of these belongs to the segment [i, i + k).
        added = scores[:, : p.num_positions - k + 1].masked_fill(
            ~allowed[:, : p.num_positions - k + 1], -torch.inf
        )
        content[:, k - 1 :] += added
        value = source[:, : p.num_positions - k + 1] + content[:, k - 1 :]
        value = value + p.duration_bias[k - 1].to(alpha)
        better = value > best[:, k - 1 :]
        best[:, k - 1 :] = torch.where(better, value, best[:, k - 1 :])
        bp_k[:, k - 1 :] = torch.where(better, k, bp_k[:, k - 1 :])
    dead = ~inside | (best <= NEG_INF)
    if p.end_scores is not None:
        dead |= p.end_scores <= NEG_INF
    bp_k = bp_k.masked_fill(dead, 0)
    return bp_k, _source_labels(p, alpha, bp_k)


def _sources(p: Potentials, alpha: Tensor, k: int) -> Tensor:
    """Best score up to the start of a segment of duration k, start score included, (B, T, C)."""
    matrix = (p.transition[k - 1] if p.transition.dim() == 3 else p.transition).to(alpha)
    value = torch.full_like(alpha[:, :-1], -torch.inf)
    for c in range(p.num_labels):
        value = torch.maximum(value, alpha[:, :-1, c, None] + matrix[c])
    initial = first_term(p)
    value[:, 0] = (initial[k - 1] if initial.dim() == 2 else initial).to(alpha)
    return value if p.start_scores is None else value + p.start_scores.to(alpha)


def _source_labels(p: Potentials, alpha: Tensor, bp_k: Tensor) -> Tensor:
    """Label that precedes each best segment, (B, T, C); -1 if none does, or without a segment."""
    batch = torch.arange(p.batch_size, device=p.device)[:, None, None]
    label = torch.arange(p.num_labels, device=p.device)
    start = torch.arange(p.num_positions, device=p.device)[:, None] + 1 - bp_k
    value = torch.full_like(alpha[:, 1:], -torch.inf)
    duration = torch.full_like(bp_k, p.max_duration + 1)
    found = torch.full_like(bp_k, -1)
    for c in range(p.num_labels):
        by_duration = p.transition.dim() == 3
        into = p.transition[(bp_k - 1).clamp(min=0), c, label] if by_duration else p.transition[c]
        candidate = alpha[batch, start, c] + into.to(alpha)
        own = bp_k[batch, (start - 1).clamp(min=0), c]
        better = (candidate > value) | ((candidate == value) & (own < duration))
        value = torch.where(better, candidate, value)
        duration = torch.where(better, own, duration)
        found = torch.where(better, c, found)
    return found.masked_fill((start == 0) | (bp_k == 0), -1)

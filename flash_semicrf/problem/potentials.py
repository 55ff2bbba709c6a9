"""Score of a segmentation: the definition that all other code must match.

A segmentation of positions ``0..T-1`` into segments ``[s, t)`` with label c, preceded by label c',
has the score

    sum over segments of  sum_{s <= i < t} scores[i, c] + duration_bias[t-s-1, c]
                          + transition[c', c] (+ start_scores[s, c] + end_scores[t-1, c])

with durations ``t - s`` in 1..K. With ``duration_tail`` there is no longest duration: k > K scores
``duration_bias[K-1, c] + (k - K) * duration_tail[c]``. A transition of shape (K, C, C) is indexed
by the duration of the segment arrived in: ``transition[t-s-1, c', c]``, the last row for longer
ones. The first segment has no source label: its transition term is the log-sum-exp over c' of
``transition[..., c', c]``, or ``initial_scores[c]`` if given. ``final_scores[c]`` is added for the
last segment. Two more terms look at the data: ``segment_scores[s, t-s-1, c]`` for every segment,
row K-1 for longer ones, and ``transition_scores[s, c', c]`` for all but the first. Minus infinity,
and any value <= `NEG_INF`, forbids. ``docs/conventions.md`` is the description for users.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.problem.arguments import check_tensor
from flash_semicrf.problem.segments import SegmentTable, covered_positions

__all__ = [
    "BY_POSITION",
    "BY_SEQUENCE",
    "Centering",
    "NAMES",
    "NEG_INF",
    "Potentials",
    "accumulator_dtype",
    "bias_rows",
    "center_scores",
    "content_rows",
    "explicit_start",
    "first_term",
    "forbid",
    "ignored",
    "initial_term",
    "score_rows",
    "score_segments",
    "table_rows",
    "within_length",
]

Centering: TypeAlias = Literal["position", "sequence", "none"]
"""Methods of `center_scores`."""

NEG_INF = -1e38
"""Upper limit of the values that are treated as minus infinity, which forbids."""

_CACHED = 1 << 16
"""Entries of which the smallest and the largest are looked for at once."""

BY_POSITION = ("scores", "start_scores", "end_scores")
"""Parameters of shape (B, T, C)."""

BY_SEQUENCE = (*BY_POSITION, "segment_scores", "transition_scores")
"""Parameters of shape (B, T, ...); the others are shared by all sequences."""

NAMES = (
    "scores",
    "transition",
    "duration_bias",
    "start_scores",
    "end_scores",
    "initial_scores",
    "final_scores",
    "duration_tail",
    "segment_scores",
    "transition_scores",
)
"""Names of the parameters that carry gradients, in the order of the autograd functions."""


@dataclass(frozen=True)
class Potentials:
    """Parameters of the scores of all segmentations of a batch.

    Parameters
    ----------
    scores : Tensor of shape (B, T, C)
        Score of each label at each position; rows at and after ``lengths`` are ignored.
    transition : Tensor of shape (C, C) or (K, C, C)
        ``transition[c_src, c_dst]``, or by the duration of the segment arrived in.
    duration_bias : Tensor of shape (K, C)
        ``duration_bias[k - 1, c]`` scores duration k, in positions.
    lengths : int64 Tensor of shape (B,)
        Number of positions of each sequence, in 1..T.
    start_scores, end_scores : Tensor of shape (B, T, C), optional
        Added where a segment of label c starts, and at its last position.
    initial_scores, final_scores : Tensor of shape (C,), optional
        Added for the label of the first segment (in place of its transition term) and of the last.
        With (K, C, C) transitions `initial_scores` may be (K, C), by the first one's duration.
    duration_tail : Tensor of shape (C,), optional
        Log-rate of durations beyond K: each further position adds ``duration_tail[c]`` to the score
        of duration K. -inf for a label whose segments last at most K positions.
    segment_scores : Tensor of shape (B, T, K, C), optional
        ``segment_scores[b, s, k - 1, c]`` is added for a segment that starts at s, lasts k
        positions and has label c: any score of a whole span. A segment longer than K gets that of
        K. Entries of segments that pass the end of their sequence are ignored.
    transition_scores : Tensor of shape (B, T, C, C), optional
        ``transition_scores[b, s, c_src, c_dst]`` is added to the transition into a segment that
        starts at s. Row 0 is ignored: nothing precedes the first segment.

    Notes
    -----
    The constructor checks nothing. The public entry points check their argument once, by
    `flash_semicrf.problem.validation.check_potentials`.
    """

    scores: Tensor
    transition: Tensor
    duration_bias: Tensor
    lengths: Tensor
    start_scores: Tensor | None = None
    end_scores: Tensor | None = None
    initial_scores: Tensor | None = None
    final_scores: Tensor | None = None
    duration_tail: Tensor | None = None
    segment_scores: Tensor | None = None
    transition_scores: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of sequences B."""
        return self.scores.shape[0]

    @property
    def num_positions(self) -> int:
        """Padded length T."""
        return self.scores.shape[1]

    @property
    def num_labels(self) -> int:
        """Number of labels C."""
        return self.scores.shape[2]

    @property
    def max_duration(self) -> int:
        """Longest duration K that has a score of its own."""
        return self.duration_bias.shape[0]

    @property
    def unlimited(self) -> Tensor | None:
        """Labels whose segments may last longer than K, bool Tensor (C,); None without a tail."""
        return None if self.duration_tail is None else self.duration_tail.detach() > NEG_INF

    @property
    def device(self) -> torch.device:
        """Device of the scores."""
        return self.scores.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores."""
        return self.scores.dtype

    @functools.cached_property
    def score_range(self) -> tuple[float, float]:
        """Smallest and largest entry of `scores` on the CPU, including padding; NaN if any is NaN.

        Cached with the problem. Computed in this thread, by numpy: a parallel operation of torch
        would wait for a busy core.
        """
        flat = self.scores.detach().reshape(-1).numpy()
        # Both at once of what a cache holds: reading a large array takes longer than comparing.
        parts = [flat[i : i + _CACHED] for i in range(0, flat.size, _CACHED)]
        extremes = np.array([(part.min(), part.max()) for part in parts])
        return float(extremes[:, 0].min()), float(extremes[:, 1].max())

    def parameters(self) -> dict[str, Tensor]:
        """Tensors that carry gradients, by name, without absent ones."""
        # By attributes: torch.compile of torch 2.9 does not trace the dict of a frozen dataclass.
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}

    def replace(self, **changes: Tensor | None) -> Potentials:
        """Copy with some fields changed."""
        given = {name: getattr(self, name) for name in ("lengths", *NAMES)}
        return Potentials(**given | changes)

    def to(self, *args: Any, **kwargs: Any) -> Potentials:
        """Copy with every parameter passed through ``Tensor.to``; `lengths` stays int64."""
        moved = {name: value.to(*args, **kwargs) for name, value in self.parameters().items()}
        return self.replace(lengths=self.lengths.to(moved["scores"].device), **moved)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Dtype of log Z and of path scores: float64, float32 on devices that have no float64.

    A float32 has 24 bits: log Z of 10^6 positions would be rounded to multiples of 0.06 nats, and
    the loss, which is its small difference from the gold score, would be lost.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def center_scores(
    scores: Tensor, lengths: Tensor, mode: Centering = "position"
) -> tuple[Tensor, Tensor]:
    """Centre scores, for numerical accuracy.

    Parameters
    ----------
    scores : Tensor of shape (B, T, C)
    lengths : integer Tensor of shape (B,)
    mode : {"position", "sequence", "none"}
        "position" subtracts the largest score of each position: the scores of all segmentations
        change by the same sum, so the model is unchanged. "sequence" subtracts the mean of each
        label over the valid positions that are not forbidden, which changes the model (it removes
        the offsets of labels) and is kept for compatibility with release 0.2.0 of the earlier
        package. "none" subtracts nothing.

    Returns
    -------
    centred : Tensor of shape (B, T, C)
        In float64 with "position", since a float32 difference would be rounded; otherwise in the
        dtype of the scores.
    offset : float64 Tensor of shape (B,)
        To be added to log Z, and to any score, of the centred problem.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a Tensor, or the mode is unknown.
    """
    check_tensor("scores", scores)
    check_tensor("lengths", lengths)
    valid = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    wide = accumulator_dtype(scores.device)
    if mode == "position":
        shift = scores.detach().amax(-1)
        shift = torch.where(valid & (shift > NEG_INF), shift, 0.0).to(wide)
        return scores - shift[..., None], shift.sum(1)  # promoted before it is subtracted
    if mode == "sequence":
        counted = valid[..., None] & (scores > NEG_INF)
        inside = torch.where(counted, scores, 0.0)
        mean = inside.sum(1, dtype=wide) / counted.sum(1).clamp(min=1)
        scores = (scores.to(wide) - mean[:, None]).to(scores.dtype)
    if mode in ("sequence", "none"):
        return scores, torch.zeros(len(scores), dtype=wide, device=scores.device)
    raise ValueError(f'`centering` must be "position", "sequence" or "none"; got {mode!r}.')


def ignored(potentials: Potentials, name: str) -> Tensor:
    """Entries of a parameter `BY_SEQUENCE` that belong to no segment: bool, broadcastable to it.

    Rows after a sequence's end, segments that pass it, and transitions into the first segment.
    """
    p = potentials
    position = torch.arange(p.num_positions, device=p.device)
    if name == "segment_scores":
        stop = position[:, None] + torch.arange(1, p.max_duration + 1, device=p.device)
        return (stop > p.lengths[:, None, None])[..., None]
    outside = position >= p.lengths[:, None]
    if name == "transition_scores":
        return (outside | (position == 0))[..., None, None]
    return outside[..., None]


def within_length(potentials: Potentials) -> Potentials:
    """Problem without the scores of durations longer than the padded length.

    Parameters
    ----------
    potentials : Potentials

    Returns
    -------
    Potentials
        With K at most T, and the same segmentations and scores.

    Examples
    --------
    >>> zeros = torch.zeros(9, 2)
    >>> problem = Potentials(zeros[None, :4], zeros[:2], zeros, torch.tensor([4]))
    >>> within_length(problem).max_duration
    4
    """
    p = potentials
    longest = p.num_positions
    if p.max_duration <= longest:
        return p
    by_duration = {"duration_bias": p.duration_bias[:longest]}
    if p.transition.dim() == 3:
        by_duration["transition"] = p.transition[:longest]
    if p.initial_scores is not None and p.initial_scores.dim() == 2:
        by_duration["initial_scores"] = p.initial_scores[:longest]
    if p.segment_scores is not None:
        by_duration["segment_scores"] = p.segment_scores[:, :, :longest]
    return p.replace(**by_duration)


def score_rows(potentials: Potentials, table: SegmentTable) -> Tensor:
    """Score of each row of a segment table, its transition and boundary terms included.

    Parameters
    ----------
    potentials : Potentials
    table : SegmentTable
        Rows ordered by sequence, then start; each sequence tiled from 0 to its length.

    Returns
    -------
    float64 Tensor of shape (N,)
        Differentiable in every parameter; -inf for a segment that is forbidden.
    """
    p = potentials
    sequence, _, stop, label = table
    total = content_rows(p, table) + _transition_rows(p, table)
    if p.final_scores is not None:
        last = stop == p.lengths[sequence]
        total = total + torch.where(last, p.final_scores[label], 0.0)
    # A forbidden term moves when it is upcast and added to; nothing else comes near it.
    return total.masked_fill(total <= 0.5 * NEG_INF, -torch.inf)


def content_rows(potentials: Potentials, table: SegmentTable) -> Tensor:
    """Score of each segment without its transition: positions, duration, span, start and end.

    Parameters
    ----------
    potentials : Potentials
    table : SegmentTable
        Any segments inside their sequences, in any order.

    Returns
    -------
    float64 Tensor of shape (N,)
        <= 0.5 * `NEG_INF` for a segment that is forbidden.
    """
    p = potentials
    sequence, start, stop, label = table
    owner, position, row = covered_positions(table)
    wide = accumulator_dtype(p.device)
    content = p.scores[owner, position, label[row]].to(wide)
    total = torch.zeros(len(start), dtype=wide, device=p.device).index_add(0, row, content)
    total = total + bias_rows(p, stop - start, label)
    if p.start_scores is not None:
        total = total + p.start_scores[sequence, start, label]
    if p.end_scores is not None:
        total = total + p.end_scores[sequence, stop - 1, label]
    if p.segment_scores is not None:
        total = total + p.segment_scores[sequence, start, table_rows(p, stop - start), label]
    return total


def table_rows(potentials: Potentials, duration: Tensor) -> Tensor:
    """Row of each duration in tables by duration: ``min(duration, K) - 1``."""
    return duration.clamp(max=potentials.max_duration) - 1


def bias_rows(potentials: Potentials, duration: Tensor, label: Tensor) -> Tensor:
    """Score of each duration (N,) of a label (N,), including the tail, float64 (N,)."""
    p = potentials
    wide = accumulator_dtype(p.device)
    bias = p.duration_bias[table_rows(p, duration), label].to(wide)
    if p.duration_tail is None:
        return bias
    beyond = duration - p.max_duration
    tail = beyond.clamp(min=1) * p.duration_tail[label].to(wide)
    return bias + torch.where(beyond > 0, tail, 0.0)


def _transition_rows(p: Potentials, table: SegmentTable) -> Tensor:
    """Transition term of each row; the first row of a sequence gets the initial term."""
    sequence, start, stop, label = table
    k = table_rows(p, stop - start)
    source = torch.roll(label, 1)
    by_duration = p.transition.dim() == 3
    between = p.transition[k, source, label] if by_duration else p.transition[source, label]
    if p.transition_scores is not None:
        between = between.to(accumulator_dtype(p.device))
        between = between + p.transition_scores[sequence, start, source, label]
    initial = first_term(p)
    first = initial[k, label] if initial.dim() == 2 else initial[label]
    return torch.where(start == 0, first, between)


def initial_term(transition: Tensor) -> Tensor:
    """Log-sum-exp of a (..., C_src, C_dst) transition over its source labels: (..., C_dst).

    In float64, and differentiable.
    """
    # A column that is wholly forbidden has the value -inf and no gradient; log-sum-exp has NaN.
    dead = (transition <= NEG_INF).all(-2)
    wide = transition.to(accumulator_dtype(transition.device))
    safe = torch.where(dead.unsqueeze(-2), 0.0, wide)
    return torch.where(dead, -torch.inf, torch.logsumexp(safe, -2))


def first_term(potentials: Potentials) -> Tensor:
    """Transition term of the first segment: `initial_scores`, or else `initial_term`.

    Shape (C,); (K, C), by the first segment's duration, for (K, C, C) transitions.
    """
    p = potentials
    return initial_term(p.transition) if p.initial_scores is None else p.initial_scores


def explicit_start(potentials: Potentials) -> Potentials:
    """Problem with the transition term of the first segment as `initial_scores`.

    In this form the score is linear in one more parameter, and transitions count only between
    segments. Shape (C,); (K, C), by the first segment's duration, for (K, C, C)
    transitions. Differentiable.
    """
    if potentials.initial_scores is not None:
        return potentials
    return potentials.replace(initial_scores=first_term(potentials))


def score_segments(potentials: Potentials, table: SegmentTable) -> Tensor:
    """Score of one segmentation per sequence.

    Parameters
    ----------
    potentials, table
        As for `score_rows`.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter; -inf for a segmentation that is forbidden.
    """
    rows = score_rows(potentials, table)
    zero = torch.zeros(potentials.batch_size, dtype=rows.dtype, device=rows.device)
    return zero.index_add(0, table.sequence, rows)


def forbid(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores with -inf where a mask is False; without a mask the scores themselves."""
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)

"""Problems without a `duration_tail` that have the segmentations of one with it.

`expand` gives every label copies, whose segments are pieces of the original ones:

    whole    durations 1..K: the segments of at most K positions
    first    duration K: the first K positions of a longer one
    last     duration 1: a further position, of score `duration_tail`; ends the segment
    middle   as `last`, where another further position must follow

A longer segment is ``first middle* last``: each segmentation is that of one sequence of pieces, so
sums, maxima, samples and ranks are those of the original problem. Start scores count at whole and
first pieces, end scores at whole and last ones. Without end scores a last piece may follow another,
which saves the middle ones. Cost: that of 3C labels (4C with end scores) with the same K. Results
come back by `fold_gradients`, `fold_messages` and `fold_table`.

`unrolled` writes the durations up to T out instead: the same labels, K = T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_semicrf.potentials import Potentials
from flash_semicrf.segments import SegmentTable

__all__ = [
    "NUM_COPIES",
    "expand",
    "expand_direction",
    "fold_durations",
    "fold_gradients",
    "fold_messages",
    "fold_table",
    "unrolled",
]

NUM_COPIES = 4
"""Most copies of a label in an expanded problem."""

_WHOLE, _FIRST, _LAST, _MIDDLE = range(NUM_COPIES)
_OPENS, _CLOSES = (_WHOLE, _FIRST), (_WHOLE, _LAST)
_AT_STARTS, _AT_ENDS = ("start_scores", "initial_scores"), ("end_scores", "final_scores")


def unrolled(potentials: Potentials) -> Potentials:
    """The same problem without a tail, with a score for every duration up to T.

    Parameters
    ----------
    potentials : Potentials

    Returns
    -------
    Potentials
        With K = max(K, T), differentiable; the problem itself where it has no tail.
    """
    p = potentials
    if p.duration_tail is None:
        return p
    beyond = max(0, p.num_positions - p.max_duration)
    steps = torch.arange(1, beyond + 1, device=p.device, dtype=p.duration_bias.dtype)
    longer = p.duration_bias[-1] + steps[:, None] * p.duration_tail
    changed = {"duration_bias": torch.cat([p.duration_bias, longer])}
    for name, dims in (("transition", 3), ("initial_scores", 2)):
        value = getattr(p, name)
        if value is not None and value.dim() == dims:
            changed[name] = torch.cat([value, value[-1:].expand(beyond, *value.shape[1:])])
    return p.replace(duration_tail=None, **changed)


def fold_durations(counts: Tensor, max_duration: int) -> tuple[Tensor, Tensor]:
    """Counts by duration of an unrolled problem for the original one.

    Parameters
    ----------
    counts : Tensor of shape (B, max(K, T), ...)
    max_duration : int
        K.

    Returns
    -------
    beyond : Tensor of shape (B, ...)
        Positions beyond the K-th.
    by_row : Tensor of shape (B, K, ...)
        The last row counts the durations above K too.
    """
    by_row, longer = counts[:, :max_duration].clone(), counts[:, max_duration:]
    by_row[:, -1] += longer.sum(1)
    steps = torch.arange(1, longer.shape[1] + 1, device=counts.device, dtype=counts.dtype)
    return torch.einsum("bk...,k->b...", longer, steps), by_row


def expand(
    potentials: Potentials, semiring: str = "log", end_marginals: bool = False
) -> Potentials:
    """The problem over copies of the labels.

    Parameters
    ----------
    potentials : Potentials
        With a `duration_tail`.
    semiring : {"log", "max"}
        What it is for; matters where `initial_scores` are absent.
    end_marginals : bool
        The gradient by end scores is wanted, whether or not there are any.

    Returns
    -------
    Potentials
        With 3C labels, or 4C; label c's copies at c, C + c, 2C + c, ...
    """
    copies = 4 if end_marginals or potentials.end_scores is not None else 3
    p = _copied(potentials, copies, -math.inf)
    first = p.scores[:, :1]
    if semiring == "log" and p.initial_scores is None:
        first = first - math.log(2)  # the free source counts twice: whole and last
    opens = torch.arange(copies * potentials.num_labels, device=p.device)
    opens = opens < 2 * potentials.num_labels
    first = torch.where(opens, first, -math.inf)
    return p.replace(scores=torch.cat([first, p.scores[:, 1:]], 1))


def expand_direction(direction: Potentials, end_marginals: bool = False) -> Potentials:
    """The change of an expanded problem along a direction of the original one, all finite."""
    copies = 4 if end_marginals or direction.end_scores is not None else 3
    return _copied(direction, copies, 0.0)


def _copied(p: Potentials, copies: int, blank: float) -> Potentials:
    """Parameters of the pieces; `blank` where a piece has no use for them."""
    changed: dict[str, Tensor | None] = {"duration_tail": None}
    changed["scores"] = torch.cat([p.scores] * copies, -1)
    for names, kinds, other in (
        (_AT_STARTS[:1], _OPENS, 0.0),
        (_AT_ENDS[:1], _CLOSES, 0.0),
        (_AT_STARTS[1:], _OPENS, blank),
        (("final_scores",), _CLOSES, blank),
    ):
        for name in names:
            value = getattr(p, name)
            if value is None and name == "final_scores":
                value = p.scores.new_zeros(p.num_labels)  # no sequence ends inside a segment
            if value is not None:
                nothing = torch.full_like(value, other)
                parts = [value if kind in kinds else nothing for kind in range(copies)]
                changed[name] = torch.cat(parts, -1)
    changed["duration_bias"] = _copied_bias(p, copies, blank)
    changed["transition"] = _copied_transition(p.transition, copies, blank)
    return p.replace(**changed)


def _copied_bias(p: Potentials, copies: int, blank: float) -> Tensor:
    nothing = torch.full_like(p.duration_bias, blank)
    first = torch.cat([nothing[1:], p.duration_bias[-1:]])
    further = torch.cat([p.duration_tail[None].to(nothing.dtype), nothing[1:]])
    return torch.cat([p.duration_bias, first, further, further][:copies], -1)


def _copied_transition(transition: Tensor, copies: int, blank: float) -> Tensor:
    """Transition (..., C', C') between pieces."""
    nothing = torch.full_like(transition, blank)
    same = torch.eye(transition.shape[-1], dtype=torch.bool, device=transition.device)
    goes_on = nothing.masked_fill(same, 0.0)
    # Pieces that may follow one which the segment does not end with.
    inside = (_LAST,) if copies == 3 else (_LAST, _MIDDLE)
    rows = []
    for source in range(copies):
        unfinished = source in (_FIRST, _MIDDLE) or (source == _LAST and copies == 3)
        row = []
        for target in range(copies):
            if source in _CLOSES and target in _OPENS:
                row.append(transition)
            else:
                row.append(goes_on if unfinished and target in inside else nothing)
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


def fold_gradients(
    found: dict[str, Tensor], wanted: set[str], num_labels: int, max_duration: int
) -> dict[str, Tensor]:
    """Gradients by the original parameters, from those by the expanded ones.

    Parameters
    ----------
    found : dict of Tensor
        Of every `wanted` parameter, and "duration_bias" for "duration_tail"; in the forms of
        `flash_semicrf.streaming.dispatch.Backend.gradients`.
    wanted : set of str
    num_labels, max_duration : int
        C and K of the original problem.

    Returns
    -------
    dict of Tensor
    """
    folded = {}
    for name in wanted - {"duration_tail", "duration_bias"}:
        parts = found[name].unflatten(-1, (-1, num_labels))
        if name == "scores":
            folded[name] = parts.sum(-2)
        elif name == "transition":
            between = parts.unflatten(-3, (-1, num_labels))
            kinds = [between[..., s, :, t, :] for s in _CLOSES for t in _OPENS]
            folded[name] = sum(kinds)
        else:
            first, second = _OPENS if name in _AT_STARTS else _CLOSES
            folded[name] = parts[..., first, :] + parts[..., second, :]
    if wanted & {"duration_tail", "duration_bias"}:
        parts = found["duration_bias"].unflatten(-1, (-1, num_labels))
        tail = parts[:, 0, _LAST:].sum(-2)
        bias = parts[:, :, _WHOLE].clone()
        bias[:, max_duration - 1] += parts[:, max_duration - 1, _FIRST]
        folded["duration_tail"], folded["duration_bias"] = tail, bias
    return {name: folded[name] for name in wanted}


def fold_messages(messages: Tensor, num_labels: int, semiring: str = "log") -> Tensor:
    """Forward messages (B, T+1, C) of the original labels, from those of the expanded ones."""
    parts = messages.unflatten(-1, (-1, num_labels))
    whole, last = parts[..., _WHOLE, :], parts[..., _LAST, :]
    both = torch.maximum(whole, last) if semiring == "max" else torch.logaddexp(whole, last)
    # alpha_0 is the free source, 0 for every piece.
    return torch.cat([whole[:, :1], both[:, 1:]], 1)


def fold_table(table: SegmentTable, num_labels: int) -> SegmentTable:
    """Segments joined from their pieces, rows in order."""
    opens = (table.label < 2 * num_labels).nonzero()[:, 0]
    last = torch.cat([opens[1:], opens.new_full((min(len(opens), 1),), len(table.label))]) - 1
    return SegmentTable(
        table.sequence[opens], table.start[opens], table.stop[last], table.label[opens] % num_labels
    )

"""Known facts about the segmentations of a batch, and the problem restricted to them.

The segmentations that agree with `Constraints` are those of another `Potentials`, with the same
scores, to which every kernel, gradient and decoder applies unchanged:

- a label that is not allowed at a position has a score of -inf there;
- where no segment may start, start scores are -inf;
- where a segment must start, at t, none may cover both t-1 and t. Every label gets two copies with
  the same parameters, which are allowed alternately between forced boundaries, so that a segment,
  which has one label, cannot cross a boundary. The transition term of the first segment stays that
  of the original labels.

Cost: that of the problem; with forced boundaries, that of 2C labels. A boundary that the allowed
labels imply, because t-1 and t have none in common, needs no copies.

References
----------
A. Culotta and A. McCallum, Confidence Estimation for Information Extraction, HLT-NAACL 2004.
Y. Tsuboi, H. Kashima, S. Mori, H. Oda and Y. Matsumoto, Training Conditional Random Fields Using
Incomplete Annotations, COLING 2008.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flash_semicrf.problem.constraint_masks import masks
from flash_semicrf.problem.potentials import Potentials, explicit_start, forbid
from flash_semicrf.problem.segments import (
    LongSegments,
    Segment,
    SegmentTable,
    covered_positions,
    labels_to_table,
    limit_durations,
)
from flash_semicrf.problem.validation import check_choice, check_int, check_potentials

__all__ = ["Constraints", "constrain", "fold_table", "unfold_table"]

SegmentLists: TypeAlias = SegmentTable | Sequence[Sequence[tuple[int, int, int] | Segment]]
Positions: TypeAlias = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Constraints:
    """Known facts about the segmentation of each sequence of a batch, all of which must hold.

    Parameters
    ----------
    labels : integer Tensor of shape (B, T), optional
        The label of each position, or `ignore_index` where it is unknown. Boundaries between equal
        labels remain free, other than with `from_labels`.
    allowed : bool Tensor of shape (B, T, C), optional
        Labels allowed at each position.
    boundaries : bool Tensor of shape (B, T) or B lists of positions, optional
        Positions at which a segment must start. Position 0 and the end of the sequence are always
        boundaries.
    forbidden_boundaries : bool Tensor of shape (B, T) or B lists of positions, optional
        Positions t at which no segment may start: t-1 and t lie in one segment.
    segments : SegmentTable or B lists, optional
        Segments that must occur, as half-open ``(start, stop, label)`` tuples or as `Segment`
        objects, whose end is inclusive. They need not tile the sequence.
    forbidden_spans : SegmentTable or B lists, optional
        In the same forms: spans in which no position may have the label.
    ignore_index : int, default=-100
        Value of unknown `labels`.

    Notes
    -----
    Entries after the end of a sequence are padding and ignored, except for forced boundaries, which
    must lie inside. Constraints that contradict each other, or the model, leave no segmentation:
    log Z is -inf.

    A single segment ``[start, stop)`` with its label cannot be forbidden while longer and shorter
    ones are allowed at the same place: this depends on three numbers at once, which scores of
    positions, boundaries and durations cannot express.

    Examples
    --------
    >>> from flash_semicrf.inference.viterbi import viterbi
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> scores, lengths = torch.randn(1, 8, 2), torch.tensor([8])
    >>> problem = Potentials(scores, torch.zeros(2, 2), torch.zeros(4, 2), lengths)
    >>> known = Constraints(segments=[[(2, 5, 1)]], boundaries=[[7]])
    >>> [(s.start, s.end, s.label) for s in viterbi(problem, constraints=known).segments[0]][-1]
    (7, 7, 0)
    """

    labels: Tensor | None = None
    allowed: Tensor | None = None
    boundaries: Positions | None = None
    forbidden_boundaries: Positions | None = None
    segments: SegmentLists | None = None
    forbidden_spans: SegmentLists | None = None
    ignore_index: int = -100

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        lengths: Tensor,
        max_duration: int,
        long_segments: LongSegments = "split",
        ignore_index: int = -100,
        unlimited: Tensor | None = None,
    ) -> Constraints:
        """Constraints from partly known labels, in which runs of equal labels are segments.

        Neighbouring known positions lie in one segment if their labels are equal, in two if they
        differ. A run next to an unknown position may continue there.

        Parameters
        ----------
        labels : integer Tensor of shape (B, T)
            `ignore_index` where the label is unknown.
        lengths : integer Tensor of shape (B,)
        max_duration : int
            Longest duration K, in positions.
        long_segments : {"split", "error"}
            Treatment of a run of known labels longer than K, which cannot be one segment: "split"
            leaves the boundaries inside it free (with one warning that counts such runs, unless K
            is 1), "error" raises ValueError.
        ignore_index : int, default=-100
            Value of unknown labels.
        unlimited : bool Tensor of shape (C,), optional
            Labels whose segments may be longer than K, as for
            `flash_semicrf.problem.segments.labels_to_table`.

        Returns
        -------
        Constraints

        Raises
        ------
        ValueError
            With ``long_segments="error"``, if a run is too long; the message names the first.

        Examples
        --------
        >>> labels = torch.tensor([[0, 0, -100, 1]])
        >>> known = Constraints.from_labels(labels, torch.tensor([4]), max_duration=3)
        >>> known.forbidden_boundaries
        tensor([[False,  True, False, False]])
        """
        check_choice("long_segments", long_segments, ("split", "error"))
        check_int("ignore_index", ignore_index)
        runs = labels_to_table(labels, lengths)
        runs = _rows(runs, runs.label != ignore_index)
        if long_segments == "error":
            limit_durations(runs, max_duration, "error", unlimited)
        short = runs.stop - runs.start <= max_duration
        if unlimited is not None:
            short |= unlimited[runs.label]
        if not bool(short.all()) and max_duration > 1:  # with K = 1 all boundaries are known
            warnings.warn(
                f"{int((~short).sum())} runs of equal known labels are longer than "
                f"max_duration={max_duration}: they constrain labels, but not boundaries.",
                UserWarning,
                stacklevel=2,
            )
        runs = _rows(runs, short)
        joined = torch.zeros_like(labels, dtype=torch.bool)
        sequence, position, row = covered_positions(runs)
        joined[sequence, position] = position != runs.start[row]
        return cls(labels=labels, forbidden_boundaries=joined, ignore_index=ignore_index)

    def apply(self, potentials: Potentials) -> Potentials:
        """Problem whose segmentations are those that agree with the constraints.

        Parameters
        ----------
        potentials : Potentials

        Returns
        -------
        Potentials
            With the same C labels or, if copies are needed, 2C labels and `initial_scores`;
            `fold_table` and `fold_marginals` convert results back. Differentiable in `potentials`.

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid; the message names it and the index.
        """
        return constrain(check_potentials(potentials), self)


def constrain(potentials: Potentials, constraints: Constraints | None) -> Potentials:
    """`Constraints.apply` for checked potentials; the potentials themselves without constraints.

    Raises
    ------
    TypeError, ValueError
        If the constraints are invalid; the message names the argument and the index.
    """
    p, known = potentials, constraints
    if known is None:
        return p
    if not isinstance(known, Constraints):
        raise TypeError(f"`constraints` must be a Constraints; got {type(known).__name__}.")
    allowed, forced, joined = masks(known, p)
    if joined is not None:
        start = torch.zeros_like(p.scores) if p.start_scores is None else p.start_scores
        p = p.replace(start_scores=forbid(start, ~joined[..., None]))
    if forced is not None and allowed is not None:
        forced[:, 1:] &= (allowed[:, 1:] & allowed[:, :-1]).any(-1)
    if forced is not None and bool(forced.any()):
        return _alternating(p, allowed, forced)
    return p.replace(scores=forbid(p.scores, allowed))


def fold_table(table: SegmentTable, num_labels: int) -> SegmentTable:
    """Segments of a constrained problem with the labels 0..C-1 of the original one."""
    return SegmentTable(table.sequence, table.start, table.stop, table.label % num_labels)


def unfold_table(table: SegmentTable, num_labels: int, num_copies: int) -> list[SegmentTable]:
    """Segments with each of the labels that represent theirs in a constrained problem.

    At most one of these copies of a segment is feasible there: the one whose label is allowed at
    its place.

    Parameters
    ----------
    table : SegmentTable
    num_labels, num_copies : int
        Labels of the original problem, C, and of the constrained one, C or 2C.

    Returns
    -------
    list of SegmentTable
        One table per copy of the labels.
    """
    firsts = range(0, num_copies, num_labels)
    return [table._replace(label=table.label + first) for first in firsts]


def _alternating(p: Potentials, allowed: Tensor | None, forced: Tensor) -> Potentials:
    """Problem with two copies of each label, allowed alternately between forced boundaries."""
    # The free source of the first segment would otherwise count every label twice.
    parameters = explicit_start(p).parameters()
    copies = {name: torch.cat([value, value], -1) for name, value in parameters.items()}
    for name in copies.keys() & {"transition", "transition_scores"}:
        copies[name] = torch.cat([copies[name]] * 2, -2)
    odd = forced.cumsum(1).remainder(2).bool()[..., None]
    turns = [~odd, odd] if allowed is None else [allowed & ~odd, allowed & odd]
    in_turn = torch.cat([turn.expand(p.scores.shape) for turn in turns], -1)
    return p.replace(**copies | {"scores": forbid(copies["scores"], in_turn)})


def _rows(table: SegmentTable, keep: Tensor) -> SegmentTable:
    return SegmentTable(*(column[keep] for column in table))

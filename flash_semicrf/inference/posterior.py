"""Posterior probabilities of positions, boundaries and segments.

One forward-backward pass gives all of them: the marginals are the gradient of log Z, and

    P(segment [s, t) of label c) = exp(gamma_s(c) + S_t(c) - S_s(c) + D_{t-s}(c) (+ start_s(c)
                                       + end_{t-1}(c)) + beta_t(c) - log Z),
    gamma_s(c) = LSE_{c'} [alpha_s(c') + A[c', c]],   gamma_0 = the initial term.

Cost T(KC + C²) for the messages, and C plus the duration for each given segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.flags import validated
from flash_semicrf.inference.marginals import SegmentMarginals, fold_marginals
from flash_semicrf.problem.constraints import Constraints, constrain, unfold_table
from flash_semicrf.problem.flags import Validate, poisoned
from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    center_scores,
    content_rows,
    explicit_start,
    first_term,
    table_rows,
)
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.problem.validation import check_potentials, check_rows
from flash_semicrf.streaming.dispatch import choose

__all__ = ["segment_marginals", "segment_probabilities"]

_FIELDS = {
    "scores": "position",
    "start_scores": "start",
    "end_scores": "end",
    "transition": "transition",
    "duration_bias": "duration",
    "duration_tail": "tail",
    "segment_scores": "segment",
    "transition_scores": "change",
}
"""Field of `SegmentMarginals` that holds the expected counts of a parameter."""


def segment_marginals(
    potentials: Potentials,
    backend: str = "auto",
    counts: bool = True,
    *,
    constraints: Constraints | None = None,
    validate: Validate = "auto",
) -> SegmentMarginals:
    """Posterior marginals of positions, starts and ends, and expected counts.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        As for `flash_semicrf.log_partition`.
    counts : bool
        Also count transitions, durations and, if they have scores, single segments and transitions
        by position; if False, those fields are None and the cost is lower.
    constraints : Constraints, optional
        Condition on known facts.
    validate : {"auto", "values", "shapes"}, default="auto"
        As for `flash_semicrf.log_partition`.

    Returns
    -------
    SegmentMarginals
        Tensors of shape (B, T, C) in the dtype of the scores, counts in float64, without gradient;
        zero after the end of a sequence, and everywhere in a sequence without a feasible
        segmentation. With ``validate="shapes"`` NaN in a sequence with a bad length or value.

    Raises
    ------
    TypeError, ValueError
        As for `flash_semicrf.log_partition`.

    Examples
    --------
    Three segmentations of two positions: two segments of 1 or one of 2.

    >>> zeros = Potentials(
    ...     torch.zeros(1, 2, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([2])
    ... )
    >>> marginals = segment_marginals(zeros)
    >>> marginals.boundary.tolist(), marginals.duration[0, :, 0].round(decimals=6).tolist()
    ([[1.0, 0.5]], [1.0, 0.5])
    """
    p, bad = validated(potentials, backend, validate, constraints)
    names = ["scores", "start_scores", "end_scores"]
    with torch.no_grad():
        given = constrain(p, constraints)
        if counts:
            names += ["transition", "duration_bias"]
            optional = ("duration_tail", "segment_scores", "transition_scores")
            names += [name for name in optional if getattr(p, name) is not None]
            given = explicit_start(given)
        _, found = choose(backend, given).gradients(given, set(names))
    counted = {_FIELDS[name]: poisoned(found[name], bad) for name in names}
    marginals = SegmentMarginals(**counted)
    if counts and p.duration_tail is None:
        marginals = marginals._replace(tail=torch.zeros_like(found["duration_bias"][:, 0]))
    same = given.num_labels == p.num_labels
    return marginals if same else fold_marginals(marginals, p.num_labels)


def segment_probabilities(
    potentials: Potentials,
    table: SegmentTable,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> Tensor:
    """Posterior probability of each given segment.

    Parameters
    ----------
    potentials : Potentials
    table : SegmentTable
        Any segments inside their sequences, in any order; they need not tile the sequences.
    backend : str
        As for `flash_semicrf.log_partition`.
    constraints : Constraints, optional
        Condition on known facts.

    Returns
    -------
    float64 Tensor of shape (N,)
        P(the segmentation contains this segment), without gradient; 0 if no segmentation is
        feasible.

    Raises
    ------
    TypeError, ValueError
        As for `flash_semicrf.log_partition`, and if a segment leaves its sequence.

    Examples
    --------
    >>> from flash_semicrf import Segment
    >>> from flash_semicrf.problem.segments import segments_to_table
    >>> zeros = Potentials(
    ...     torch.zeros(1, 2, 1), torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([2])
    ... )
    >>> segment_probabilities(zeros, segments_to_table([[Segment(0, 1, 0)]]))
    tensor([0.5000], dtype=torch.float64)
    """
    p = check_potentials(potentials)
    check_rows(table, p)
    with torch.no_grad():
        given = constrain(p, constraints)
        given = given.replace(scores=center_scores(given.scores, given.lengths)[0])
        messages = choose(backend, given).messages(given)
        copies = unfold_table(table, p.num_labels, given.num_labels)
        found = [_probabilities(given, copy, *messages) for copy in copies]
        return torch.stack(found).sum(0).clamp(max=1.0)


def _probabilities(
    p: Potentials, table: SegmentTable, log_z: Tensor, alpha: Tensor, beta: Tensor
) -> Tensor:
    """`segment_probabilities` from the messages."""
    sequence, _, stop, label = table
    content = content_rows(p, table)
    log_z = log_z[sequence]
    log_p = _arrivals(p, alpha, table) + content + beta[sequence, stop, label] - log_z
    dead = (content <= 0.5 * NEG_INF) | (log_z == -torch.inf) | (log_p == -torch.inf)
    return torch.where(dead, 0.0, log_p.exp())


def _arrivals(p: Potentials, alpha: Tensor, table: SegmentTable) -> Tensor:
    """gamma_s(c) of each row, for its duration if transitions depend on durations: (N,)."""
    sequence, start, stop, label = table
    by_duration = p.transition.dim() == 3
    index = (table_rows(p, stop - start), label) if by_duration else (label,)
    arriving = p.transition.movedim(-1, -2)[index]  # (N, C_src)
    if p.transition_scores is not None:
        arriving = arriving.to(alpha.dtype) + p.transition_scores[sequence, start, :, label]
    between = torch.logsumexp(alpha[sequence, start] + arriving, -1)
    initial = first_term(p)
    first = initial[index] if initial.dim() == 2 else initial[label]
    return torch.where(start == 0, first.to(between), between)

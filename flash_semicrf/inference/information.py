"""Exact entropy, cross-entropy and Kullback-Leibler divergence of segmentation distributions.

The score is linear in its parameters, so one forward-backward gives its expectation, and

    H(p)     = log Z_p - E_p[score_p]
    H(p, q)  = log Z_q - E_p[score_q]
    KL(p, q) = log Z_q - log Z_p - E_p[score_q - score_p]

at any length, without edge tensors, in nats. With constraints, p and q are the distributions
conditional on them. The largest score of each position is subtracted first: it cancels in every
difference above. All results are differentiable once; their gradients are expected counts and
products with the Hessian of log Z; see `flash_semicrf.inference.expectations`.

References
----------
D. Hernando, V. Crespi and G. Cybenko, Efficient Computation of the Hidden Markov Model Entropy for
a Given Observation Sequence, IEEE Transactions on Information Theory 51 (7), 2005.
G. S. Mann and A. McCallum, Efficient Computation of Entropy Gradient for Semi-Supervised
Conditional Random Fields, NAACL 2007.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.inference.expectations import centered, expected_score, position_marginals
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.viterbi import check_feasible
from flash_semicrf.problem.constraints import Constraints, constrain
from flash_semicrf.problem.potentials import NEG_INF, Potentials, explicit_start, first_term
from flash_semicrf.problem.validation import check_potentials

__all__ = ["cross_entropy", "entropy", "kl_divergence", "position_entropy"]


def entropy(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> Tensor:
    """Entropy of the distribution over segmentations: -sum of P log P.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        As for `flash_semicrf.log_partition`.
    constraints : Constraints, optional
        Condition on known facts.

    Returns
    -------
    float64 Tensor of shape (B,)
        In nats; differentiable once in every parameter.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or a sequence has no feasible segmentation; the message names
        it.

    Examples
    --------
    Five equally probable segmentations.

    >>> scores, lengths = torch.zeros(1, 4, 1), torch.tensor([4])
    >>> problem = Potentials(scores, torch.zeros(1, 1), torch.zeros(2, 1), lengths)
    >>> round(float(entropy(problem).exp()), 6)
    5.0
    """
    p = constrain(check_potentials(potentials), constraints)
    log_z, mean = expected_score(explicit_start(centered(p)), backend=backend)
    check_feasible(log_z, constraints is not None)
    return log_z - mean


def cross_entropy(
    p: Potentials,
    q: Potentials,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> Tensor:
    """Expectation under p of -log q(segmentation).

    Parameters
    ----------
    p, q : Potentials
        Two models on the same sequences: `lengths`, T, K and C must agree. Transitions may be
        static in one and by duration in the other.
    backend : str
        As for `entropy`.
    constraints : Constraints, optional
        Condition both models on known facts.

    Returns
    -------
    float64 Tensor of shape (B,)
        In nats; inf if q forbids a segmentation that p allows; differentiable once in every
        parameter of both.

    Raises
    ------
    TypeError, ValueError
        As for `entropy`, and if the two problems do not match.
    """
    p, q = _matched(p, q, constraints)
    constrained = constraints is not None
    log_z_q = log_partition(q, backend)
    check_feasible(log_z_q, constrained)
    p, q = _aligned(p, q)
    log_z, mean = expected_score(p, q, backend)
    check_feasible(log_z, constrained)
    return log_z_q - mean


def kl_divergence(
    p: Potentials,
    q: Potentials,
    backend: str = "auto",
    *,
    constraints: Constraints | None = None,
) -> Tensor:
    """Kullback-Leibler divergence KL(p || q), the expectation under p of log p - log q.

    Parameters
    ----------
    p, q, backend, constraints
        As for `cross_entropy`.

    Returns
    -------
    float64 Tensor of shape (B,)
        >= 0 up to rounding, in nats; inf if q forbids a segmentation that p allows; differentiable
        once in every parameter of both.

    Raises
    ------
    TypeError, ValueError
        As for `cross_entropy`.

    Examples
    --------
    >>> from flash_semicrf.testing import random_problem
    >>> p = random_problem(batch_size=1)
    >>> q = p.replace(scores=0.5 * p.scores)
    >>> bool(kl_divergence(p, q) > 0), bool(kl_divergence(p, p) == 0)
    (True, True)
    """
    p, q = _matched(p, q, constraints)
    constrained = constraints is not None
    log_z_q = log_partition(q, backend)
    check_feasible(log_z_q, constrained)
    p, q = _aligned(p, q)
    log_z, mean = expected_score(p, _difference(q, _detached(p)), backend)
    check_feasible(log_z, constrained)
    return (log_z_q - log_z) - mean


def position_entropy(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> Tensor:
    """Entropy of the label of each position: -sum over c of P(t, c) log P(t, c).

    Parameters
    ----------
    potentials : Potentials
    backend, constraints
        As for `entropy`.

    Returns
    -------
    float64 Tensor of shape (B, T)
        In nats, from 0 to log C; 0 after the end of a sequence and if no segmentation is feasible;
        differentiable once in every parameter.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; the message names it.
    """
    p = check_potentials(potentials)
    given = explicit_start(centered(constrain(p, constraints)))
    marginals = position_marginals(given, backend).unflatten(-1, (-1, p.num_labels)).sum(-2)
    return categorical_entropy(marginals)


def categorical_entropy(probabilities: Tensor) -> Tensor:
    """-sum of P log P over the last axis, in nats; 0 log 0 counts as 0, in the gradient too."""
    inside = torch.where(probabilities > 0, probabilities, 1.0)
    return -(probabilities * inside.log()).sum(-1)


def _detached(p: Potentials) -> Potentials:
    return p.replace(**{name: value.detach() for name, value in p.parameters().items()})


def _matched(
    p: Potentials, q: Potentials, constraints: Constraints | None
) -> tuple[Potentials, Potentials]:
    """Both problems checked, also against each other, constrained and centred."""
    p, q = check_potentials(p), check_potentials(q)
    for name in ("scores", "duration_bias"):
        first, second = (tuple(getattr(x, name).shape) for x in (p, q))
        if first != second:
            raise ValueError(f"`{name}` of p and q must have one shape; got {first} and {second}.")
    if p.device != q.device:
        raise ValueError(f"p and q must be on one device; got {p.device} and {q.device}.")
    different = (p.lengths != q.lengths).nonzero()
    if len(different):
        b = int(different[0])
        raise ValueError(
            f"`lengths` of p and q must agree; got {int(p.lengths[b])} and {int(q.lengths[b])} at "
            f"index {b}."
        )
    return centered(constrain(p, constraints)), centered(constrain(q, constraints))


def _aligned(p: Potentials, q: Potentials) -> tuple[Potentials, Potentials]:
    """Both problems with the same kinds of parameters, initial scores explicit."""
    p, q = explicit_start(p), explicit_start(q)
    if p.transition.dim() != q.transition.dim():
        p, q = (x.replace(transition=_by_duration(x.transition, 2, x.max_duration)) for x in (p, q))
    if first_term(p).dim() != first_term(q).dim():
        p, q = (
            x.replace(initial_scores=_by_duration(first_term(x), 1, x.max_duration)) for x in (p, q)
        )
    if (p.duration_tail is None) != (q.duration_tail is None):
        none = torch.full_like(p.duration_bias[0], -torch.inf)
        p, q = (x.replace(duration_tail=none) if x.duration_tail is None else x for x in (p, q))
    if (p.final_scores is None) != (q.final_scores is None):
        zeros = p.scores.new_zeros(p.num_labels)
        p, q = (x.replace(final_scores=zeros) if x.final_scores is None else x for x in (p, q))
    for name in ("segment_scores", "transition_scores"):
        given = [value for x in (p, q) if (value := getattr(x, name)) is not None]
        if len(given) == 1:
            zeros = torch.zeros_like(given[0])
            p, q = (x.replace(**{name: zeros}) if getattr(x, name) is None else x for x in (p, q))
    return p, q


def _by_duration(value: Tensor, dims: int, max_duration: int) -> Tensor:
    """A parameter of `dims` axes without durations, with a leading axis of durations."""
    return value.expand(max_duration, *value.shape) if value.dim() == dims else value


def _difference(q: Potentials, p: Potentials) -> Potentials:
    """Parameters of q less those of p; 0 where p forbids, as the expected count is 0 there."""
    ours, theirs = p.parameters(), q.parameters()
    found = dict(theirs)
    for name, our in ours.items():
        allowed = our > NEG_INF
        subtracted = torch.where(allowed, our, 0.0)
        their = theirs.get(name)
        found[name] = (0.0 if their is None else torch.where(allowed, their, 0.0)) - subtracted
    return q.replace(**found)

"""Expectations under a segmentation distribution as nodes of the autograd graph.

The score by a second set of parameters q is linear in them, so under the distribution of p

    m = E_p[score_q] = <q, mu_p>,   mu_p = the gradient of log Z_p: the expected counts,
    d m / d q = mu_p,               d m / d p = (the Hessian of log Z_p) q,

and the Hessian times a vector is what a backend's ``tangents`` computes, at a small multiple of the
cost of a gradient: beside the log-sum of scores, each message carries the expectation of the score
by q (the first-order expectation semiring).

References
----------
Z. Li and J. Eisner, First- and Second-Order Expectation Semirings with Applications to Minimum-Risk
Training on Translation Forests, EMNLP 2009.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.inference.autograd import apply, named, once, scaled_gradient
from flash_semicrf.inference.marginals import IMPOSSIBLE, inner_product
from flash_semicrf.problem.potentials import (
    BY_POSITION,
    BY_SEQUENCE,
    NAMES,
    NEG_INF,
    Potentials,
    accumulator_dtype,
    center_scores,
    ignored,
)
from flash_semicrf.problem.validation import check_finite_or_forbidden
from flash_semicrf.streaming.dispatch import choose

__all__ = ["centered", "expected_score", "position_marginals", "start_marginals"]

_REASON = "Expectations under a segmentation distribution are differentiable once."


def centered(potentials: Potentials) -> Potentials:
    """Problem in float64 with the largest score of each position subtracted.

    Differences of scores are unchanged, and sums of them keep their precision.
    """
    p = potentials
    wide = accumulator_dtype(p.device)
    rest = {n: v if v.dtype == wide else v.to(wide) for n, v in p.parameters().items()}
    return p.replace(**rest | {"scores": apply(_Centered, p.scores, p.lengths)})


def expected_score(
    p: Potentials, q: Potentials | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log Z of p, and the expectation under p of the score given by q.

    Parameters
    ----------
    p, q : Potentials
        Checked, of the same shapes, with initial scores; see
        `flash_semicrf.problem.potentials.explicit_start`. Either both have final scores or none
        has. Without q, the scores of p are used as constants.
    backend : str

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
        Without gradient; use `flash_semicrf.log_partition` for a differentiable one.
    mean : float64 Tensor of shape (B,)
        Differentiable once in both; -inf if q forbids a segmentation that p allows.
    """
    values = list(map(p.parameters().get, NAMES))
    found: tuple[Tensor, Tensor]
    if q is None:
        found = apply(_OwnScore, backend, p.lengths, *values)
    else:
        others = map(q.parameters().get, NAMES)
        found = apply(_ExpectedScore, backend, p.lengths, *values, *others)
    return found


def position_marginals(p: Potentials, backend: str = "auto") -> Tensor:
    """P(position t has label c), (B, T, C) in the dtype of the scores, differentiable once."""
    return _marginals(p, "scores", backend)


def start_marginals(p: Potentials, backend: str = "auto") -> Tensor:
    """P(a segment of label c starts at position t), as `position_marginals`."""
    # The derivative along starts is one of a problem that has scores for them.
    start = torch.zeros_like(p.scores) if p.start_scores is None else p.start_scores
    return _marginals(p.replace(start_scores=start), "start_scores", backend)


def _marginals(p: Potentials, name: str, backend: str) -> Tensor:
    values = map(p.parameters().get, NAMES)
    marginals: Tensor = apply(_Marginals, name, backend, p.lengths, *values)
    return marginals


def _direction(potentials: Potentials) -> Potentials:
    """Direction for `tangents`: zeros for infinite entries, whose counts are 0, and for padding."""
    p = potentials
    ragged = int(p.lengths.min()) < p.num_positions
    clean = {}
    for name, value in p.parameters().items():
        value = value.detach()
        if name in BY_SEQUENCE and (ragged or name not in BY_POSITION):
            value = value.masked_fill(ignored(p, name), 0.0)
        if check_finite_or_forbidden(name, value):
            value = torch.where(value > NEG_INF, value, 0.0)
        clean[name] = value
    return p.replace(**clean)


def _tangents(
    backend: str, p: Potentials, direction: Potentials, wanted: set[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return choose(backend, p).tangents(p, _direction(direction), wanted)


def _weighted(found: dict[str, Tensor], p: Potentials, upstream: Tensor) -> dict[str, Tensor]:
    """Gradients of sequences times their weights, in the dtypes of the parameters."""
    given = p.parameters()
    weighted = {}
    for name, gradient in found.items():
        scaled = scaled_gradient(gradient, upstream.to(gradient.dtype), name in BY_SEQUENCE)
        weighted[name] = scaled.to(given[name].dtype)
    return weighted


def _once(found: dict[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """Gradients whose differentiation raises an error, if a graph is being built."""
    if not torch.is_grad_enabled():
        return found
    return {name: once(gradient, value, _REASON) for name, gradient in found.items()}


def _wanted(needs: tuple[bool, ...]) -> list[str]:
    return [name for name, needed in zip(NAMES, needs, strict=True) if needed]


class _Centered(torch.autograd.Function):
    """Scores in float64 less the largest of each position, which is treated as a constant."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, lengths: Tensor) -> Tensor:
        """Subtract the largest scores, by numpy on the CPU, whose small calls are faster."""
        ctx.dtype = scores.dtype
        if scores.device.type != "cpu":
            return center_scores(scores.to(accumulator_dtype(scores.device)), lengths)[0]
        values = scores.detach().numpy().astype(np.float64)
        peak = values.max(-1, keepdims=True)
        values -= np.where(peak > -np.inf, peak, 0.0)
        return torch.from_numpy(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Gradient of the scores: the shift changes no expectation."""
        return upstream.to(ctx.dtype), None


class _OwnScore(torch.autograd.Function):
    """`expected_score` of p by itself, as a constant."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, lengths: Tensor, *values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One forward-backward, and the derivative of its counts where it is needed."""
        p = named(values, lengths)
        ctx.wanted = _wanted(ctx.needs_input_grad[2:])
        found: dict[str, Tensor] = {}
        if ctx.wanted:
            log_z, mean, found = _tangents(backend, p, p, set(ctx.wanted))
        else:
            given = p.parameters()
            log_z, counts = choose(backend, p).gradients(p, set(given))
            mean = _mean(given, counts)
        ctx.save_for_backward(lengths, mean, *(found[name] for name in ctx.wanted), *values)
        ctx.mark_non_differentiable(log_z)
        return log_z, mean

    @staticmethod
    def backward(ctx: Any, _: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Product of the Hessian of log Z with the parameters."""
        lengths, mean, *saved = ctx.saved_tensors
        found = dict(zip(ctx.wanted, saved, strict=False))
        p = named(saved[len(found) :], lengths)
        found = _once(_weighted(found, p, upstream), mean)
        return (None, None, *map(found.get, NAMES))


def _mean(values: dict[str, Tensor], counts: dict[str, Tensor]) -> Tensor:
    noise = {"scores": IMPOSSIBLE}
    terms = [inner_product(v, counts[name], noise.get(name, 0.0)) for name, v in values.items()]
    return sum(terms, torch.zeros_like(terms[0]))


class _ExpectedScore(torch.autograd.Function):
    """`expected_score`; call it with the backend, lengths, and the parameters of p, then of q."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, lengths: Tensor, *values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One forward-backward of p."""
        p, q = (named(half, lengths) for half in (values[: len(NAMES)], values[len(NAMES) :]))
        given = q.parameters()
        log_z, counts = choose(backend, p).gradients(p, set(given))
        mean = _mean(given, counts)
        needs = ctx.needs_input_grad[2:]
        ctx.wanted, ctx.counted = _wanted(needs[: len(NAMES)]), _wanted(needs[len(NAMES) :])
        ctx.backend = backend
        ctx.save_for_backward(lengths, mean, *(counts[name] for name in ctx.counted), *values)
        ctx.mark_non_differentiable(log_z)
        return log_z, mean

    @staticmethod
    def backward(ctx: Any, _: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Hessian-vector products for p, expected counts for q."""
        lengths, mean, *saved = ctx.saved_tensors
        counts = dict(zip(ctx.counted, saved, strict=False))
        values = saved[len(counts) :]
        p, q = (named(half, lengths) for half in (values[: len(NAMES)], values[len(NAMES) :]))
        products: dict[str, Tensor] = {}
        if ctx.wanted:
            _, _, products = _tangents(ctx.backend, p, q, set(ctx.wanted))
        by_p = _once(_weighted(products, p, upstream), mean)
        by_q = _once(_weighted(counts, q, upstream), mean)
        return (None, None, *map(by_p.get, NAMES), *map(by_q.get, NAMES))


class _Marginals(torch.autograd.Function):
    """Gradient of log Z by a parameter (B, T, C), given its name, the backend, lengths and all."""

    @staticmethod
    def forward(
        ctx: Any, name: str, backend: str, lengths: Tensor, *values: Tensor | None
    ) -> Tensor:
        """One forward-backward."""
        p = named(values, lengths)
        _, counts = choose(backend, p).gradients(p, {name})
        ctx.wanted = _wanted(ctx.needs_input_grad[3:])
        ctx.name, ctx.backend = name, backend
        ctx.save_for_backward(lengths, *values)
        return counts[name]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Product of the Hessian of log Z, which is symmetric, with the upstream gradient."""
        lengths, *values = ctx.saved_tensors
        p = named(values, lengths)
        nothing = {name: torch.zeros_like(value) for name, value in p.parameters().items()}
        direction = p.replace(**{**nothing, ctx.name: upstream})
        _, _, found = _tangents(ctx.backend, p, direction, set(ctx.wanted))
        found = _once(_weighted(found, p, upstream.new_ones(len(lengths))), upstream)
        return (None, None, None, *map(found.get, NAMES))

"""Expectations under a segmentation distribution as nodes of the autograd graph.

The score by a second set of parameters q is linear in them, so under the distribution of p

    m = E_p[score_q] = <q, mu_p>,   mu_p = the gradient of log Z_p: the expected counts,
    d m / d q = mu_p,               d m / d p = (the Hessian of log Z_p) q,

and the Hessian times a vector is what a backend's ``tangents`` computes, at a small multiple of the
cost of a gradient: the messages carry, beside the log-sum of the scores of what they summarise, the
expectation of its score by q (the first-order expectation semiring).

References
----------
Z. Li and J. Eisner, First- and Second-Order Expectation Semirings with Applications to Minimum-Risk
Training on Translation Forests, EMNLP 2009.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_semicrf.marginals import IMPOSSIBLE, inner_product
from flash_semicrf.potentials import NEG_INF, Potentials
from flash_semicrf.streaming.autograd import BY_POSITION, NAMES, Once, scaled_gradient
from flash_semicrf.streaming.dispatch import BACKENDS, choose
from flash_semicrf.streaming.posterior import needed_operation

__all__ = ["expected_score", "position_marginals"]

_REASON = "Expectations under a segmentation distribution are differentiable once."


def expected_score(p: Potentials, q: Potentials, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Log Z of p, and the expectation under p of the score by q.

    Parameters
    ----------
    p, q : Potentials
        Checked, of the same shapes, with initial scores; see
        `flash_semicrf.streaming.posterior.explicit_start`. If one has final scores, both have.
    backend : str

    Returns
    -------
    log_z : float64 Tensor of shape (B,)
        A constant: its gradient is that of `flash_semicrf.streaming.log_partition`.
    mean : float64 Tensor of shape (B,)
        Differentiable once in both; -inf where q forbids what p allows.
    """
    values = ([x.parameters().get(name) for name in NAMES] for x in (p, q))
    return _ExpectedScore.apply(backend, p.lengths, *next(values), *next(values))


def position_marginals(p: Potentials, backend: str = "auto") -> Tensor:
    """P(position t has label c), (B, T, C) in the dtype of the scores, differentiable once."""
    return _PositionMarginals.apply(backend, p.lengths, *map(p.parameters().get, NAMES))


def _named(values: tuple[Tensor | None, ...], lengths: Tensor) -> Potentials:
    return Potentials(lengths=lengths, **dict(zip(NAMES, values, strict=True)))


def _direction(potentials: Potentials) -> Potentials:
    """As `tangents` takes it: nothing infinite (such entries meet a count of 0), no padding."""
    p = potentials
    inside = torch.arange(p.num_positions, device=p.device) < p.lengths[:, None]
    clean = {}
    for name, value in p.parameters().items():
        kept = value > NEG_INF
        if name in BY_POSITION:
            kept = kept & inside[..., None]
        clean[name] = torch.where(kept, value, 0.0)
    return p.replace(**clean)


def _products(
    ctx, p: Potentials, direction: Potentials, upstream: Tensor
) -> dict[str, Tensor]:
    """Hessian of log Z times a direction, weighted by sequence, for the parameters that want it."""
    wanted = ctx.wanted
    if not wanted:
        return {}
    able = ctx.backend in BACKENDS and hasattr(BACKENDS[ctx.backend], "tangents")
    chosen = choose(ctx.backend if able else "auto", p, "tangents")
    _, _, found = chosen.tangents(p, _direction(direction), set(wanted))
    return _weighted(found, p, upstream)


def _weighted(found: dict[str, Tensor], p: Potentials, upstream: Tensor) -> dict[str, Tensor]:
    """Gradients of sequences times their weights, in the dtypes of the parameters."""
    given = p.parameters()
    weighted = {}
    for name, gradient in found.items():
        scaled = scaled_gradient(gradient, upstream.to(gradient.dtype), name in BY_POSITION)
        weighted[name] = scaled.to(given[name].dtype)
    return weighted


def _once(found: dict[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """Refuse to differentiate again, where a graph is being made."""
    if not torch.is_grad_enabled():
        return found
    return {name: Once.apply(gradient, value, _REASON) for name, gradient in found.items()}


class _ExpectedScore(torch.autograd.Function):
    """`expected_score`; call it with the backend, lengths, and the parameters of p, then of q."""

    @staticmethod
    def forward(ctx, backend: str, lengths: Tensor, *values: Tensor | None):
        """One forward-backward of p."""
        p, q = (_named(half, lengths) for half in (values[: len(NAMES)], values[len(NAMES) :]))
        given = q.parameters()
        log_z, counts = choose(backend, p, needed_operation(p)).gradients(p, set(given))
        noise = {"scores": IMPOSSIBLE}
        terms = [inner_product(given[n], counts[n], noise.get(n, 0.0)) for n in given]
        mean = torch.stack(terms).sum(0)
        needs = ctx.needs_input_grad[2:]
        ctx.wanted = [name for name, need in zip(NAMES, needs, strict=False) if need]
        ctx.counted = [n for n, need in zip(NAMES, needs[len(NAMES) :], strict=True) if need]
        ctx.backend = backend
        ctx.save_for_backward(lengths, mean, *(counts[name] for name in ctx.counted), *values)
        ctx.mark_non_differentiable(log_z)
        return log_z, mean

    @staticmethod
    def backward(ctx, _: Tensor, upstream: Tensor):
        """Hessian-vector products for p, expected counts for q."""
        lengths, mean, *saved = ctx.saved_tensors
        counts = dict(zip(ctx.counted, saved, strict=False))
        values = saved[len(counts) :]
        p, q = (_named(half, lengths) for half in (values[: len(NAMES)], values[len(NAMES) :]))
        by_p = _once(_products(ctx, p, q, upstream), mean)
        by_q = _once(_weighted(counts, q, upstream), mean)
        return (None, None, *map(by_p.get, NAMES), *map(by_q.get, NAMES))


class _PositionMarginals(torch.autograd.Function):
    """`position_marginals`; call it with the backend, lengths and the parameters."""

    @staticmethod
    def forward(ctx, backend: str, lengths: Tensor, *values: Tensor | None) -> Tensor:
        """One forward-backward."""
        p = _named(values, lengths)
        _, counts = choose(backend, p, needed_operation(p)).gradients(p, {"scores"})
        ctx.wanted = [n for n, need in zip(NAMES, ctx.needs_input_grad[2:], strict=True) if need]
        ctx.backend = backend
        ctx.save_for_backward(lengths, *values)
        return counts["scores"]

    @staticmethod
    def backward(ctx, upstream: Tensor):
        """The Hessian of log Z is symmetric: its product with what comes from above."""
        lengths, *values = ctx.saved_tensors
        p = _named(tuple(values), lengths)
        nothing = {name: torch.zeros_like(value) for name, value in p.parameters().items()}
        direction = p.replace(**{**nothing, "scores": upstream})
        found = _products(ctx, p, direction, upstream.new_ones(len(lengths)))
        found = _once(found, upstream)
        return (None, None, *map(found.get, NAMES))

"""The autograd function of release 0.2.0, on the operators of this package."""

from __future__ import annotations

from torch import Tensor

from flash_semicrf.inference.library import named, values_of
from flash_semicrf.inference.operators import LogPartition, differentiable_log_partition
from flash_semicrf.streaming.dispatch import choose

__all__ = ["SemiCRFStreaming"]


class SemiCRFStreaming(LogPartition):
    """Log Z of a batch by a streaming backend, with its gradient.

    Call it as ``SemiCRFStreaming.apply(backend, lengths, scores, transition, duration_bias,
    start_scores, end_scores, initial_scores, final_scores, duration_tail)``, where `backend` is a
    name and the others are the parameters of `flash_semicrf.Potentials`; optional ones may be None
    or, at the end, omitted. `flash_semicrf.log_partition` is the usual interface. Returns log Z of
    shape (B,) in float64. If no parameter requires a gradient, and under `torch.no_grad`, only
    O(KC) memory per sequence is used. Differentiable once: a second derivative raises RuntimeError.
    """

    @classmethod
    def apply(cls, backend: str, lengths: Tensor, *parameters: Tensor | None) -> Tensor:
        """Compute log Z, and the gradients that the backward pass needs."""
        p = named(parameters, lengths)
        name = choose(backend, p).name
        return differentiable_log_partition(name, True, (), lengths, None, *values_of(p))

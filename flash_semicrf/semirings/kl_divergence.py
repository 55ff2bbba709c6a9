"""The Kullback-Leibler semiring: the cross-entropy semiring with log(p_i / q_i) for -log q_i."""

from __future__ import annotations

from torch import Tensor

from flash_semicrf.semirings.cross_entropy import CrossEntropySemiring

__all__ = ["KLDivergenceSemiring"]


class KLDivergenceSemiring(CrossEntropySemiring):
    """Kullback-Leibler divergence in nats, ``sum_y P(y) log(P(y) / Q(y))``.

    Potentials and infinite values are as for `CrossEntropySemiring`.

    Examples
    --------
    >>> import torch
    >>> semiring = KLDivergenceSemiring()
    >>> x = semiring.convert(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    >>> round(abs(float(semiring.unconvert(semiring.sum(x)))), 4)  # the same distribution
    0.0
    """

    def _surprise(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_p - log_q

"""Low-level names of release 0.2.0 for its Triton kernels, on the kernels of this package.

They run the Triton backend, or raise an error that states why it cannot run; all other functions
of this package choose a backend themselves. Cumulative scores are those of
`flash_semicrf.compat.semi_crf_streaming_forward`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from flash_semicrf.compat.backpointers import semi_crf_streaming_viterbi_with_backpointers
from flash_semicrf.compat.cumulative import (
    maximum_start,
    potentials_of_cumulative,
    semi_crf_streaming_forward,
)
from flash_semicrf.compat.streaming import SemiCRFStreaming
from flash_semicrf.inference.viterbi import viterbi
from flash_semicrf.problem.arguments import check_tensor
from flash_semicrf.problem.segments import ViterbiResult
from flash_semicrf.streaming.triton.backend import HAS_TRITON

__all__ = [
    "HAS_TRITON",
    "SemiCRFStreamingTriton",
    "launch_streaming_triton_backward",
    "launch_streaming_triton_kernel",
    "launch_streaming_triton_kernel_max_bp",
    "semi_crf_streaming_viterbi_triton",
]


class SemiCRFStreamingTriton(SemiCRFStreaming):
    """`SemiCRFStreaming` on the Triton backend.

    Call it as ``SemiCRFStreamingTriton.apply(None, lengths, scores, transition, duration_bias,
    start_scores, end_scores, initial_scores, final_scores, duration_tail)``. Optional parameters
    may be None or, at the end, omitted.
    """

    @classmethod
    def apply(cls, backend: str | None, lengths: Tensor, *parameters: Tensor | None) -> Tensor:
        """Compute log Z, and the gradients that the backward pass needs.

        Raises
        ------
        ValueError
            If `backend` is neither None nor "triton", or Triton cannot run the problem.
        """
        if backend not in (None, "triton"):
            raise ValueError(f'`backend` must be None or "triton"; got {backend!r}.')
        return SemiCRFStreaming.apply("triton", lengths, *parameters)


def launch_streaming_triton_kernel(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    semiring: Literal["log", "max"] = "log",
    **options: Any,
) -> Tensor:
    """Log partition function, or best score, by the forward kernels.

    Parameters
    ----------
    cum_scores, transition, duration_bias, lengths, K, semiring
        As for `flash_semicrf.compat.semi_crf_streaming_forward`.
    **options
        Optional parameters of `flash_semicrf.Potentials`: "start_scores", ...

    Returns
    -------
    Tensor of shape (B,)
        In the dtype of `cum_scores`, without a gradient.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or Triton cannot run the problem.
    """
    with torch.no_grad():
        return semi_crf_streaming_forward(
            cum_scores, transition, duration_bias, lengths, K, semiring, backend="triton", **options
        )


def launch_streaming_triton_backward(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    grad_output: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(grad_output * log Z).sum()`` by the backward kernels.

    Parameters
    ----------
    cum_scores, transition, duration_bias, lengths, K, **options
        As for `launch_streaming_triton_kernel`.
    grad_output : Tensor of shape (B,), optional
        Ones by default.

    Returns
    -------
    grad_cum_scores : Tensor of shape (B, T+1, C)
    grad_transition : Tensor of shape (C, C) or (K, C, C)
    grad_duration_bias : Tensor of shape (K, C)

    Raises
    ------
    TypeError, ValueError
        As for `launch_streaming_triton_kernel`.
    """
    named = {"cum_scores": cum_scores, "transition": transition, "duration_bias": duration_bias}
    for name, value in named.items():
        check_tensor(name, value)
    scores, matrix, bias = (value.detach().requires_grad_() for value in named.values())
    with torch.enable_grad():
        log_z = semi_crf_streaming_forward(
            scores, matrix, bias, lengths, K, backend="triton", **options
        )
        weight = torch.ones_like(log_z) if grad_output is None else grad_output.to(log_z)
        by_scores, by_matrix, by_bias = torch.autograd.grad(log_z, (scores, matrix, bias), weight)
    return by_scores, by_matrix, by_bias


def launch_streaming_triton_kernel_max_bp(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    **options: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best scores and back-pointers.

    Parameters, results and errors are those of
    `flash_semicrf.compat.semi_crf_streaming_viterbi_with_backpointers`, with the messages of the
    Triton kernels.
    """
    return semi_crf_streaming_viterbi_with_backpointers(
        cum_scores, transition, duration_bias, lengths, K, backend="triton", **options
    )


def semi_crf_streaming_viterbi_triton(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    **options: Tensor | None,
) -> ViterbiResult:
    """Best segmentations by the max kernels, without tensors of size T·K·C or a host loop.

    Parameters
    ----------
    cum_scores, transition, duration_bias, lengths, K, **options
        As for `launch_streaming_triton_kernel`.

    Returns
    -------
    ViterbiResult
        Scores in float64. Without `initial_scores` the first segment's transition term is, as in
        release 0.2.0, the largest over its free source label.

    Raises
    ------
    TypeError, ValueError
        As for `launch_streaming_triton_kernel`, and if no segmentation is feasible.
    """
    with torch.no_grad():
        p = potentials_of_cumulative(cum_scores, transition, duration_bias, lengths, K, **options)
    return viterbi(maximum_start(p), "triton")

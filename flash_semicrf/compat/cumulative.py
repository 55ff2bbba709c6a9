"""Functions of cumulative scores, as in release 0.2.0."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.compat.use_triton import backend_of
from flash_semicrf.inference.autograd import needs_graph_of
from flash_semicrf.inference.log_partition import log_partition_of_checked
from flash_semicrf.inference.viterbi import viterbi_of_checked
from flash_semicrf.problem.potentials import Potentials, accumulator_dtype, score_segments
from flash_semicrf.problem.validation import (
    check_choice,
    check_eager,
    check_floating_dtype,
    check_positive_int,
    check_potentials,
    check_tensor,
    extremes,
)

__all__ = [
    "compute_edge_block_streaming",
    "maximum_start",
    "potentials_of_cumulative",
    "semi_crf_streaming_forward",
]

_MAX_CUMULATIVE = 1e30


def semi_crf_streaming_forward(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    semiring: Literal["log", "max"] = "log",
    use_triton: bool = True,
    num_warps: int = 4,
    *,
    start_scores: Tensor | None = None,
    end_scores: Tensor | None = None,
    initial_scores: Tensor | None = None,
    final_scores: Tensor | None = None,
    duration_tail: Tensor | None = None,
    backend: str = "auto",
    accum_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Log partition function, or best score, from cumulative scores.

    Parameters
    ----------
    cum_scores : Tensor of shape (B, T+1, C)
        ``cum_scores[:, t]`` is the sum of the scores of positions before t; only differences count.
    transition : Tensor of shape (C, C) or (K, C, C)
    duration_bias : Tensor of shape (K, C)
        Row k-1 scores duration k.
    lengths : integer Tensor of shape (B,)
    K : int
        Longest duration, in positions.
    semiring : {"log", "max"}
        Log-sum-exp over all segmentations, or their maximum (differentiable along the best one).
        As in release 0.2.0, the maximum includes the free source label of the first segment, so
        that without `initial_scores` it differs from the score of `viterbi`.
    use_triton : bool
        False runs the plain PyTorch loop in place of Triton kernels, for tensors on a GPU.
    num_warps : int
        Accepted for compatibility; kernels choose their own launch parameters.
    start_scores, end_scores, initial_scores, final_scores, duration_tail, backend
        As in `Potentials` and `log_partition`.
    accum_dtype : torch.dtype
        Accepted for compatibility; sums are in float64 (float32 on devices without it) in any case.

    Returns
    -------
    Tensor of shape (B,)
        In the dtype of `cum_scores`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; the message names it.

    Examples
    --------
    >>> cum_scores = torch.zeros(1, 5, 1)
    >>> log_z = semi_crf_streaming_forward(
    ...     cum_scores, torch.zeros(1, 1), torch.zeros(2, 1), torch.tensor([4]), 2
    ... )
    >>> round(float(log_z.exp()), 4)
    5.0
    """
    check_choice("semiring", semiring, ("log", "max"))
    check_positive_int("num_warps", num_warps)
    check_floating_dtype("accum_dtype", accum_dtype)
    p = potentials_of_cumulative(
        cum_scores,
        transition,
        duration_bias,
        lengths,
        K,
        start_scores=start_scores,
        end_scores=end_scores,
        initial_scores=initial_scores,
        final_scores=final_scores,
        duration_tail=duration_tail,
    )
    backend = backend_of(use_triton, backend, p.device)
    if semiring == "max":
        p = maximum_start(p)
        _, table = viterbi_of_checked(p, backend)
        return score_segments(p, table).to(cum_scores.dtype)
    return log_partition_of_checked(p, backend).to(cum_scores.dtype)


def compute_edge_block_streaming(
    cum_scores: Tensor, transition: Tensor, duration_bias: Tensor, start: int, k: int
) -> Tensor:
    """Scores of the segments ``[start, start + k)``, with their transitions.

    Parameters
    ----------
    cum_scores : Tensor of shape (B, T+1, C)
    transition : Tensor of shape (C, C) or (K, C, C)
    duration_bias : Tensor of shape (K, C)
    start : int
        First position of the segment.
    k : int
        Duration, 1..K.

    Returns
    -------
    Tensor of shape (B, C_dst, C_src)
        In the dtype of `cum_scores`, rounded once.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, the segment leaves the sequence, or `k` is outside 1..K.
    """
    _check_cumulative(cum_scores)
    one = torch.ones(len(cum_scores), dtype=torch.int64, device=cum_scores.device)
    check_potentials(Potentials(cum_scores[:, :1], transition, duration_bias, one))
    num_positions, max_duration = cum_scores.shape[1] - 1, len(duration_bias)
    if not 1 <= k <= max_duration:
        raise ValueError(f"`k` must be in [1, K={max_duration}]; got {k}.")
    if not 0 <= start <= num_positions - k:
        raise ValueError(
            f"`start` must be in [0, T-k={num_positions - k}]; got {start} with k={k}."
        )
    wide = accumulator_dtype(cum_scores.device)
    sums, bias = cum_scores.to(wide), duration_bias[k - 1].to(wide)
    content = sums[:, start + k] - sums[:, start] + bias
    matrix = transition[k - 1] if transition.dim() == 3 else transition
    return (content[:, :, None] + matrix.T).to(cum_scores.dtype)


def potentials_of_cumulative(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    **options: Tensor | None,
) -> Potentials:
    """Checked `Potentials` of cumulative scores (B, T+1, C), differenced in float64.

    Parameters are those of `semi_crf_streaming_forward`.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, K differs from that of `duration_bias`, or a cumulative score is
        infinite: differences of infinities are undefined, so `Potentials` must be used instead.
    """
    check_positive_int("K", K)
    _check_cumulative(cum_scores)
    smallest, largest = extremes(cum_scores)
    if not (smallest > -_MAX_CUMULATIVE and largest < _MAX_CUMULATIVE):
        bad = ~(cum_scores.detach().abs() < _MAX_CUMULATIVE)
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"`cum_scores` must be finite; got {float(cum_scores[index])} at index {index}. To "
            "forbid labels at positions, pass Potentials with -inf scores to log_partition()."
        )
    if isinstance(duration_bias, Tensor) and duration_bias.dim() == 2 and len(duration_bias) != K:
        raise ValueError(
            f"`duration_bias` must have shape (K={K}, C); got {tuple(duration_bias.shape)}."
        )
    scores = _differences(cum_scores)
    return check_potentials(Potentials(scores, transition, duration_bias, lengths, **options))


def maximum_start(potentials: Potentials) -> Potentials:
    """The problem with the initial scores of release 0.2.0's max semiring made explicit.

    Without `initial_scores`, that release takes the maximum over the free source label of the first
    segment as its transition term.
    """
    if potentials.initial_scores is not None:
        return potentials
    return potentials.replace(initial_scores=potentials.transition.amax(-2))


def _differences(cum_scores: Tensor) -> Tensor:
    """Scores of the positions, in the accumulator's dtype."""
    on_cpu = cum_scores.device.type == "cpu" and cum_scores.dtype in (torch.float32, torch.float64)
    if on_cpu and not needs_graph_of(cum_scores):
        # numpy: a parallel operation of torch would wait for a busy core.
        sums = cum_scores.detach().numpy()
        return torch.from_numpy(np.subtract(sums[:, 1:], sums[:, :-1], dtype=np.float64))
    wide = cum_scores.to(accumulator_dtype(cum_scores.device))
    return wide[:, 1:] - wide[:, :-1]


def _check_cumulative(cum_scores: Tensor) -> None:
    check_eager()
    check_tensor("cum_scores", cum_scores)
    if not cum_scores.is_floating_point():
        raise TypeError(f"`cum_scores` must have a floating-point dtype; got {cum_scores.dtype}.")
    shape = tuple(cum_scores.shape)
    if len(shape) != 3 or shape[1] < 2 or 0 in shape:
        raise ValueError(
            f"`cum_scores` must have shape (B, T+1, C) with B, T, C >= 1; got {shape}."
        )

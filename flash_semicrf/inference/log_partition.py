"""Entry points of streaming inference: checked once here, then given to a backend.

`log_partition` and `viterbi` take `flash_semicrf.Potentials`; marginals are in
`flash_semicrf.streaming.posterior`. The
``semi_crf_streaming_*`` functions take cumulative scores, as release 0.2.0 of the earlier package
did.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.observations import Constraints, constrain, fold_table
from flash_semicrf.potentials import (
    NAMES,
    Potentials,
    accumulator_dtype,
    score_rows,
    score_segments,
)
from flash_semicrf.segments import SegmentTable, ViterbiResult, table_to_segments
from flash_semicrf.streaming import reference
from flash_semicrf.streaming.autograd import LogPartition, apply, needs_graph, needs_graph_of
from flash_semicrf.streaming.dispatch import choose
from flash_semicrf.validation import (
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
    "log_partition",
    "semi_crf_streaming_forward",
    "viterbi",
    "viterbi_table",
]

_MAX_CUMULATIVE = 1e30


def log_partition(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> Tensor:
    """Log of the sum over all segmentations of exp(score).

    Parameters
    ----------
    potentials : Potentials
    backend : {"auto", "numba", "reference", ...}
        A key of `flash_semicrf.streaming.dispatch.BACKENDS`.
    constraints : Constraints, optional
        Sum over the segmentations that agree with what is known.

    Returns
    -------
    float64 Tensor of shape (B,)
        Differentiable in every parameter; -inf, with gradient 0, where nothing is feasible.

    Raises
    ------
    TypeError, ValueError
        For bad input, or a backend that cannot run the problem; the message says which and why.

    Examples
    --------
    Scores of zero count segmentations: with K = 2 five of them tile four positions.

    >>> scores, lengths = torch.zeros(1, 4, 1), torch.tensor([4])
    >>> problem = Potentials(scores, torch.zeros(1, 1), torch.zeros(2, 1), lengths)
    >>> round(float(log_partition(problem).exp()), 6)
    5.0
    """
    return _log_partition(constrain(check_potentials(potentials), constraints), backend)


def _log_partition(p: Potentials, backend: str) -> Tensor:
    chosen = choose(backend, p)
    if chosen.name == "reference":
        return reference.log_partition(p)  # autograd differentiates it, as often as one likes
    if not needs_graph(p):
        return chosen.log_partition(p)
    return apply(LogPartition, chosen, p.lengths, *map(p.parameters().get, NAMES))


def viterbi(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> ViterbiResult:
    """Best segmentation of each sequence.

    Ties go to the shortest last segment, then the lowest label, from the end of the sequence on.

    Parameters
    ----------
    potentials : Potentials
    backend : str
        As for `log_partition`.
    constraints : Constraints, optional
        Best of the segmentations that agree with what is known.

    Returns
    -------
    ViterbiResult
        Scores (B,) in float64, and a list of `Segment` per sequence whose scores add up to it.

    Raises
    ------
    ValueError
        For bad input, and where a sequence has no feasible segmentation: naming it.
    """
    p = check_potentials(potentials)
    with torch.no_grad():
        scores, table = _viterbi(p, backend, constraints)
        rows = score_rows(p, table)
    return ViterbiResult(scores, table_to_segments(table, p.batch_size, rows))


def viterbi_table(
    potentials: Potentials, backend: str = "auto", *, constraints: Constraints | None = None
) -> tuple[Tensor, SegmentTable]:
    """`viterbi` with the segments as tensors: (scores (B,), `SegmentTable`)."""
    return _viterbi(check_potentials(potentials), backend, constraints)


def _viterbi(
    p: Potentials, backend: str, constraints: Constraints | None = None
) -> tuple[Tensor, SegmentTable]:
    with torch.no_grad():
        constrained = constrain(p, constraints)
        scores, table = choose(backend, constrained).viterbi(constrained)
    check_feasible(scores, constraints is not None)
    return scores, table if constrained is p else fold_table(table, p.num_labels)


def check_feasible(scores: Tensor, constrained: bool = False) -> None:
    """Raise ValueError where the best score of a sequence is -inf, naming the sequences."""
    infeasible = (scores == -torch.inf).nonzero()[:, 0].tolist()
    if infeasible:
        raise ValueError(
            f"No segmentation is feasible for sequences {infeasible}: every one meets a forbidden "
            "(-inf) score, transition or duration"
            + (", or breaks a constraint." if constrained else ".")
        )


def potentials_of_cumulative(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    **options: Tensor | None,
) -> Potentials:
    """Checked `Potentials` of cumulative scores (B, T+1, C), differenced in float64.

    Raises
    ------
    TypeError, ValueError
        For bad input, a K that is not that of `duration_bias`, or cumulative scores that hold
        something infinite: a difference of infinities says nothing, so pass `Potentials`.
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


def _differences(cum_scores: Tensor) -> Tensor:
    """The scores of the positions, in the accumulator's dtype."""
    on_cpu = cum_scores.device.type == "cpu" and cum_scores.dtype in (torch.float32, torch.float64)
    if on_cpu and not needs_graph_of(cum_scores):
        # numpy: a parallel operation of torch would wait for a busy core.
        sums = cum_scores.detach().numpy()
        return torch.from_numpy(np.subtract(sums[:, 1:], sums[:, :-1], dtype=np.float64))
    wide = cum_scores.to(accumulator_dtype(cum_scores.device))
    return wide[:, 1:] - wide[:, :-1]


def maximum_start(potentials: Potentials) -> Potentials:
    """The problem with release 0.2.0's first segment in its max semiring, as `initial_scores`.

    Without `initial_scores` its transition term is there the largest over the free source label.
    """
    if potentials.initial_scores is not None:
        return potentials
    return potentials.replace(initial_scores=potentials.transition.amax(-2))


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


def semi_crf_streaming_forward(
    cum_scores: Tensor,
    transition: Tensor,
    duration_bias: Tensor,
    lengths: Tensor,
    K: int,
    semiring: str = "log",
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
        As in release 0.2.0 the maximum goes over the free source label of the first segment too,
        so that without `initial_scores` it is not the score of `viterbi`.
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
        For bad input.

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
        cum_scores, transition, duration_bias, lengths, K,
        start_scores=start_scores, end_scores=end_scores,
        initial_scores=initial_scores, final_scores=final_scores, duration_tail=duration_tail,
    )  # fmt: skip
    backend = resolve_use_triton(backend, use_triton, p)
    if semiring == "max":
        p = maximum_start(p)
        _, table = _viterbi(p, backend)
        return score_segments(p, table).to(cum_scores.dtype)
    return _log_partition(p, backend).to(cum_scores.dtype)


def resolve_use_triton(backend: str, use_triton: bool, potentials: Potentials) -> str:
    """What ``use_triton=False`` means: the reference loop, on a GPU, when the backend is free."""
    if backend == "auto" and not use_triton and potentials.device.type == "cuda":
        return "reference"
    return backend


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
        For bad input, a segment outside the sequence or a duration outside 1..K.
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

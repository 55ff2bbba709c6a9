"""Tools to test a semi-Markov CRF against the definition of its score.

`enumerate_segmentations` lists every segmentation of a small problem: sums and maxima over the list
are the first oracle; the plain loop of `flash_semicrf.streaming.reference` is the second.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_semicrf.problem.potentials import BY_SEQUENCE, Potentials, score_segments
from flash_semicrf.problem.segments import Segment, SegmentTable, segments_to_table

__all__ = [
    "assert_close",
    "enumerate_scores",
    "enumerate_segmentations",
    "random_problem",
]

_TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-5)}


def enumerate_segmentations(
    num_positions: int, max_duration: int, num_labels: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield every segmentation as a list of half-open ``(start, stop, label)``.

    Their number grows exponentially, so T should not exceed about 6.

    Parameters
    ----------
    num_positions, max_duration, num_labels : int
        T, K, C.

    Yields
    ------
    list of (int, int, int)

    Examples
    --------
    >>> len(list(enumerate_segmentations(4, 2, 1)))
    5
    """

    def extend(
        prefix: list[tuple[int, int, int]], start: int
    ) -> Iterator[list[tuple[int, int, int]]]:
        if start == num_positions:
            yield prefix
            return
        for stop in range(start + 1, min(start + max_duration, num_positions) + 1):
            for label in range(num_labels):
                yield from extend([*prefix, (start, stop, label)], stop)

    yield from extend([], 0)


def enumerate_scores(
    potentials: Potentials, index: int
) -> tuple[list[list[tuple[int, int, int]]], Tensor]:
    """All segmentations of one sequence, and their scores by `score_segments`.

    Parameters
    ----------
    potentials : Potentials
    index : int
        Index of the sequence in the batch.

    Returns
    -------
    segmentations : list of N lists of (start, stop, label)
    scores : Tensor of shape (N,)
    """
    p = potentials
    length = int(p.lengths[index])
    longest = p.max_duration if p.duration_tail is None else max(p.max_duration, length)
    segmentations = list(enumerate_segmentations(length, longest, p.num_labels))
    count = len(segmentations)
    copies = {}
    for name in BY_SEQUENCE:
        value = getattr(p, name)
        if value is not None:
            copies[name] = value[index : index + 1].expand(count, *value.shape[1:])
    many = p.replace(lengths=p.lengths[index].expand(count), **copies)
    table: SegmentTable = segments_to_table(
        [[Segment(s, t - 1, c) for s, t, c in segmentation] for segmentation in segmentations],
        device=p.device,
    )
    return segmentations, score_segments(many, table)


def random_problem(
    batch_size: int = 2,
    num_positions: int = 5,
    max_duration: int = 3,
    num_labels: int = 3,
    *,
    by_duration: bool = False,
    boundary: bool = False,
    ends: bool = False,
    tail: bool = False,
    spans: bool = False,
    moves: bool = False,
    ragged: bool = True,
    forbid: float = 0.0,
    scale: float = 1.0,
    integers: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Potentials:
    """Random problem.

    Parameters
    ----------
    batch_size, num_positions, max_duration, num_labels : int
        B, T, K, C.
    by_duration : bool
        Transition of shape (K, C, C).
    boundary, ends : bool
        Include start and end scores; include initial and final scores.
    tail : bool
        Include a duration tail.
    spans, moves : bool
        Include segment scores; include transition scores.
    ragged : bool
        Lengths from 1 to T, of which at least one is T; if False, all lengths are T.
    forbid : float
        Fraction of the entries of every parameter set to -inf.
    scale : float
        Standard deviation of every parameter.
    integers : bool
        Round every parameter, so that scores tie exactly. Includes initial scores, since otherwise
        the transition term of the first segment is a log-sum-exp.
    dtype : torch.dtype
    device : torch.device or str
    seed : int

    Returns
    -------
    Potentials
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value.round() if integers else value
        dead = torch.rand(shape, generator=generator) < forbid
        return value.masked_fill(dead, -torch.inf).to(device=device, dtype=dtype)

    b, t, k, c = batch_size, num_positions, max_duration, num_labels
    lengths = torch.full((b,), t)
    if ragged:
        lengths = torch.randint(1, t + 1, (b,), generator=generator)
        lengths[int(torch.randint(b, (1,), generator=generator))] = t
    return Potentials(
        scores=draw(b, t, c),
        transition=draw(k, c, c) if by_duration else draw(c, c),
        duration_bias=draw(k, c),
        lengths=lengths.to(device),
        start_scores=draw(b, t, c) if boundary else None,
        end_scores=draw(b, t, c) if boundary else None,
        initial_scores=draw(c) if ends or integers else None,
        final_scores=draw(c) if ends else None,
        duration_tail=draw(c) if tail else None,
        segment_scores=draw(b, t, k, c) if spans else None,
        transition_scores=draw(b, t, c, c) if moves else None,
    )


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """`torch.testing.assert_close` with the tolerance of this project for a dtype.

    Parameters
    ----------
    actual, expected : Tensor
    dtype : torch.dtype, optional
        Precision of the computation; by default the dtype of `actual`. Both are compared in
        float64, with absolute and relative tolerance 1e-10 for float64 and 1e-5 for float32.

    Raises
    ------
    AssertionError
        If the tensors differ by more than the tolerance.
    """
    rtol, atol = _TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=rtol, atol=atol, equal_nan=False
    )

"""Best segmentations, marginals and labels of new sequences under a fitted model.

Sequences are run in batches of similar length, bounded by their padded number of positions, so that
memory does not grow with the number of sequences. Longer sequences are encoded by windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from flash_semicrf.inference.consensus import consensus
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.minimum_risk import minimum_risk
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    center_scores,
    forbid,
    score_rows,
    within_length,
)
from flash_semicrf.problem.segments import (
    Segment,
    Segments,
    segments_to_bio,
    table_to_labels,
    table_to_segments,
)
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._lbfgs.scores import sparse_scores
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.windows import encode_in_windows
from sklearn_api._training.data import pad_values

__all__ = [
    "DECODINGS",
    "Decoding",
    "Problems",
    "accurate_labels",
    "batches_by_positions",
    "best_segments",
    "boundary_probabilities",
    "centered",
    "decoded_segments",
    "in_order",
    "label_probabilities",
    "name_segments",
    "problems_of",
    "tags_of",
]

Problems = Iterable[tuple[np.ndarray, Potentials]]
"""Batches: indices of the sequences, and their problem, not centred."""

Decoding: TypeAlias = Literal["map", "position", "boundary", "segment"]
DECODINGS = ("map", "position", "boundary", "segment")

T = TypeVar("T")


def batches_by_positions(lengths: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Indices of sequences, sorted by length, in batches of at most `limit` padded positions.

    A sequence longer than `limit` is a batch of its own.
    """
    order = np.argsort(lengths, kind="stable")
    first = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i - first + 1) * lengths[order[i]] > limit:
            yield order[first:i]
            first = i


def problems_of(
    module: SegmentationModule, sequences: Sequences, window_length: int, device: torch.device
) -> Iterator[tuple[np.ndarray, Potentials]]:
    """The problems that a model makes of sequences.

    Parameters
    ----------
    module : SegmentationModule
    sequences : Sequences
    window_length : int
        Most padded positions of a batch, and most that the encoder sees at once.
    device : torch.device
        Of the module.

    Yields
    ------
    indices : int64 ndarray
        Sequences of a batch.
    problem : Potentials
        Not centred.
    """
    for batch in batches_by_positions(sequences.lengths, window_length):
        values = [sequences.values[i] for i in batch]
        with torch.no_grad():
            if sequences.sparse:
                scores, lengths = sparse_scores(module.head, values)
                lengths = lengths.to(device)
                problem = module.head.potentials_of_scores(scores[0], lengths, *scores[1:])
            else:
                x, lengths = pad_values(values)
                lengths = lengths.to(device)
                hidden = encode_in_windows(module, x, lengths, window_length)
                problem, _ = module.head.potentials(hidden, lengths, centered=False)
        yield batch, within_length(problem)


def in_order(results: Iterable[tuple[np.ndarray, Iterable[T]]]) -> list[T]:
    """Results of the sequences of each batch, in the order of the sequences.

    Examples
    --------
    >>> in_order([(np.array([2, 0]), "ca"), (np.array([1]), "b")])
    ['a', 'b', 'c']
    """
    found = {i: one for batch, part in results for i, one in zip(batch, part, strict=True)}
    return [found[i] for i in range(len(found))]


def centered(problem: Potentials) -> Potentials:
    """The same problem with the largest score of each position at 0."""
    return problem.replace(scores=center_scores(problem.scores, problem.lengths)[0])


def best_segments(problems: Problems) -> list[Segments]:
    """Most probable segments of each sequence, with class indices."""

    def decoded() -> Iterator[tuple[np.ndarray, list[Segments]]]:
        for batch, problem in problems:
            with torch.no_grad():
                _, table = viterbi_table(centered(problem), validate="values")
                # Scores of segments are those of the model, not of the centred problem.
                rows = score_rows(problem, table)
            yield batch, table_to_segments(table, problem.batch_size, rows)

    return in_order(decoded())


def decoded_segments(problems: Problems, decoding: Decoding, tolerance: int) -> list[Segments]:
    """Segments of each sequence, with class indices, by a rule of `DECODINGS`."""
    if decoding == "map":
        return best_segments(problems)

    def decoded() -> Iterator[tuple[np.ndarray, list[Segments]]]:
        for batch, problem in problems:
            given = centered(problem)
            if decoding == "segment":
                result = consensus(given)
            elif decoding == "boundary":
                result = minimum_risk(given, "boundary", tolerance=tolerance)
            else:
                result = minimum_risk(given, "position")
            yield batch, result.segments

    return in_order(decoded())


def _from_marginals(
    problems: Problems, select: Callable[[SegmentMarginals, Tensor], Tensor]
) -> list[np.ndarray]:
    """Result of `select` on marginals and lengths, for each sequence, cut to its length."""

    def selected() -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        for batch, problem in problems:
            with torch.no_grad():
                marginals = segment_marginals(problem, validate="values")
                rows = select(marginals, problem.lengths).cpu().numpy()
            lengths = problem.lengths.tolist()
            yield batch, [row[:n].copy() for row, n in zip(rows, lengths, strict=True)]

    return in_order(selected())


def label_probabilities(problems: Problems) -> list[np.ndarray]:
    """Posterior probabilities (T_i, C) of the labels of each sequence; rows sum to 1."""
    outputs = _from_marginals(problems, lambda marginals, _: marginals.position)
    return [p / p.sum(1, keepdims=True) for p in outputs]


def boundary_probabilities(problems: Problems) -> list[np.ndarray]:
    """Posterior probability (T_i,) of a segment's start at each position of each sequence."""
    outputs = _from_marginals(problems, lambda marginals, _: marginals.start.sum(-1))
    return [p.clip(0.0, 1.0) for p in outputs]


def accurate_labels(problems: Problems, head: SemiMarkovCRFHead) -> list[np.ndarray]:
    """Class indices of largest expected accuracy of each sequence, among those `head` allows."""

    def choose(marginals: SegmentMarginals, lengths: Tensor) -> Tensor:
        if head.allowed_durations is None and head.allowed_transitions is None:
            return marginals.position.argmax(-1)
        problem = within_length(_expected_accuracy(marginals.position, lengths, head))
        batch_size, num_positions, _ = marginals.position.shape
        return table_to_labels(
            viterbi_table(problem, validate="values")[1], batch_size, num_positions
        )

    return _from_marginals(problems, choose)


def _expected_accuracy(position: Tensor, lengths: Tensor, head: SemiMarkovCRFHead) -> Potentials:
    """Problem whose best segmentation has the most expected correct positions of those allowed."""
    num_labels = head.num_classes
    free = position.new_zeros
    tail = head.duration_tail
    return Potentials(
        scores=position,
        transition=forbid(free(num_labels, num_labels), head.allowed_transitions),
        duration_bias=forbid(free(head.max_duration, num_labels), head.allowed_durations),
        lengths=lengths,
        initial_scores=free(num_labels),
        duration_tail=None if tail is None else forbid(free(num_labels), tail > NEG_INF),
    )


def name_segments(segments: Segments, names: Sequence[Any]) -> list[Segment]:
    """Segments with class indices as a list of segments with labels, which JSON takes."""
    labels = np.array(names, dtype=object)[segments.label]
    return list(Segments(segments.start, segments.end, labels, segments.score))


def tags_of(segments: Segments, length: int, classes: np.ndarray) -> np.ndarray:
    """BIO tags (T,) of segments with class indices."""
    labels = classes[segments.label].tolist()
    rows = zip(segments.start.tolist(), (segments.end + 1).tolist(), labels, strict=True)
    return np.array(segments_to_bio(list(rows), length), dtype=object)

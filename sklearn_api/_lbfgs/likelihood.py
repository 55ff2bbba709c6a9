"""Log-likelihood of the linear model over all sequences at once, from its scores.

The scores of labels at positions and, with boundary scores, of segments that start and end there
are the rows of ``X W + b``; everything else is a parameter of the head. The gradient by the scores
is the posterior marginals less the gold segmentation: one pass of the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.potentials import Potentials, within_length
from flash_semicrf.problem.segments import SegmentTable, covered_positions
from flash_semicrf.streaming.dispatch import choose
from sklearn_api._lbfgs.features import FeatureMatrix

__all__ = ["LinearLikelihood"]

_POSITIONS_PER_CALL = 1 << 16
_MOST_PADDING, _FREE_PADDING = 1.1, 1024  # relative, and in positions


class _Group(NamedTuple):
    """Sequences of similar length from the one numbered `first`, in rows ``[begin, stop)``.

    `cells` are the places of the rows in the (B * T) positions of the padded batch.
    """

    first: int
    begin: int
    stop: int
    lengths: np.ndarray
    cells: np.ndarray


class LinearLikelihood:
    """Likelihood of gold segmentations, given weights of features and a head's other parameters.

    Parameters
    ----------
    head : SemiMarkovCRFHead
        With a projection, initial and final scores; in float64, on the CPU. Its transitions,
        initial and final scores and durations are read at every call.
    features : FeatureMatrix
        Positions of the sequences one after the other, the sequences sorted by length.
    lengths : int64 ndarray of shape (n_sequences,)
        Ascending.
    table : SegmentTable
        Gold segments, ordered by sequence in the order of `lengths`.
    weights : float64 ndarray of shape (n_sequences,)
        Of the sequences' likelihoods.
    dtype : numpy dtype
        Of the scores. Sums over a sequence are float64 either way.

    Attributes
    ----------
    num_positions : int
    num_outputs : int
        Columns P of the scores: C, or 3C with boundary scores.
    """

    def __init__(
        self,
        head: SemiMarkovCRFHead,
        features: FeatureMatrix,
        lengths: np.ndarray,
        table: SegmentTable,
        weights: np.ndarray,
        dtype: Any,
    ) -> None:
        self.head, self.features, self.weights = head, features, weights
        self.num_positions = int(lengths.sum())
        self.groups = _groups(lengths)
        self.row_weights = np.repeat(weights, lengths).astype(dtype)[:, None]
        self.num_outputs = head.num_classes * (1 if head.boundary_projection is None else 3)
        self._count_gold(lengths, table)

    def _count_gold(self, lengths: np.ndarray, table: SegmentTable) -> None:
        """Cells of the gold segments in the scores, and how often they use each parameter."""
        num_labels, longest = self.head.num_classes, self.head.max_duration
        offset = torch.from_numpy(np.cumsum(lengths) - lengths)
        sequence, start, stop, label = table
        owner, position, row = covered_positions(table)
        cells = [(offset[owner] + position) * self.num_outputs + label[row]]
        if self.head.boundary_projection is not None:
            begin = offset[sequence] * self.num_outputs + label
            cells.append(begin + start * self.num_outputs + num_labels)
            cells.append(begin + (stop - 1) * self.num_outputs + 2 * num_labels)
        self.gold = torch.cat(cells).numpy()
        first, last = start == 0, stop == torch.from_numpy(lengths)[sequence]
        pairs = table.label[:-1] * num_labels + table.label[1:]
        inner = torch.nonzero(~first)[:, 0]
        pairs = pairs[inner - 1]

        weight, duration = torch.from_numpy(self.weights)[sequence], stop - start
        self.gold_weights = np.repeat(self.weights, lengths)[self.gold // self.num_outputs]

        def count(index: torch.Tensor, rows: Any, *shape: int) -> np.ndarray:
            found = torch.bincount(index, weight[rows], minlength=int(np.prod(shape)))
            return found.reshape(shape).double().numpy()

        self.gold_counts = {
            "transition": count(pairs, inner, num_labels, num_labels),
            "initial_scores": count(label[first], first, num_labels),
            "final_scores": count(label[last], last, num_labels),
            "duration_bias": count(
                (duration.clamp(max=longest) - 1) * num_labels + label,
                slice(None),
                longest,
                num_labels,
            ),
        }
        if self.head.duration_tail is not None:
            beyond = (duration - longest).clamp(min=0)
            found = torch.bincount(label, weight * beyond, minlength=num_labels)
            self.gold_counts["duration_tail"] = found.numpy()

    def scores(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """``X W + b``, (N, P)."""
        scores = self.features.product(weight)
        scores += bias
        return scores

    def loss(self, scores: np.ndarray) -> float:
        """Summed negative log-likelihood.

        Parameters
        ----------
        scores : ndarray of shape (N, P)
        """
        shared = self._shared(scores)
        total = 0.0
        for group, problem in self._problems(scores, shared):
            log_z = choose("auto", problem).log_partition(problem)
            total += float(self._weights(group) @ log_z.numpy())
        return total - self._gold_score(scores, shared)

    def gradients(self, scores: np.ndarray) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
        """Summed negative log-likelihood, and its gradients.

        Returns
        -------
        loss : float
        gradients : dict of float64 ndarray
            By "transition", "initial_scores", "final_scores", "duration_bias" and, of a head with
            one, "duration_tail".
        slopes : ndarray of shape (N, P)
            Gradient by the scores.
        """
        num_labels, shared = self.head.num_classes, self._shared(scores)
        total, slopes = 0.0, np.empty_like(scores)
        gradients = {name: -counts for name, counts in self.gold_counts.items()}
        for group, problem in self._problems(scores, shared):
            wanted = {*problem.parameters()}
            log_z, found = choose("auto", problem).gradients(problem, wanted)
            weights = self._weights(group)
            total += float(weights @ log_z.numpy())
            for i, name in enumerate(self._boundary_names()):
                columns = slice(i * num_labels, (i + 1) * num_labels)
                rows = found[name].numpy().reshape(-1, num_labels)
                slopes[group.begin : group.stop, columns] = rows[group.cells]
            for name, gradient in gradients.items():
                # Threads of a BLAS would wait for each other longer than this takes.
                summed = np.einsum("b,b...->...", weights, found[name].numpy())
                gradient[: len(summed)] += summed  # the durations that are reached
        slopes.ravel()[self.gold] -= 1
        if (self.weights != 1).any():
            slopes *= self.row_weights
        return total - self._gold_score(scores, shared), gradients, slopes

    def _boundary_names(self) -> tuple[str, ...]:
        names = ("scores", "start_scores", "end_scores")
        return names[: self.num_outputs // self.head.num_classes]

    def _weights(self, group: _Group) -> np.ndarray:
        return self.weights[group.first : group.first + len(group.lengths)]

    def _shared(self, scores: np.ndarray) -> dict[str, torch.Tensor]:
        """Parameters of the head, in the dtype of the scores."""
        head = self.head
        shared = {
            "transition": head.constrained_transition,
            "duration_bias": head.duration_bias,
            "initial_scores": head.initial_scores,
            "final_scores": head.final_scores,
        }
        if head.duration_tail is not None:
            shared["duration_tail"] = head.duration_tail
        dtype = torch.from_numpy(scores).dtype
        return {name: value.detach().to(dtype) for name, value in shared.items()}

    def _gold_score(self, scores: np.ndarray, shared: dict[str, torch.Tensor]) -> float:
        """Weighted sum of the scores of the gold segmentations."""
        total = float(np.dot(scores.ravel()[self.gold].astype(np.float64), self.gold_weights))
        for name, counts in self.gold_counts.items():
            value = shared[name].double().numpy()
            total += float((counts * np.where(np.isfinite(value), value, 0.0)).sum())
        return total

    def _problems(
        self, scores: np.ndarray, shared: dict[str, torch.Tensor]
    ) -> Iterator[tuple[_Group, Potentials]]:
        """Padded batches of sequences of similar length."""
        num_labels = self.head.num_classes
        for group in self.groups:
            shape, given = (len(group.lengths), group.lengths[-1], num_labels), {}
            for i, name in enumerate(self._boundary_names()):
                padded = np.zeros(shape, scores.dtype)
                columns = slice(i * num_labels, (i + 1) * num_labels)
                rows = scores[group.begin : group.stop, columns]
                padded.reshape(-1, num_labels)[group.cells] = rows
                given[name] = torch.from_numpy(padded)
            problem = Potentials(lengths=torch.from_numpy(group.lengths), **given, **shared)
            yield group, within_length(problem)


def _groups(lengths: np.ndarray) -> list[_Group]:
    """Runs of sequences of similar length, each of a bounded number of padded positions."""
    groups, begin, first, real = [], 0, 0, 0
    for i in range(1, len(lengths) + 1):
        real += int(lengths[i - 1])
        if i < len(lengths):
            padded = (i + 1 - first) * int(lengths[i])
            spare = _MOST_PADDING * (real + int(lengths[i])) + _FREE_PADDING
            if padded <= min(spare, _POSITIONS_PER_CALL):
                continue
        inside = np.arange(lengths[i - 1]) < lengths[first:i, None]
        groups.append(_Group(first, begin, begin + real, lengths[first:i], np.flatnonzero(inside)))
        begin, first, real = begin + real, i, 0
    return groups

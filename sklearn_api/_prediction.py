"""What a fitted segmenter says about new sequences.

Sequences are run in batches of similar length, bounded by their padded number of positions, so that
memory does not grow with the number of sequences. Longer sequences are encoded by windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.marginals import SegmentMarginals
from flash_semicrf.inference.posterior import segment_marginals
from flash_semicrf.inference.viterbi import viterbi_table
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.potentials import (
    NEG_INF,
    Potentials,
    center_scores,
    forbid,
    score_rows,
    score_segments,
    within_length,
)
from flash_semicrf.problem.segments import (
    Segment,
    SegmentTable,
    segments_to_bio,
    table_to_labels,
    table_to_segments,
)
from sklearn_api._inputs.sequences import Sequences, check_X, check_y
from sklearn_api._lbfgs.scores import sparse_scores
from sklearn_api._model.precision import cast_features
from sklearn_api._model.windows import encode_in_windows
from sklearn_api._training.data import pad_values
from sklearn_api._training.weights import check_sample_weight

__all__ = ["PredictionMixin", "batches_by_positions", "centered"]


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


class PredictionMixin:
    """Prediction methods of `SemiCRFSegmenter`."""

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """Most probable label of each position: the labels with the highest expected `score`.

        These are the labels of largest `predict_proba`; where minimum durations or transition
        constraints are set, those of the largest sum among the labellings that obey them. They can
        differ from the most probable segmentation, `predict_segments`, in positions that are
        uncertain. With ``tagging="bio"`` the tags are those of `predict_segments`, as labels chosen
        one by one need not be the tags of any segmentation.

        Parameters
        ----------
        X : sequences
            See Notes of the class.
        groups : array-like of shape (n_rows,), optional
            For 2-D X.

        Returns
        -------
        ndarray of shape (T,), or object array of such for many sequences
        """
        sequences = self._check_input(X, groups)
        return sequences.layout.restore(self._position_labels(sequences))

    def predict_segments(self, X: Any, groups: Any = None) -> list:
        """Segments of the most probable segmentation.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        list of Segment, or list of such lists with `groups` or many sequences
            Ends are inclusive, labels are those of ``classes_``, as Python objects.
        """
        sequences = self._check_input(X, groups)
        named = self._renamed(self._decode(sequences))
        return named[0] if sequences.layout.kind == "single" else named

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """Posterior probability of each label at each position, given the whole sequence.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        ndarray of shape (T, C), or object array of such for many sequences
            Columns in the order of ``classes_``; rows sum to 1.
        """
        sequences = self._check_input(X, groups)
        outputs = self._marginals(sequences, lambda marginals, _: marginals.position)
        return sequences.layout.restore([p / p.sum(1, keepdims=True) for p in outputs])

    def predict_boundary_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """Posterior probability that a segment starts at each position.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        ndarray of shape (T,), or object array of such for many sequences
            1 at the first position of a sequence.
        """
        sequences = self._check_input(X, groups)
        outputs = self._marginals(sequences, lambda marginals, _: marginals.start.sum(-1))
        return sequences.layout.restore([p.clip(0.0, 1.0) for p in outputs])

    def log_likelihood(self, X: Any, y: Any, groups: Any = None) -> np.ndarray | float:
        """Log-probability of the given segmentations, in nats.

        Parameters
        ----------
        X, groups
            As for `predict`.
        y : labels or segments, nested as X

        Returns
        -------
        float for one sequence, ndarray of shape (n_sequences,) otherwise
        """
        sequences = self._check_input(X, groups)
        table = self._encode(check_y(y, sequences.layout, self.tagging))
        counts = torch.bincount(table.sequence, minlength=len(sequences.values))
        rows = torch.split(torch.stack(table[1:], 1), counts.tolist())
        result = np.empty(len(sequences.values))
        for batch, problem in self._problems(sequences):
            part = [rows[i] for i in batch]
            owner = torch.repeat_interleave(torch.tensor([len(r) for r in part]))
            columns = (owner, *torch.cat(part).unbind(1))
            gold = SegmentTable(*(column.to(problem.device) for column in columns))
            with torch.no_grad():
                problem = centered(problem)
                # Forbidden segmentations have the value -inf here; a training loss refuses them.
                value = score_segments(problem, gold) - log_partition(problem)
            result[batch] = value.cpu().numpy()
        return float(result[0]) if sequences.layout.kind == "single" else result

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """Fraction of all positions whose label, or BIO tag, is predicted right.

        Parameters
        ----------
        X, groups
            As for `predict`.
        y : labels or segments, nested as X
        sample_weight : array-like, optional
            As for `fit`; weights of positions count one by one.

        Returns
        -------
        float
        """
        sequences = self._check_input(X, groups)
        gold = check_y(y, sequences.layout, self.tagging)
        labels = gold.position_labels if self.tagging is None else gold.bio_tags
        weights = check_sample_weight(sample_weight, sequences.layout)
        weights = None if weights is None else np.concatenate(weights)
        found = np.concatenate(self._position_labels(sequences))
        return accuracy_score(labels, found, sample_weight=weights)

    def _check_input(self, X: Any, groups: Any) -> Sequences:
        check_is_fitted(self, "net_")
        sequences = check_X(self, X, groups, dtype=None, accept_sparse=self._takes_sparse)
        return sequences if self._standardizes else cast_features(sequences, self.dtype)

    @property
    def _takes_sparse(self) -> bool:
        return isinstance(self.encoder, str) and self.encoder == "linear"

    @property
    def _standardizes(self) -> bool:
        """Whether features stay in float64 until the module has centred and scaled them."""
        named = isinstance(self.encoder, str) and self.encoder != "linear"
        # By name, as a model of a GPU also predicts where there is none. "mps" has no float64.
        return named and not str(self.device).startswith("mps")

    def _problems(self, sequences: Sequences) -> Iterator[tuple[np.ndarray, Potentials]]:
        """Batches: indices of the sequences, and their problem, not centred."""
        device = torch.device(self.net_.device)
        head = self.module_.head
        for batch in batches_by_positions(sequences.lengths, self.window_length):
            values = [sequences.values[i] for i in batch]
            with torch.no_grad():
                if sequences.sparse:
                    scores, lengths = sparse_scores(head, values)
                    problem = head.potentials_of_scores(scores[0], lengths.to(device), *scores[1:])
                else:
                    x, lengths = pad_values(values)
                    lengths = lengths.to(device)
                    hidden = encode_in_windows(self.module_, x, lengths, self.window_length)
                    problem, _ = head.potentials(hidden, lengths, centered=False)
            yield batch, within_length(problem)

    def _decode(self, sequences: Sequences) -> list[list[Segment]]:
        """Most probable segments of each sequence, with class indices."""
        result: list[list[Segment]] = [[] for _ in sequences.values]
        for batch, problem in self._problems(sequences):
            with torch.no_grad():
                _, table = viterbi_table(centered(problem))
                # Scores of segments are those of the model, not of the centred problem.
                rows = score_rows(problem, table)
            decoded = table_to_segments(table, problem.batch_size, rows)
            for i, segments in zip(batch, decoded, strict=True):
                result[i] = segments
        return result

    def _position_labels(self, sequences: Sequences) -> list[np.ndarray]:
        """Labels of largest expected accuracy of each sequence, among those that are allowed."""
        head = self.module_.head
        if self.tagging == "bio":
            return [
                np.array(segments_to_bio(self._named(segments), int(length)), dtype=object)
                for segments, length in zip(self._decode(sequences), sequences.lengths, strict=True)
            ]

        def choose(marginals: SegmentMarginals, lengths: Tensor) -> Tensor:
            if head.allowed_durations is None and head.allowed_transitions is None:
                return marginals.position.argmax(-1)
            problem = within_length(_expected_accuracy(marginals.position, lengths, head))
            batch_size, num_positions, _ = marginals.position.shape
            return table_to_labels(viterbi_table(problem)[1], batch_size, num_positions)

        return [self.classes_[index] for index in self._marginals(sequences, choose)]

    def _renamed(self, segmentations: list[list[Segment]]) -> list[list[Segment]]:
        """Segments with class indices as segments with labels."""
        names = self.classes_.tolist()
        return [[replace(s, label=names[s.label]) for s in segments] for segments in segmentations]

    def _named(self, segments: list[Segment]) -> list[tuple[int, int, Any]]:
        """Half-open ``(start, stop, label)`` of segments with class indices."""
        return [(s.start, s.end + 1, self.classes_[s.label]) for s in segments]

    def _marginals(
        self, sequences: Sequences, select: Callable[[SegmentMarginals, Tensor], Tensor]
    ) -> list[np.ndarray]:
        """What `select` makes of marginals and lengths, for each sequence, cut to its length."""
        result: list[Any] = [None] * len(sequences.values)
        for batch, problem in self._problems(sequences):
            with torch.no_grad():
                marginals = segment_marginals(problem)
                selected = select(marginals, problem.lengths).cpu().numpy()
            for i, row, length in zip(batch, selected, problem.lengths.tolist(), strict=True):
                result[i] = row[:length].copy()
        return result


def centered(problem: Potentials) -> Potentials:
    """The same problem with the largest score of each position at 0."""
    return problem.replace(scores=center_scores(problem.scores, problem.lengths)[0])


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

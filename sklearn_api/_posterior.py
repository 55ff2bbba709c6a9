"""What a fitted segmenter says beyond its best answer: alternatives, samples, uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from flash_semicrf.inference import information
from flash_semicrf.inference.nbest import n_best_table
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.potentials import Potentials, score_rows
from flash_semicrf.problem.segments import SegmentTable, table_to_segments
from flash_semicrf.problem.validation import check_positive_int
from sklearn_api._prediction import centered

__all__ = ["PosteriorMixin"]


class PosteriorMixin:
    """Methods of `SemiCRFSegmenter` about its whole distribution over segmentations."""

    def predict_topk(self, X: Any, k: int, groups: Any = None) -> list:
        """Segments of the k most probable segmentations, the most probable one first.

        Parameters
        ----------
        X, groups
            As for `predict`.
        k : int
            How many of each sequence.

        Returns
        -------
        list of lists of Segment, or list of such with `groups` or many sequences
            By rank, as `predict_segments` returns the first; fewer than `k` where a sequence has no
            more. The scores of a segmentation's segments sum to its score, and `log_likelihood` of
            it is its log-probability.

        Raises
        ------
        ValueError
            Unless ``k >= 1``.
        """
        k = check_positive_int("k", k)
        return self._segmentations(X, groups, k, lambda problem: n_best_table(problem, k)[1])

    def sample(
        self, X: Any, n_samples: int = 1, random_state: Any = None, groups: Any = None
    ) -> list:
        """Draw segmentations from the distribution given X.

        Parameters
        ----------
        X, groups
            As for `predict`.
        n_samples : int, default=1
            How many of each sequence.
        random_state : int, RandomState instance or None, default=None
            An int gives the same samples for the same X.

        Returns
        -------
        list of lists of Segment, or list of such with `groups` or many sequences
            By sample, each as `predict_segments` returns one.

        Raises
        ------
        ValueError
            Unless ``n_samples >= 1``.
        """
        n_samples = check_positive_int("n_samples", n_samples)
        rng = check_random_state(random_state)

        def draw(problem: Potentials) -> SegmentTable:
            # Of each batch: samples of two sequences with one seed and place are not independent.
            return sample_table(problem, n_samples, int(rng.randint(2**31 - 1)))

        return self._segmentations(X, groups, n_samples, draw)

    def entropy(self, X: Any, groups: Any = None) -> np.ndarray | float:
        """Entropy of the distribution over segmentations: how unsure the model is of a sequence.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        float for one sequence, ndarray of shape (n_sequences,) otherwise
            In nats, exact: the expectation of minus the log-probability. 0 where one segmentation
            is certain; it grows with the length.
        """
        sequences = self._check_input(X, groups)
        result = np.empty(len(sequences.values))
        for batch, problem in self._problems(sequences):
            with torch.no_grad():
                result[batch] = information.entropy(problem).cpu().numpy()
        return float(result[0]) if sequences.layout.kind == "single" else result

    def _segmentations(
        self, X: Any, groups: Any, number: int, find: Callable[[Potentials], SegmentTable]
    ) -> list:
        """Up to `number` segmentations of each sequence, from tables of rank * B + b."""
        sequences = self._check_input(X, groups)
        result: list[list] = [[] for _ in sequences.values]
        for batch, problem in self._problems(sequences):
            count = problem.batch_size
            with torch.no_grad():
                table = find(centered(problem))
                # Scores of segments are those of the model, not of the centred problem.
                rows = score_rows(problem, table._replace(sequence=table.sequence % count))
            found = table_to_segments(table, number * count, rows)
            for place, i in enumerate(batch):
                result[i] = self._renamed([rows for rows in found[place::count] if rows])
        return result[0] if sequences.layout.kind == "single" else result

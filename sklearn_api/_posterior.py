"""The whole distribution over segmentations: alternatives, samples, probabilities, uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from flash_semicrf.inference import information
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.inference.nbest import n_best_table
from flash_semicrf.inference.sampling import sample_table
from flash_semicrf.problem.potentials import Potentials, score_rows, score_segments
from flash_semicrf.problem.segments import Segments, SegmentTable, table_to_segments
from sklearn_api._prediction import Problems, centered, in_order

__all__ = ["best_segmentations", "entropies", "log_likelihoods", "sampled_segmentations"]


def best_segmentations(problems: Problems, k: int) -> list[list[Segments]]:
    """Up to k most probable segmentations of each sequence, by rank, with class indices."""
    return _segmentations(problems, k, lambda problem: n_best_table(problem, k)[1])


def sampled_segmentations(
    problems: Problems, n_samples: int, rng: np.random.RandomState
) -> list[list[Segments]]:
    """Samples of the segmentations of each sequence, with class indices."""

    def draw(problem: Potentials) -> SegmentTable:
        # Of each batch: samples of two sequences with one seed and place are not independent.
        return sample_table(problem, n_samples, int(rng.randint(2**31 - 1)))

    return _segmentations(problems, n_samples, draw)


def _segmentations(
    problems: Problems, number: int, find: Callable[[Potentials], SegmentTable]
) -> list[list[Segments]]:
    """Up to `number` segmentations of each sequence, from tables of rank * B + b."""

    def found() -> Iterator[tuple[np.ndarray, list[list[Segments]]]]:
        for batch, problem in problems:
            count = problem.batch_size
            with torch.no_grad():
                table = find(centered(problem))
                # Scores of segments are those of the model, not of the centred problem.
                rows = score_rows(problem, table._replace(sequence=table.sequence % count))
            segments = table_to_segments(table, number * count, rows)
            yield batch, [[one for one in segments[b::count] if one] for b in range(count)]

    return in_order(found())


def entropies(problems: Problems) -> np.ndarray:
    """Entropy of the distribution over the segmentations of each sequence, in nats."""

    def computed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch, problem in problems:
            with torch.no_grad():
                found = information.entropy(problem).cpu().numpy()
            yield batch, found

    return np.array(in_order(computed()), dtype=np.float64)


def log_likelihoods(problems: Problems, table: SegmentTable, num_sequences: int) -> np.ndarray:
    """Log-probability of a segmentation of each sequence, in nats; -inf of a forbidden one.

    Parameters
    ----------
    problems : Problems
    table : SegmentTable
        Segmentations, ordered by sequence.
    num_sequences : int

    Returns
    -------
    float64 ndarray of shape (num_sequences,)
    """
    counts = torch.bincount(table.sequence, minlength=num_sequences)
    rows = torch.split(torch.stack(table[1:], 1), counts.tolist())

    def computed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch, problem in problems:
            part = [rows[i] for i in batch]
            owner = torch.repeat_interleave(torch.tensor([len(r) for r in part]))
            columns = (owner, *torch.cat(part).unbind(1))
            gold = SegmentTable(*(column.to(problem.device) for column in columns))
            with torch.no_grad():
                problem = centered(problem)
                # Forbidden segmentations have the value -inf here; a training loss refuses them.
                log_z = log_partition(problem, validate="values")
                value = score_segments(problem, gold) - log_z
            yield batch, value.cpu().numpy()

    return np.array(in_order(computed()), dtype=np.float64)

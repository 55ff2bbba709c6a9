"""From checked training data to the datasets that a net is run on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from sklearn.utils import check_random_state
from torch.utils.data import Dataset

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._training.crops import crop_long
from sklearn_api._training.data import SequenceDataset
from sklearn_api._training.weights import WeightedDataset, training_weights

__all__ = ["training_datasets", "split_sequences"]


def training_datasets(
    estimator: Any,
    sequences: Sequences,
    table: SegmentTable,
    sample_weight: Any = None,
    hold_out: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """Datasets to train on and to validate with, as the estimator's parameters say.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
        With its net built.
    sequences, table : training data
    sample_weight : see `check_sample_weight`
    hold_out : bool
        Hold out whole sequences.

    Returns
    -------
    train : Dataset
    valid : Dataset or None
    """
    weights = training_weights(estimator, sample_weight, sequences.layout)
    whole = SequenceDataset(sequences.values, table)
    if not hold_out:
        return _derived(estimator, whole, weights), None
    parts = split_sequences(len(whole), estimator.validation_fraction, estimator._seed)
    train, valid = (
        _derived(estimator, whole.subset(part), weights and [weights[i] for i in part])
        for part in parts
    )
    return train, valid


def _derived(estimator: Any, dataset: SequenceDataset, weights: Any) -> Dataset:
    dataset = crop_long(estimator, dataset)
    return dataset if weights is None else WeightedDataset(dataset, weights)


def split_sequences(
    num_sequences: int, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and validation sequences.

    Raises
    ------
    ValueError
        For a single sequence.
    """
    if num_sequences < 2:
        raise ValueError(
            "`early_stopping=True` holds out whole sequences and needs at least 2; got "
            f"{num_sequences}."
        )
    count = min(num_sequences - 1, max(1, math.ceil(fraction * num_sequences)))
    order = check_random_state(seed).permutation(num_sequences)
    return np.sort(order[count:]), np.sort(order[:count])

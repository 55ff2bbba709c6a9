"""Division of checked training data into the data sets that a net trains on and is held to."""

from __future__ import annotations

import math

import numpy as np
from sklearn.utils import check_random_state
from torch import nn

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._model.windows import encoder_context
from sklearn_api._training.crops import CroppedDataset
from sklearn_api._training.data import Batches, SequenceDataset
from sklearn_api._training.weights import WeightedDataset

__all__ = ["split_sequences", "training_datasets"]


def training_datasets(
    sequences: Sequences,
    table: SegmentTable,
    weights: list[np.ndarray] | None,
    encoder: nn.Module,
    *,
    crop_length: int | None = None,
    validation_fraction: float | None = None,
    seed: int = 0,
) -> tuple[Batches, Batches | None]:
    """Datasets to train on and to validate with.

    Parameters
    ----------
    sequences, table : training data
    weights : list of ndarray of shape (T_i,), or None
        Of the positions.
    encoder : nn.Module
        States what it has to see around a crop.
    crop_length : int, optional
        Longest piece of a sequence; None: sequences stay whole.
    validation_fraction : float, optional
        Fraction of the sequences to hold out; None: none.
    seed : int
        Of the choice of those.

    Returns
    -------
    train : Batches
    valid : Batches or None
    """

    def derived(dataset: SequenceDataset, weights: list[np.ndarray] | None) -> Batches:
        if crop_length is not None:
            dataset = CroppedDataset(dataset, crop_length, encoder_context(encoder))
        return dataset if weights is None else WeightedDataset(dataset, weights)

    whole = SequenceDataset(sequences.values, table)
    if validation_fraction is None:
        return derived(whole, weights), None
    parts = split_sequences(len(whole), validation_fraction, seed)
    train, valid = (
        derived(whole.subset(part), weights and [weights[i] for i in part]) for part in parts
    )
    return train, valid


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

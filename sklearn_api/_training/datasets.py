"""From checked training data to the datasets that a net is run on."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.sequences import Sequences
from sklearn_api._model.building import split_sequences
from sklearn_api._training.crops import crop_long
from sklearn_api._training.net import SequenceDataset
from sklearn_api._training.weights import WeightedDataset, training_weights

__all__ = ["training_datasets"]


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

"""Sample weights of sequences and of their positions, and weights of classes.

Whatever form they come in, training sees one list: the weights of the positions of each sequence.

A weight multiplies a log-likelihood, so a sequence of weight 2 counts as two copies of it. The
likelihood of a segmentation is not a sum over positions: weights of positions act through their
mean over the sequence or, with `crop_length`, over each crop. A class weight multiplies those of
the positions that have the label, and so acts through the same mean.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import assert_all_finite
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._inputs.containers import listed
from sklearn_api._inputs.sequences import Layout
from sklearn_api._parameters import check_largest
from sklearn_api._training.crops import CroppedDataset
from sklearn_api._training.data import SequenceDataset

__all__ = ["WeightedDataset", "check_sample_weight", "training_weights"]


def check_sample_weight(sample_weight: Any, layout: Layout) -> list[np.ndarray] | None:
    """Weights of the positions of each sequence.

    Parameters
    ----------
    sample_weight : None, a number, or array-like
        For 2-D X one weight per row. For many sequences one per sequence, or one array of weights
        per sequence.
    layout : Layout
        Of X.

    Returns
    -------
    list of float64 ndarray of shape (T_i,), or None
        None without weights.

    Raises
    ------
    ValueError
        For a wrong number of weights, or one that is negative or not finite, naming the sequence;
        or if all are 0.
    """
    if sample_weight is None:
        return None
    lengths = layout.lengths
    if not isinstance(sample_weight, Real) and not hasattr(sample_weight, "__array__"):
        sample_weight = listed(sample_weight, "`sample_weight` must be a number, array or list")
    if isinstance(sample_weight, Real):
        weights = [np.full(n, sample_weight, dtype=np.float64) for n in lengths]
    elif layout.kind != "many":
        rows = _column(sample_weight, "of `X`", int(lengths.sum()), "row")
        weights = np.split(rows, np.cumsum(lengths)[:-1])
    elif len(sample_weight) and np.ndim(next(iter(sample_weight))) == 1:
        _check_count(len(sample_weight), len(lengths), "of `X`", "sequence")
        weights = [
            _column(one, f"of sequence {i}", int(n), "position")
            for i, (one, n) in enumerate(zip(sample_weight, lengths, strict=True))
        ]
    else:
        each = _column(sample_weight, "of `X`", len(lengths), "sequence")
        weights = [np.full(n, w) for w, n in zip(each, lengths, strict=True)]
    for i, one in enumerate(weights):
        if not (one >= 0).all():
            raise ValueError(
                f"`sample_weight` must be >= 0; got {one[~(one >= 0)][0]} in sequence {i}."
            )
    if not any(one.any() for one in weights):
        raise ValueError("`sample_weight` must not be zero everywhere.")
    return weights


def training_weights(
    sample_weight: Any,
    class_weight: str | dict[Any, float] | None,
    classes: np.ndarray,
    table: SegmentTable,
    layout: Layout,
    dtype: str,
) -> list[np.ndarray] | None:
    """Weights of the positions of each sequence: sample weights times those of the labels.

    Parameters
    ----------
    sample_weight : see `check_sample_weight`
    class_weight : None, "balanced" or dict of label to weight
        "balanced" is n / (C * count) for n positions; labels that a dict leaves out have weight 1.
    classes : ndarray of shape (C,)
    table : SegmentTable
        Gold segments with class indices, ordered by sequence.
    layout : Layout
        Of X.
    dtype : {"float32", "float64"}
        That training computes in.

    Returns
    -------
    list of float64 ndarray of shape (T_i,), or None
        None without weights of either kind.

    Raises
    ------
    ValueError
        As `check_sample_weight`; for a label that is not among the classes, or a class weight that
        is negative or not finite; if all weights are 0, or one is so large that training overflows.
    """
    weights, name = check_sample_weight(sample_weight, layout), "sample_weight"
    if class_weight is not None:
        name = "sample_weight` times `class_weight"
        product = _class_weights(class_weight, classes, table)
        if weights is not None:
            product = product * np.concatenate(weights)
        if not product.any():
            raise ValueError(f"`{name}` must not be zero everywhere.")
        weights = np.split(product, np.cumsum(layout.lengths)[:-1])
    for i, one in enumerate(weights or []):
        check_largest(name, one.max(), dtype, f" in sequence {i}")
    return weights


def _column(values: Any, where: str, count: int, unit: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"Sample weights must be 1D array or scalar; got shape {values.shape}.")
    _check_count(len(values), count, where, unit)
    assert_all_finite(values, input_name="sample_weight")
    return values


def _check_count(got: int, count: int, where: str, unit: str) -> None:
    if got != count:
        raise ValueError(
            f"`sample_weight` must have one weight per {unit} {where}: {count}; got {got}."
        )


def _class_weights(
    class_weight: str | dict[Any, float], classes: np.ndarray, table: SegmentTable
) -> np.ndarray:
    """Class weights of all positions of all sequences, one after the other."""
    labels = np.repeat(table.label.numpy(), (table.stop - table.start).numpy())
    if isinstance(class_weight, dict):
        by_class = _weights_by_class(class_weight, classes.tolist())
    else:
        present = np.unique(labels)
        by_class = np.zeros(len(classes))
        by_class[present] = compute_class_weight(class_weight, classes=present, y=labels)
    weights: np.ndarray = by_class[labels]
    if not weights.any():
        raise ValueError("`class_weight` must not be 0 for all labels of `y`.")
    return weights


def _weights_by_class(given: dict[Any, float], classes: list[Any]) -> np.ndarray:
    weights = np.ones(len(classes))
    for label, weight in given.items():
        if label not in classes:
            raise ValueError(f"The labels of `class_weight` must be in {classes}; got {label!r}.")
        if not (isinstance(weight, Real) and 0 <= weight < np.inf):
            raise ValueError(
                f"`class_weight` must be finite and >= 0; got {weight!r} for label {label!r}."
            )
        weights[classes.index(label)] = weight
    return weights


class WeightedDataset(Dataset[Any]):
    """A dataset whose batches end with the weights of positions, (B, T).

    Parameters
    ----------
    dataset : SequenceDataset or CroppedDataset
    weights : list of ndarray of shape (T_i,)
        Of the positions.
    """

    def __init__(self, dataset: SequenceDataset, weights: list[np.ndarray]) -> None:
        self.dataset = dataset
        self.weights = weights
        self.lengths = dataset.lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> tuple[Any, np.ndarray]:
        if isinstance(self.dataset, CroppedDataset):
            start, stop = self.dataset.widened(key)
            return self.dataset[key], self.weights[key.sequence][start:stop]
        return self.dataset[key], self.weights[key]

    def sampler(self, batch_size: int, shuffle: bool, seed: int) -> Sampler[Any]:
        """Batches of keys, as the dataset's own."""
        return self.dataset.sampler(batch_size, shuffle, seed)

    def collate(self, items: list[Any]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """One batch, its weights (B, T) after the columns of the segments."""
        inputs, columns = self.dataset.collate([item for item, _ in items])
        weights = torch.zeros(len(items), int(inputs["lengths"].max()), dtype=torch.float64)
        for row, (_, own) in zip(weights, items, strict=True):
            row[: len(own)] = torch.from_numpy(own)
        return inputs, (*columns, weights)

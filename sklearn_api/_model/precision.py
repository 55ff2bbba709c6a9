"""Features in the dtype that a model computes in, and what is lost by that."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp

from sklearn_api._inputs.sequences import Sequences
from sklearn_api.encoders import position_moments

__all__ = ["cast_features", "warn_of_lost_spread"]


def cast_features(sequences: Sequences, dtype: Any) -> Sequences:
    """Sequences with values of one dtype.

    Raises
    ------
    ValueError
        For a value that is too large for it, naming the sequence.
    """
    with np.errstate(over="ignore"):
        values = [x.astype(dtype, copy=False) for x in sequences.values]
    for i, (narrow, given) in enumerate(zip(values, sequences.values, strict=True)):
        if narrow.dtype.itemsize < given.dtype.itemsize:
            numbers, wide = (x.data if sp.issparse(x) else x for x in (narrow, given))
            large = np.isinf(numbers)
            if large.any():
                raise ValueError(
                    f"`X` must fit into {np.dtype(dtype)}; got {wide[large][0]:.3g} in sequence "
                    f'{i}. Scale the feature, or set dtype="float64".'
                )
    return Sequences(values, sequences.layout)


def warn_of_lost_spread(sequences: Sequences, dtype: Any) -> None:
    """Warn where casting takes all that varies in a feature.

    Parameters
    ----------
    sequences : Sequences
        Training data as given; sparse features, which vary about 0, are not looked at.
    dtype : numpy dtype
        What they will be cast to.

    Warns
    -----
    UserWarning
        For a feature whose standard deviation is less than the spacing of numbers of its size.
    """
    dtype = np.dtype(dtype)
    wide = [x for x in sequences.values if x.dtype.itemsize > dtype.itemsize]
    if sequences.sparse or not wide:
        return
    _, std = position_moments(wide)
    size = np.max([np.abs(x).max(0) for x in wide], axis=0)
    spacing = np.spacing(size.astype(dtype)).astype(np.float64)
    lost = (std > 0) & (std < spacing)
    if lost.any():
        n = int(np.argmax(lost))
        warnings.warn(
            f"Feature {n} of `X` has a standard deviation of {std[n]:.2g} at values of up to "
            f"{size[n]:.2g}, where numbers of {dtype} are {spacing[n]:.2g} apart: it is lost. "
            f'Centre it first, by PerPosition(StandardScaler()), or set dtype="float64".',
            UserWarning,
            stacklevel=4,
        )

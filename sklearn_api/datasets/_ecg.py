"""Electrocardiograms with the waves of every heartbeat."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sklearn_api._inputs.sequences import object_array
from sklearn_api.datasets._files import read_arrays, read_text


@overload
def load_ecg(*, return_X_y: Literal[False] = False) -> Bunch: ...
@overload
def load_ecg(*, return_X_y: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...
def load_ecg(*, return_X_y: bool = False) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """Load 200 electrocardiograms delineated by cardiologists (LUDB, lead II).

    Parameters
    ----------
    return_X_y : bool
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : Bunch
        X : object array of shape (200,)
            Element i is a float32 array of shape (T_i, 1), in millivolt.
        y : object array of shape (200,)
            Element i is a string array of shape (T_i,): "P", "QRS", "T" or "none".
        groups : int array of shape (200,)
            Record, 0 to 199.
        offsets : int array of shape (200,)
            Position of the ten-second record at which element i of ``X`` begins.
        target_names, feature_names : list of str
            The labels; the name of the one column.
        sampling_rate : float
            Positions in a second, 250.
        hop, hop_unit : float, str
            Distance between positions, 0.004 s.
        DESCR : str
            Description, licence and citation.
    (X, y) : tuple
        If `return_X_y`.

    References
    ----------
    A. I. Kalyakulina et al.: LUDB: A New Open-Access Validation Tool for Electrocardiogram
    Delineation Algorithms. IEEE Access 8:186181-186190, 2020.

    Examples
    --------
    >>> from sklearn_api.datasets import load_ecg
    >>> ecg = load_ecg()
    >>> ecg.X[0].shape, ecg.y[0].shape
    ((1677, 1), (1677,))
    >>> ecg.target_names
    ['none', 'P', 'QRS', 'T']
    """
    arrays = read_arrays("ludb_leadII_250hz.npz")
    # Beats outside [ann_start, ann_end) are not annotated: if they were labelled "none", a model
    # would learn to miss beats.
    parts = list(zip(arrays["ann_start"].tolist(), arrays["ann_end"].tolist(), strict=True))
    millivolt = arrays["X"].astype(np.float32) / np.float32(1000)
    labels = arrays["labels"][arrays["y"]]
    X = object_array([millivolt[i, a:b, None].copy() for i, (a, b) in enumerate(parts)])
    y = object_array([labels[i, a:b].copy() for i, (a, b) in enumerate(parts)])
    if return_X_y:
        return X, y
    return Bunch(
        X=X,
        y=y,
        groups=np.arange(len(X)),
        offsets=arrays["ann_start"],
        target_names=arrays["labels"].tolist(),
        feature_names=["lead_II"],
        sampling_rate=250.0,
        hop=0.004,
        hop_unit="s",
        DESCR=read_text("ecg.rst"),
    )

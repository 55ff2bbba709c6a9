"""Songs of a Bengalese finch with their syllables."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from sklearn.utils import Bunch

from sklearn_api._inputs.sequences import object_array
from sklearn_api.datasets._files import read_arrays, read_text


@overload
def load_birdsong(*, return_X_y: Literal[False] = False) -> Bunch: ...
@overload
def load_birdsong(*, return_X_y: Literal[True]) -> tuple[np.ndarray, np.ndarray]: ...
def load_birdsong(*, return_X_y: bool = False) -> Bunch | tuple[np.ndarray, np.ndarray]:
    """Load 20 songs of one Bengalese finch with annotated syllables.

    Parameters
    ----------
    return_X_y : bool
        Return ``(X, y)`` instead of a Bunch.

    Returns
    -------
    data : Bunch
        X : object array of shape (20,)
            Element i is a float32 array of shape (T_i, 12): power of each frequency band, in dB.
        y : object array of shape (20,)
            Element i is a string array of shape (T_i,): "silence" or the name of a syllable.
        groups : str array of shape (20,)
            Day of the recording.
        names : list of str
            Name of each recording in the repository.
        target_names, feature_names : list of str
            The labels; the names of the columns.
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
    D. Nicholson, J. E. Queen, S. J. Sober: Bengalese Finch song repository. figshare, 2017.

    Examples
    --------
    >>> from sklearn_api.datasets import load_birdsong
    >>> song = load_birdsong()
    >>> song.X[0].shape, song.y[0].shape
    ((3076, 12), (3076,))
    """
    arrays = read_arrays("bfsong_gy6or6_20songs_12band.npz")
    step, low = np.float32(arrays["db_step"]), np.float32(arrays["db_lo"])
    decibel = np.ascontiguousarray(arrays["X"].T).astype(np.float32) * step + low
    cuts = np.cumsum(arrays["lengths"])[:-1]
    X = object_array([part.copy() for part in np.split(decibel, cuts)])
    y = object_array([part.copy() for part in np.split(arrays["labels"][arrays["y"]], cuts)])
    if return_X_y:
        return X, y
    return Bunch(
        X=X,
        y=y,
        groups=arrays["day"],
        names=arrays["names"].tolist(),
        target_names=arrays["labels"].tolist(),
        feature_names=[f"band_{band}" for band in range(decibel.shape[1])],
        sampling_rate=250.0,
        hop=0.004,
        hop_unit="s",
        DESCR=read_text("birdsong.rst"),
    )

"""Preprocessing of ragged sequences with scikit-learn's transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted

from sklearn_api.sequences import Sequences, check_X

__all__ = ["PerPosition"]


class PerPosition(TransformerMixin, BaseEstimator, auto_wrap_output_keys=None):
    """Fit a transformer on the positions of all sequences and apply it to each sequence.

    Parameters
    ----------
    transformer : scikit-learn transformer
        It sees a 2-D array with one row per position, such as `StandardScaler` or `PCA`; it must
        keep the rows.

    Attributes
    ----------
    transformer_ : transformer
        The fitted copy.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only where X had column names.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_api.preprocessing import PerPosition
    >>> scaled = PerPosition(StandardScaler()).fit_transform([np.zeros((1, 1)), np.ones((1, 1))])
    >>> float(scaled[0][0, 0]), float(scaled[1][0, 0])
    (-1.0, 1.0)
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer

    def fit(self, X: Any, y: Any = None) -> PerPosition:
        """Fit a copy of the transformer on all positions.

        Parameters
        ----------
        X : sequences, in the forms that `SemiCRFSegmenter` takes
        y : ignored
            Labels are not passed on.

        Returns
        -------
        self
        """
        sequences = self._check(X, reset=True)
        self.transformer_ = clone(self.transformer).fit(np.concatenate(sequences.values))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Transform each sequence.

        Parameters
        ----------
        X : sequences

        Returns
        -------
        ndarray of shape (T, D'), or object array of such for many sequences
            DataFrames in place of arrays where `set_output` asks for them.
        """
        check_is_fitted(self)
        sequences = self._check(X, reset=False)
        stops = np.cumsum(sequences.lengths)
        rows = self.transformer_.transform(np.concatenate(sequences.values))
        if not hasattr(rows, "columns"):  # a DataFrame is kept
            rows = np.asarray(rows)
        if len(rows) != stops[-1]:
            raise ValueError(
                f"`transformer` must keep the {stops[-1]} positions; it returned {len(rows)} rows."
            )
        starts = stops - sequences.lengths
        parts = [_safe_indexing(rows, slice(a, b)) for a, b in zip(starts, stops, strict=True)]
        return sequences.layout.restore(parts)

    def set_output(self, *, transform: str | None = None) -> PerPosition:
        """Set the container of each transformed sequence.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"} or None, default=None
            Handed to `transformer`; None changes nothing.

        Returns
        -------
        self
        """
        for transformer in (self.transformer, getattr(self, "transformer_", None)):
            if transformer is not None:
                transformer.set_output(transform=transform)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the transformed features, as the transformer gives them."""
        check_is_fitted(self)
        if input_features is None:
            input_features = getattr(self, "feature_names_in_", None)
        return self.transformer_.get_feature_names_out(input_features)

    def _check(self, X: Any, reset: bool) -> Sequences:
        return check_X(self, X, dtype=[np.float64, np.float32], reset=reset)

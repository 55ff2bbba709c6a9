"""Preprocessing of ragged sequences by scikit-learn's transformers, and features of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.feature_extraction import DictVectorizer, FeatureHasher
from sklearn.utils import Tags, get_tags
from sklearn.utils.validation import check_is_fitted

from flash_semicrf.problem.validation import check_positive_int
from sklearn_api._inputs.containers import listed
from sklearn_api._inputs.sequences import Sequences, check_X, object_array
from sklearn_api._lbfgs.features import stack_rows
from sklearn_api._sklearn import safe_indexing as _safe_indexing

__all__ = ["PerPosition", "TokenFeatures"]


class _FitTransform:
    """``fit_transform`` that consumes an iterator once."""

    fit: Callable[..., Any]

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Fit to sequences, then transform them.

        Parameters
        ----------
        X : as for `fit`
        y : ignored

        Returns
        -------
        ndarray
            As returned by `transform`.
        """
        X = list(X) if isinstance(X, Iterator) else X
        transformed: np.ndarray = self.fit(X).transform(X)
        return transformed


class PerPosition(  # type: ignore[call-arg]  # scikit-learn's, which has no annotations
    _FitTransform, TransformerMixin, BaseEstimator, auto_wrap_output_keys=None
):
    """Transformer fitted to the positions of all sequences and applied to each sequence.

    Parameters
    ----------
    transformer : scikit-learn transformer
        Such as `StandardScaler` or `PCA`. It receives a 2-D array with one row per position, and
        must keep the rows. NaN is allowed if the transformer allows it, as `SimpleImputer` does.
        For sparse sequences it receives a CSR matrix, which `MaxAbsScaler` and `TruncatedSVD`
        accept, for example; sparse output stays sparse.

    Attributes
    ----------
    transformer_ : transformer
        The fitted copy.
    n_features_in_ : int
        Number of columns of the sequences.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only if X has column names.

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
            Labels are not passed to the transformer.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If `X` is invalid, and as raised by the transformer.
        """
        sequences = self._check(X, reset=True)
        self.transformer_ = clone(self.transformer).fit(stack_rows(sequences.values))
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Transform each sequence.

        Parameters
        ----------
        X : sequences, as for `fit`

        Returns
        -------
        ndarray or CSR matrix of shape (T, D'), or object array of those for many sequences
            DataFrames instead of arrays if `set_output` selects them.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If `X` is invalid, or the transformer changes the number of rows.
        """
        check_is_fitted(self)
        sequences = self._check(X, reset=False)
        stops = np.cumsum(sequences.lengths)
        rows = self.transformer_.transform(stack_rows(sequences.values))
        if sp.issparse(rows):
            rows = rows.tocsr()
        elif not hasattr(rows, "columns"):  # a DataFrame is kept
            rows = np.asarray(rows)
        if rows.shape[0] != stops[-1]:
            raise ValueError(
                f"`transformer` must keep the {stops[-1]} positions; it returned {rows.shape[0]} "
                "rows."
            )
        starts = stops - sequences.lengths
        parts = [_safe_indexing(rows, slice(a, b)) for a, b in zip(starts, stops, strict=True)]
        return sequences.layout.restore(parts)

    def set_output(self, *, transform: str | None = None) -> PerPosition:
        """Set the container of each transformed sequence.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"} or None, default=None
            Passed to `transformer`; None changes nothing.

        Returns
        -------
        self
        """
        for transformer in (self.transformer, getattr(self, "transformer_", None)):
            if transformer is not None:
                transformer.set_output(transform=transform)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the transformed features, as given by the transformer.

        Parameters
        ----------
        input_features : array-like of str or None, default=None
            Names of the input columns; None: `feature_names_in_`, if any.

        Returns
        -------
        str ndarray of shape (D',)

        Raises
        ------
        NotFittedError
            Before `fit`."""
        check_is_fitted(self)
        if input_features is None:
            input_features = getattr(self, "feature_names_in_", None)
        names: np.ndarray = self.transformer_.get_feature_names_out(input_features)
        return names

    def _check(self, X: Any, reset: bool) -> Sequences:
        # A transformer without support for sparse rows raises its own error.
        return check_X(
            self,
            X,
            dtype=[np.float64, np.float32],
            reset=reset,
            accept_sparse=True,
            allow_nan=get_tags(self.transformer).input_tags.allow_nan,
        )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.transformer).input_tags
        tags.input_tags.sparse, tags.input_tags.allow_nan = inner.sparse, inner.allow_nan
        return tags


class TokenFeatures(_FitTransform, TransformerMixin, BaseEstimator):
    """Transformer from the named features of tokens to sparse rows.

    A sequence is a list with one entry per token: a dict of name to value, as for sklearn-crfsuite
    (a string value v of the name n is the feature "n=v" with value 1; bools and numbers are values
    themselves), or an iterable of strings, each a feature with value 1.

    Parameters
    ----------
    n_features : int, default=None
        Number of columns into which names are hashed; nothing is fitted or stored. None: the names
        that occur in `fit` are the columns, and others are ignored.
    dtype : numpy dtype, default=numpy.float32
        Of the rows.

    Attributes
    ----------
    vectorizer_ : DictVectorizer or FeatureHasher

    Examples
    --------
    >>> from sklearn_api.preprocessing import TokenFeatures
    >>> tokens = [[{"word": "the"}, {"word": "cat", "is_noun": True}], [["word=the", "bias"]]]
    >>> features = TokenFeatures().fit(tokens)
    >>> features.get_feature_names_out().tolist()
    ['bias', 'is_noun', 'word=cat', 'word=the']
    >>> features.transform(tokens)[0].toarray()
    array([[0., 0., 0., 1.],
           [0., 1., 1., 0.]], dtype=float32)
    """

    def __init__(self, n_features: int | None = None, dtype: Any = np.float32) -> None:
        self.n_features = n_features
        self.dtype = dtype

    def fit(self, X: Any, y: Any = None) -> TokenFeatures:
        """Collect the names of the features.

        Parameters
        ----------
        X : list of sequences, each a list of the features of its tokens
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            If `X` or `n_features` is invalid; the message names the token.
        """
        if self.n_features is None:
            tokens, _ = _tokens(X)
            self.vectorizer_ = DictVectorizer(dtype=self.dtype).fit(tokens)
        else:
            n_features = check_positive_int("n_features", self.n_features)
            self.vectorizer_ = FeatureHasher(n_features, dtype=self.dtype)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Sparse matrix of each sequence.

        Parameters
        ----------
        X : as for `fit`

        Returns
        -------
        object array of CSR matrices of shape (T_i, n_features)

        Raises
        ------
        NotFittedError
            Before `fit`.
        TypeError, ValueError
            If `X` is invalid; the message names the token.
        """
        check_is_fitted(self)
        tokens, lengths = _tokens(X)
        rows = sp.csr_array(self.vectorizer_.transform(tokens))
        stops = np.cumsum(lengths)
        starts = np.r_[0, stops[:-1]]
        return object_array(rows[a:b] for a, b in zip(starts, stops, strict=True))

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns; "hash0", "hash1", ... if names are hashed.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        str ndarray of shape (n_features,)

        Raises
        ------
        NotFittedError
            Before `fit`."""
        check_is_fitted(self)
        if self.n_features is None:
            names: np.ndarray = self.vectorizer_.get_feature_names_out()
            return names
        return np.array([f"hash{i}" for i in range(self.n_features)], dtype=object)


def _tokens(X: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """Dicts of the features of all tokens, those of strings with the value 1; lengths."""
    tokens, lengths = [], []
    sequences = listed(X, "`X` must be a list of sequences of tokens")
    for i, sequence in enumerate(sequences):
        sequence = listed(sequence, f"Sequence {i} of `X` must be a list of tokens")
        if len(sequence) == 0:
            raise ValueError(f"Every sequence of `X` must have a token; sequence {i} has none.")
        for t, token in enumerate(sequence):
            if isinstance(token, str) or not isinstance(token, Iterable):
                shown = f"the string {token!r}" if isinstance(token, str) else repr(token)
                raise TypeError(
                    "A token must be a dict or an iterable of feature names; got "
                    f"{shown} at position {t} of sequence {i}."
                )
            tokens.append(token if isinstance(token, dict) else dict.fromkeys(token, 1.0))
        lengths.append(len(sequence))
    if not tokens:
        raise ValueError("`X` must hold at least 1 sequence; got 0 sequences.")
    return tokens, lengths

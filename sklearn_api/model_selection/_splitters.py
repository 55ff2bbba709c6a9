"""Splitters that keep sequences whole.

Many sequences are split by sequence. The rows of a 2-D X are one sequence, which is split into
contiguous blocks, or with `groups` one sequence per id, each kept whole. Indices always refer to
`X`: to its sequences, or to its rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from sklearn import get_config
from sklearn.model_selection import BaseCrossValidator, GroupKFold, KFold, StratifiedKFold

from sklearn_api._inputs.layouts import read_layout
from sklearn_api._inputs.sequences import Layout
from sklearn_api._inputs.targets import check_y

__all__ = ["SequenceGroupKFold", "SequenceKFold", "SequenceStratifiedKFold"]

Folds: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray]]
"""Indices of training and test set, fold by fold."""


class _SequenceSplitter(BaseCrossValidator):
    """Base class that splits sequences, and converts the result to rows of a 2-D X."""

    # With metadata routing, `groups` are passed to the splitter by default.
    __metadata_request__split = {"groups": True}

    def __init__(self, n_splits: int) -> None:
        _check_integer("n_splits", n_splits, 2)
        self.n_splits = n_splits

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Number of folds.

        Parameters
        ----------
        X, y, groups : ignored

        Returns
        -------
        int
        """
        return self.n_splits

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Folds:
        """Generate indices to split data into training and test set.

        Parameters
        ----------
        X : sequences, in the forms that `SemiCRFSegmenter` takes
        y : labels or segments, nested as X
        groups : array-like, optional
            For 2-D X: the sequence of each row. For many sequences: the group of each sequence.

        Yields
        ------
        train, test : int64 ndarrays
            Sorted indices of sequences for many, of rows for 2-D X.

        Raises
        ------
        ValueError
            If `y` or `groups` is invalid or missing, or there are too few sequences or rows. Also
            for `groups` of rows that scikit-learn passes without metadata routing: the estimator
            would not receive them, and would treat the rows of several sequences as one sequence.
        """
        by_row = read_layout(X).kind == "single"
        if by_row and groups is not None and _called_by_scikit_learn():
            raise ValueError(
                "`groups` of the rows of a 2-D `X` reach only the splitter: the estimator would "
                "take the rows of several sequences for one. Pass `as_sequences(X, groups)` and "
                "`as_sequences(y, groups)`, or enable metadata routing (see the guide on "
                "pipelines)."
            )
        return self._split(X, y, groups, by_row)

    def _split(self, X: Any, y: Any, groups: Any, by_row: bool) -> Folds:
        layout = read_layout(X, groups if by_row else None)
        if layout.kind == "single":
            yield from self._split_rows(int(layout.lengths[0]))
            return
        if len(layout.lengths) < self.n_splits:
            raise ValueError(
                f"`n_splits` must be at most the number of sequences, {len(layout.lengths)}; got "
                f"{self.n_splits}."
            )
        owner = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
        for train, test in self._split_sequences(layout, y, groups):
            train, test = np.sort(train), np.sort(test)
            if by_row:
                train = np.flatnonzero(np.isin(owner, train))
                test = np.flatnonzero(np.isin(owner, test))
            yield train, test

    def _split_rows(self, num_rows: int) -> Folds:
        raise ValueError(
            f"{type(self).__name__} splits whole sequences, and a 2-D `X` without `groups` is one; "
            "pass a list of sequences or `groups`, or use SequenceKFold."
        )

    def _split_sequences(self, layout: Layout, y: Any, groups: Any) -> Folds:
        raise NotImplementedError


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}; got {value!r}.")


def _called_by_scikit_learn() -> bool:
    """Whether a cross-validation or search of scikit-learn called `split`, without routing.

    Only the calling module distinguishes its call from that of a user, who may pass the groups to
    the estimator as well.
    """
    frame = inspect.currentframe()  # this function, called by `split`, called by whom
    for _ in range(2):
        frame = None if frame is None else frame.f_back
    caller = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return caller.partition(".")[0] == "sklearn" and not get_config()["enable_metadata_routing"]


class SequenceKFold(_SequenceSplitter):
    """K folds of whole sequences, or of contiguous blocks of one sequence.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, >= 2.
    shuffle : bool, default=False
        Shuffle the sequences first. The blocks of a single sequence are not shuffled.
    random_state : int, RandomState instance or None, default=None
        Seed of the shuffle.
    gap : int, default=0
        For a 2-D X without groups: number of rows excluded from the training set on either side of
        the test block, so that features or labels that span its border do not leak. The longest
        segment plus the range of the features is about enough.

    Raises
    ------
    ValueError
        If a parameter is invalid.

    Notes
    -----
    The training rows of an inner block are two pieces, before and after it. If an estimator treats
    them as one sequence, each fold has one artificial border; `cross_val_predict` of this module
    fits the pieces separately instead.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api.model_selection import SequenceKFold
    >>> for train, test in SequenceKFold(3, gap=1).split(np.zeros((9, 2))):
    ...     print(train, test)
    [4 5 6 7 8] [0 1 2]
    [0 1 7 8] [3 4 5]
    [0 1 2 3 4] [6 7 8]
    """

    def __init__(
        self, n_splits: int = 5, *, shuffle: bool = False, random_state: Any = None, gap: int = 0
    ) -> None:
        super().__init__(n_splits)
        _check_integer("gap", gap, 0)
        self.shuffle = shuffle
        self.random_state = random_state
        self.gap = gap
        KFold(n_splits, shuffle=shuffle, random_state=random_state)  # checks the two

    def _split_rows(self, num_rows: int) -> Folds:
        if num_rows < self.n_splits:
            raise ValueError(
                f"`n_splits` must be at most the number of rows, {num_rows}; got {self.n_splits}."
            )
        rows = np.arange(num_rows)
        for test in np.array_split(rows, self.n_splits):
            train = rows[(rows < test[0] - self.gap) | (rows > test[-1] + self.gap)]
            if len(train) == 0:
                raise ValueError(
                    f"`gap` must leave training rows in every fold; got {self.gap} with {num_rows} "
                    f"rows, of which {test[0]}..{test[-1]} are tested."
                )
            yield train, test

    def _split_sequences(self, layout: Layout, y: Any, groups: Any) -> Folds:
        folds = KFold(self.n_splits, shuffle=self.shuffle, random_state=self.random_state)
        yield from folds.split(layout.lengths)


class SequenceStratifiedKFold(_SequenceSplitter):
    """K folds of whole sequences with about the same shares of majority labels.

    The majority label of a sequence is the one that covers most of its positions.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, >= 2.
    shuffle : bool, default=False
        Shuffle the sequences of each majority label first.
    random_state : int, RandomState instance or None, default=None
        Seed of the shuffle.
    ignore_label : str, number or None, default=None
        Background that counts only in sequences without other labels.

    Raises
    ------
    ValueError
        If a parameter is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api.model_selection import SequenceStratifiedKFold
    >>> X = [np.zeros((5, 1))] * 4
    >>> y = [np.array(list(text)) for text in ("aaaab", "aaabb", "abbbb", "bbbbb")]
    >>> for train, test in SequenceStratifiedKFold(2).split(X, y):
    ...     print(train, test)
    [1 3] [0 2]
    [0 2] [1 3]
    """

    def __init__(
        self,
        n_splits: int = 5,
        *,
        shuffle: bool = False,
        random_state: Any = None,
        ignore_label: Any = None,
    ) -> None:
        super().__init__(n_splits)
        self.shuffle = shuffle
        self.random_state = random_state
        self.ignore_label = ignore_label
        StratifiedKFold(n_splits, shuffle=shuffle, random_state=random_state)  # checks the two

    def _split_sequences(self, layout: Layout, y: Any, groups: Any) -> Folds:
        folds = StratifiedKFold(self.n_splits, shuffle=self.shuffle, random_state=self.random_state)
        yield from folds.split(layout.lengths, _majority(y, layout, self.ignore_label))


class SequenceGroupKFold(_SequenceSplitter):
    """K folds of whole groups of sequences, such as all recordings of one patient.

    Folds are balanced by their number of positions. `groups` of `split` must be given: the group of
    each sequence; for 2-D X that of each row, where one group is one sequence.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, >= 2.

    Raises
    ------
    ValueError
        If `n_splits` is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api.model_selection import SequenceGroupKFold
    >>> X = [np.zeros((n, 1)) for n in (9, 2, 3, 4)]
    >>> for train, test in SequenceGroupKFold(2).split(X, groups=["a", "b", "b", "c"]):
    ...     print(train, test)
    [1 2 3] [0]
    [0] [1 2 3]
    """

    def __init__(self, n_splits: int = 5) -> None:
        super().__init__(n_splits)

    def _split(self, X: Any, y: Any, groups: Any, by_row: bool) -> Folds:
        if groups is None:
            raise ValueError("`groups` must be given: one group per sequence; got None.")
        return super()._split(X, y, groups, by_row)

    def _split_sequences(self, layout: Layout, y: Any, groups: Any) -> Folds:
        groups = np.asarray(groups)
        if layout.kind == "groups":
            groups = np.arange(len(layout.lengths))
        elif groups.shape != layout.lengths.shape:
            raise ValueError(
                f"`groups` must have one entry per sequence, {len(layout.lengths)}; got shape "
                f"{groups.shape}."
            )
        owner = np.repeat(np.arange(len(groups)), layout.lengths)
        # Split positions, not sequences: that balances their number.
        for train, test in GroupKFold(self.n_splits).split(owner, groups=groups[owner]):
            yield np.unique(owner[train]), np.unique(owner[test])


def _majority(y: Any, layout: Layout, ignore_label: Any) -> np.ndarray:
    """Label of most positions of each sequence; of equals, the first in sorted order."""
    gold = check_y(y, layout)
    names, label = np.unique(gold.labels, return_inverse=True)
    share = np.zeros((len(layout.lengths), len(names)), dtype=np.int64)
    np.add.at(share, (gold.sequence, label), gold.stop - gold.start)
    if ignore_label is not None:
        with_others = share[:, names != ignore_label].any(1)
        share[np.ix_(with_others, names == ignore_label)] = 0
    majority: np.ndarray = names[share.argmax(1)]
    return majority

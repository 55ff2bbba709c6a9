"""Precision, recall and F1 of chunks given as BIO tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flash_semicrf.problem.segments import bio_to_segments
from sklearn_api.metrics._segments import PrecisionRecallF1, segment_precision_recall_f1


def chunk_precision_recall_f1(
    y_true: Sequence[Sequence[str]], y_pred: Sequence[Sequence[str]], **kwargs: Any
) -> PrecisionRecallF1:
    """Precision, recall and F1 of BIO-tagged chunks.

    A chunk is correct if its type, first and last position are. An "I-x" that continues no x opens
    a chunk, as in the CoNLL scorer.

    Parameters
    ----------
    y_true, y_pred : sequences of BIO tags
        One sequence of tags per sentence.
    **kwargs
        Options of `segment_precision_recall_f1`, such as ``average=None`` for a score per type.

    Returns
    -------
    PrecisionRecallF1

    Raises
    ------
    ValueError
        If a tag is neither "O" nor "B-..." nor "I-...", or the sentences do not match.

    References
    ----------
    E. F. Tjong Kim Sang and S. Buchholz: Introduction to the CoNLL-2000 shared task: chunking.
    CoNLL, 127-132, 2000.

    Examples
    --------
    >>> from sklearn_api.metrics import chunk_precision_recall_f1
    >>> y_true = [["B-NP", "I-NP", "B-VP", "O"]]
    >>> y_pred = [["B-NP", "B-NP", "B-VP", "O"]]
    >>> chunk_precision_recall_f1(y_true, y_pred).recall
    0.5
    """
    for i, (true, pred) in enumerate(zip(y_true, y_pred, strict=False)):
        if len(true) != len(pred):
            raise ValueError(
                f"`y_true` and `y_pred` must have the same length; got {len(true)} and {len(pred)} "
                f"tags in sequence {i}."
            )
    segments = _segments(y_true, "y_true"), _segments(y_pred, "y_pred")
    return segment_precision_recall_f1(*segments, ignore_label="O", **kwargs)


def _segments(y: Sequence[Sequence[str]], name: str) -> list[list[tuple[int, int, str]]]:
    """Segments of each sentence's tags."""
    found = []
    for i, tags in enumerate(y):
        try:
            found.append(bio_to_segments(tags))
        except ValueError as error:
            raise ValueError(f"Sequence {i} of `{name}`: {error}") from error
    return found

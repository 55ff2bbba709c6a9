"""Scores and errors of segmentations.

Every metric takes ``(y_true, y_pred)``, each in any of these forms:

- labels of one sequence: a 1-D array or list of strings or numbers, one per position;
- labels of many sequences: a list or 1-D object array of those, or a 2-D array with one sequence
  per row;
- segments of one sequence: a list of ``(start, end, label)`` **tuples**, half-open, in positions,
  or of `flash_semicrf.problem.segments.Segment` (whose end is inclusive), as returned by
  ``predict_segments``;
- segments of many sequences: a list of such lists, in which a segment may also be a list, as in
  JSON, or a row of an array. (For one sequence alone, a list of three numbers is three labels.)

Labels per position cannot represent two adjacent segments of one label; pass segments where they
occur. Unless stated otherwise, a metric pools the counts of all sequences before it divides.
"""

from sklearn_api.metrics._boundaries import boundary_errors, boundary_precision_recall_f1
from sklearn_api.metrics._chunks import chunk_precision_recall_f1
from sklearn_api.metrics._errors import covering, frame_error_rate, segment_error_rate
from sklearn_api.metrics._position_scorers import log_likelihood_scorer, make_position_scorer
from sklearn_api.metrics._scorers import make_segment_scorer
from sklearn_api.metrics._segments import PrecisionRecallF1, segment_precision_recall_f1

__all__ = [
    "PrecisionRecallF1",
    "boundary_errors",
    "boundary_precision_recall_f1",
    "chunk_precision_recall_f1",
    "covering",
    "frame_error_rate",
    "log_likelihood_scorer",
    "make_position_scorer",
    "make_segment_scorer",
    "segment_error_rate",
    "segment_precision_recall_f1",
]

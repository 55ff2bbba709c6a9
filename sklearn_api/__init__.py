"""scikit-learn estimators, metrics, displays and data sets for segmentation."""

from __future__ import annotations

from sklearn_api._inputs.nested import as_sequences
from sklearn_api._persistence import InconsistentVersionWarning
from sklearn_api._responses import get_response
from sklearn_api._training.net import StopTraining
from sklearn_api.segmenter import SemiCRFSegmenter

__all__ = [
    "InconsistentVersionWarning",
    "SemiCRFSegmenter",
    "StopTraining",
    "as_sequences",
    "get_response",
]

"""scikit-learn estimators, metrics, displays and data sets for segmentation."""

from __future__ import annotations

from sklearn_api._inputs.nested import as_sequences
from sklearn_api.segmenter import SemiCRFSegmenter

__all__ = ["SemiCRFSegmenter", "as_sequences"]

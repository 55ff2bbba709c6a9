"""Cross-validation of models of sequences.

Splitters that keep sequences whole, and `cross_val_predict` for ragged outputs. Searches and
`cross_val_score` of scikit-learn accept the splitters as ``cv=``, and scorers from
`sklearn_api.metrics` as ``scoring=``.
"""

from sklearn_api.model_selection._prediction import cross_val_predict
from sklearn_api.model_selection._splitters import (
    SequenceGroupKFold,
    SequenceKFold,
    SequenceStratifiedKFold,
)

__all__ = [
    "SequenceGroupKFold",
    "SequenceKFold",
    "SequenceStratifiedKFold",
    "cross_val_predict",
]

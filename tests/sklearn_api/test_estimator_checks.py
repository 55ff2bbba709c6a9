"""scikit-learn's conformance suite: 2-D X is one sequence, whose positions depend on each other."""

from __future__ import annotations

import pytest
from sklearn.utils import estimator_checks as checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_api import SemiCRFSegmenter

_DEPENDENT = "positions of a sequence depend on each other: "

EXPECTED_FAILURES = {
    "check_methods_sample_order_invariance": _DEPENDENT + "their order is what the model is about",
    "check_methods_subset_invariance": _DEPENDENT + "a part of a sequence is another sequence",
    "check_sample_weight_equivalence_on_dense_data": _DEPENDENT
    + "a row repeated or left out makes another sequence",
    "check_sample_weight_equivalence_on_sparse_data": _DEPENDENT
    + "a row repeated or left out makes another sequence",
    "check_class_weight_classifiers": "a sequence has one likelihood, so one weight: the mean of "
    "its positions' class weights: within a sequence they do not favour a label",
}


@parametrize_with_checks(
    [SemiCRFSegmenter(max_epochs=15, learning_rate=0.1)],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
)
def test_estimator_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("encoder", ["cnn", "gru"])
def test_estimator_checks_of_other_encoders(encoder):
    """The checks that an encoder could break; the others see only the wrapper."""
    estimator = SemiCRFSegmenter(encoder, hidden_size=8, num_layers=1, max_epochs=2)
    for check in (
        checks.check_fit_idempotent,
        checks.check_dict_unchanged,
        checks.check_estimators_pickle,
        checks.check_fit2d_1feature,
        checks.check_fit2d_1sample,
    ):
        check(type(estimator).__name__, estimator)

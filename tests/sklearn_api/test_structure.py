"""The estimator is one class, and scikit-learn's private names are imported in one module."""

from __future__ import annotations

import re
from pathlib import Path

from sklearn.base import BaseEstimator, ClassifierMixin

import sklearn_api
from sklearn_api import SemiCRFSegmenter

PACKAGE = Path(sklearn_api.__file__).parent
PRIVATE = re.compile(r"^\s*from sklearn(?:\.\w+)*?(?:\._| import .*\b_)", re.MULTILINE)


def test_every_public_name_of_the_estimator_is_defined_in_its_class():
    assert SemiCRFSegmenter.__bases__ == (ClassifierMixin, BaseEstimator)
    generated = re.compile("set_.*_request|get_metadata_routing")
    public = {name for name in dir(SemiCRFSegmenter) if not name.startswith("_")}
    inherited = public - set(vars(SemiCRFSegmenter))
    assert all(generated.fullmatch(name) for name in inherited)


def test_private_names_of_scikit_learn_are_imported_in_one_module():
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert importers == {"_sklearn.py"}

"""HTML in notebooks, names of features, containers of transformed sequences."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_api import SemiCRFSegmenter
from sklearn_api.encoders import CNNEncoder
from sklearn_api.preprocessing import PerPosition

X = [np.arange(2.0 * n).reshape(n, 2) for n in (4, 4, 6)]
Y = [np.array([0, 0, 1, 1, 1, 0])[: len(x)] for x in X]


@pytest.mark.parametrize("encoder", ["cnn", CNNEncoder, nn.Linear(2, 3)], ids=["name", "class", ""])
def test_html_shows_the_parameters(encoder):
    html = SemiCRFSegmenter(encoder, module__width=17, max_duration=23)._repr_html_()
    for text in (
        "SemiCRFSegmenter",
        "max_duration",
        "23",
        "duration_distribution",
        "module__width",
    ):
        assert text in html
    shown = {"name": "cnn", "class": "CNNEncoder", "": "Linear(in_features=2, out_features=3"}
    name = "name" if encoder == "cnn" else "class" if encoder is CNNEncoder else ""
    assert shown[name] in html
    # scikit-learn has no page on a class of ours to link to.
    assert "https://scikit-learn.org/" not in html


def test_html_of_a_pipeline_nests_and_tells_fitted_from_not():
    pipeline = make_pipeline(PerPosition(StandardScaler()), SemiCRFSegmenter(max_epochs=1))
    before = pipeline._repr_html_()
    assert all(name in before for name in ("PerPosition", "StandardScaler", "SemiCRFSegmenter"))
    assert "Not fitted" in before
    after = pipeline.fit(X, Y)._repr_html_()
    assert "Not fitted" not in after
    # The module of a fitted model stays out: tensors have no place in a notebook's diagram.
    assert "tensor(" not in after


def test_feature_names_pass_through_pipelines():
    pipeline = make_pipeline(PerPosition(StandardScaler()), PerPosition(StandardScaler())).fit(X)
    assert pipeline.get_feature_names_out(["u", "v"]).tolist() == ["u", "v"]
    assert pipeline.get_feature_names_out().tolist() == ["x0", "x1"]
    reduced = make_pipeline(PerPosition(StandardScaler()), PerPosition(PCA(1))).fit(X)
    assert reduced.get_feature_names_out().tolist() == ["pca0"]


def test_default_output_is_kept_for_many_sequences():
    pipeline = make_pipeline(PerPosition(StandardScaler()), PerPosition(PCA(1)))
    expected = pipeline.fit(X).transform(X)
    found = pipeline.set_output(transform="default").transform(X)
    assert found.shape == (3,)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None, reason="pandas is optional (in the test extra)"
)
@pytest.mark.parametrize("globally", [False, True])
def test_every_sequence_becomes_a_frame(globally):
    transformer = PerPosition(StandardScaler())
    if not globally:
        transformer = clone(transformer.set_output(transform="pandas"))
    expected = PerPosition(StandardScaler()).fit_transform(X)
    with config_context(transform_output="pandas" if globally else "default"):
        frames = transformer.fit(X).transform(X)
        model = make_pipeline(transformer, SemiCRFSegmenter(max_epochs=1, random_state=0))
        model.fit(X, Y)
        single = transformer.transform(X[0])
    assert frames.shape == (3,)
    for frame, values in zip(frames, expected, strict=True):
        assert list(frame.columns) == ["x0", "x1"]
        np.testing.assert_array_equal(frame.to_numpy(), values)
    assert list(single.columns) == ["x0", "x1"]
    assert model[-1].feature_names_in_.tolist() == ["x0", "x1"]

"""Data sets inside the package, and the synthetic one."""

from __future__ import annotations

import doctest
import importlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils import Bunch

import sklearn_api.datasets
from sklearn_api.datasets import load_birdsong, load_ecg, load_gene_structure, make_segmentations
from sklearn_api.datasets._gene_structure import _one_hot

LOADERS = [load_ecg, load_birdsong, load_gene_structure]


@pytest.fixture(scope="module")
def bunches() -> dict[str, Bunch]:
    return {loader.__name__: loader() for loader in LOADERS}


def runs(labels: np.ndarray) -> list[tuple[int, int, str]]:
    cuts = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    edges = [0, *cuts.tolist(), len(labels)]
    return [(a, b, str(labels[a])) for a, b in pairwise(edges)]


def test_all_is_pinned():
    assert sklearn_api.datasets.__all__ == [
        "load_birdsong",
        "load_chunks",
        "load_ecg",
        "load_gene_structure",
        "make_segmentations",
    ]


@pytest.mark.parametrize("name", ["_birdsong", "_chunks", "_ecg", "_gene_structure", "_synthetic"])
def test_docstring_examples_run(name):
    module = importlib.import_module(f"sklearn_api.datasets.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("loader", LOADERS)
def test_loader_form(loader, bunches):
    data = bunches[loader.__name__]
    n = len(data.X)
    for packed in (data.X, data.y):
        assert packed.dtype == object
        assert packed.shape == (n,)
    assert len(data.groups) == n
    n_features = len(data.feature_names)
    for X, y in zip(data.X, data.y, strict=True):
        assert X.dtype == np.float32
        assert X.shape == (len(y), n_features)
        assert np.isfinite(X).all()
        assert X.flags.c_contiguous
        assert y.ndim == 1
        assert y.dtype.kind == "U"
    assert {str(label) for y in data.y for label in np.unique(y)} == set(data.target_names)


@pytest.mark.parametrize("loader", LOADERS)
def test_loader_return_X_y(loader, bunches):
    X, y = loader(return_X_y=True)
    data = bunches[loader.__name__]
    for ours, theirs in [(X, data.X), (y, data.y)]:
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_loader_hands_out_fresh_arrays(loader, bunches):
    X, _ = loader(return_X_y=True)
    X[0][:] = -1
    again, _ = loader(return_X_y=True)
    assert np.array_equal(again[0], bunches[loader.__name__].X[0])


@pytest.mark.parametrize(
    ("loader", "licence", "citation"),
    [
        (load_ecg, "Open Data Commons Attribution License", "10.13026/eegm-h675"),
        (load_birdsong, "CC BY 4.0", "figshare.4805749"),
        (load_gene_structure, "CC0 1.0", "WormBase"),
    ],
)
def test_descr_names_licence_and_citation(loader, licence, citation, bunches):
    text = bunches[loader.__name__].DESCR
    assert licence in text
    assert citation in text
    total = sum(len(y) for y in bunches[loader.__name__].y)
    assert f"{total:,}" in text


@pytest.mark.parametrize("name", ["LUDB", "BFSONG", "CELEGANS"])
def test_licence_files_are_in_the_package(name):
    text = sklearn_api.datasets._files.read_text(f"{name}-LICENSE.txt")
    assert "creativecommons.org" in text or "Open Data Commons" in text


def test_ecg_facts(bunches):
    ecg = bunches["load_ecg"]
    assert len(ecg.X) == 200
    assert ecg.target_names == ["none", "P", "QRS", "T"]
    assert ecg.sampling_rate * ecg.hop == 1
    assert ecg.groups.tolist() == list(range(200))
    # Millivolt: a QRS complex is about one, the largest voltage below three.
    peaks = [float(np.abs(X).max()) for X in ecg.X]
    assert 0.2 < np.median(peaks) < 1.5
    assert max(peaks) < 3


def test_ecg_is_cropped_to_the_annotated_part(bunches):
    ecg = bunches["load_ecg"]
    assert all(y[0] != "none" and y[-1] != "none" for y in ecg.y)
    arrays = sklearn_api.datasets._files.read_arrays("ludb_leadII_250hz.npz")
    i, start = 7, ecg.offsets[7]
    raw = arrays["X"][i, start : start + len(ecg.X[i])]
    np.testing.assert_allclose(ecg.X[i][:, 0], raw / 1000, rtol=1e-6)


def test_ecg_waves_follow_physiology(bunches):
    ecg = bunches["load_ecg"]
    seconds = {
        label: np.median([b - a for y in ecg.y for a, b, name in runs(y) if name == label])
        * ecg.hop
        for label in ("P", "QRS", "T")
    }
    assert 0.06 < seconds["QRS"] < 0.12
    assert 0.08 < seconds["P"] < 0.14
    assert 0.14 < seconds["T"] < 0.24


def test_birdsong_facts(bunches):
    song = bunches["load_birdsong"]
    assert [len(song.groups), len(song.names), len(song.target_names)] == [20, 20, 14]
    days, counts = np.unique(song.groups, return_counts=True)
    assert days.tolist() == ["032312", "032412"]
    assert counts.tolist() == [10, 10]
    # Syllables are louder than the silence between them.
    X, y = np.concatenate(song.X), np.concatenate(song.y)
    assert X[y != "silence"].mean() > X[y == "silence"].mean() + 5
    assert 40 < X.min() < X.max() < 120


def test_gene_structure_facts(bunches):
    genes = bunches["load_gene_structure"]
    assert genes.groups.tolist() == ["I", "II", "III", "IV", "V", "X"]
    assert genes.sampling_rate is None
    for X in genes.X:
        assert set(np.unique(X)) == {0.0, 1.0}
        assert np.array_equal(X.sum(axis=1), np.ones(len(X)))
    # C. elegans has 35 to 36 % G and C.
    gc = np.concatenate(genes.X)[:, 1:3].sum(axis=1).mean()
    assert 0.33 < gc < 0.39


def test_gene_structure_segments_are_the_labels(bunches):
    genes = bunches["load_gene_structure"]
    for y, segments in zip(genes.y, genes.segments, strict=True):
        assert runs(y) == segments


def test_gene_structure_introns_have_splice_sites(bunches):
    # Packing order, strand and half-open ends are right only if introns read GT...AG.
    genes = bunches["load_gene_structure"]
    bases = np.array(list("ACGT"))
    found = {"intron+": [], "intron-": []}
    for X, segments in zip(genes.X, genes.segments, strict=True):
        text = "".join(bases[X.argmax(axis=1)])
        for start, end, label in segments:
            if label in found:
                found[label].append((text[start : start + 2], text[end - 2 : end]))
    assert np.mean([ends == ("GT", "AG") for ends in found["intron+"]]) > 0.97
    assert np.mean([ends == ("CT", "AC") for ends in found["intron-"]]) > 0.97


def test_one_hot_unpacks_low_bits_first():
    # 0b11_10_01_00 holds A C G T; the second byte holds T and three unused places.
    rows = _one_hot(np.array([0b11100100, 0b11], dtype=np.uint8), 5)
    assert rows.argmax(axis=1).tolist() == [0, 1, 2, 3, 3]


@given(
    n_sequences=st.integers(1, 4),
    low=st.integers(1, 30),
    extra=st.integers(0, 30),
    n_labels=st.integers(1, 5),
    n_features=st.integers(1, 3),
    max_duration=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_make_segmentations_form(n_sequences, low, extra, n_labels, n_features, max_duration, seed):
    X, y = make_segmentations(
        n_sequences,
        (low, low + extra),
        n_labels=n_labels,
        n_features=n_features,
        max_duration=max_duration,
        random_state=seed,
    )
    assert X.shape == y.shape == (n_sequences,)
    assert X.dtype == y.dtype == object
    for features, labels in zip(X, y, strict=True):
        assert low <= len(labels) <= low + extra
        assert features.shape == (len(labels), n_features)
        assert features.dtype == np.float32
        assert labels.dtype == np.int64
        assert labels.min() >= 0
        assert labels.max() < n_labels
        if n_labels > 1:
            assert max(b - a for a, b, _ in runs(labels)) <= max_duration


def test_make_segmentations_is_reproducible():
    one, two = (make_segmentations(3, random_state=4) for _ in range(2))
    other = make_segmentations(3, random_state=5)
    assert all(np.array_equal(a, b) for a, b in zip(one[0], two[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(one[1], two[1], strict=True))
    assert not np.array_equal(one[0][0], other[0][0])
    assert [len(labels) for labels in one[1]] == [200, 200, 200]


def test_make_segmentations_labels_differ_in_centre_and_duration():
    X, y = make_segmentations(
        40, 500, n_labels=3, max_duration=80, class_sep=5.0, noise=0.5, random_state=0
    )
    features, labels = np.concatenate(X), np.concatenate(y)
    centres = np.stack([features[labels == c].mean(axis=0) for c in range(3)])
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    assert distances[np.triu_indices(3, 1)].min() > 1
    assert abs((features - centres[labels]).std() - 0.5) < 0.02
    means = [
        np.mean([b - a for row in y for a, b, name in runs(row)[:-1] if name == str(c)])
        for c in range(3)
    ]
    np.testing.assert_allclose(means, [10, 25, 40], rtol=0.05)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_sequences": 0}, r"`n_sequences` must be an integer >= 1; got 0\."),
        ({"n_labels": 2.0}, r"`n_labels` must be an integer >= 1; got 2\.0\."),
        ({"n_features": True}, r"`n_features` must be an integer >= 1; got True\."),
        ({"max_duration": -3}, r"`max_duration` must be an integer >= 1; got -3\."),
        ({"n_positions": 0}, r"`n_positions` must be an integer >= 1; got 0\."),
        ({"n_positions": (5, 0)}, r"`n_positions\[1\]` must be an integer >= 1; got 0\."),
        ({"n_positions": (9, 5)}, r"pair \(smallest, largest\) in this order; got \(9, 5\)\."),
        ({"n_positions": (1, 2, 3)}, r"an integer or a pair .*; got \(1, 2, 3\)\."),
        ({"class_sep": -1}, r"`class_sep` must be a finite number >= 0; got -1\."),
        ({"noise": float("nan")}, r"`noise` must be a finite number >= 0; got nan\."),
        ({"noise": "much"}, r"`noise` must be a finite number >= 0; got 'much'\."),
    ],
)
def test_make_segmentations_refuses(parameters, message):
    with pytest.raises(ValueError, match=message):
        make_segmentations(**parameters)

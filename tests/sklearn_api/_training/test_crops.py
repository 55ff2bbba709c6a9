"""Crops: their likelihood against enumeration, what they cover, and training on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flash_semicrf.problem.potentials import score_segments
from flash_semicrf.problem.segments import SegmentTable
from flash_semicrf.testing import assert_close, enumerate_segmentations
from sklearn_api import SemiCRFSegmenter
from sklearn_api._model.windows import encoder_context
from sklearn_api._training.crops import Crop, CroppedDataset, CropSampler
from sklearn_api._training.data import SequenceDataset, bucketed_loader


def fitted_model(encoder="linear", **params):
    """A barely trained model of two labels with durations up to 4, in float64."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 0, 1, 0, 1], [3, 4, 1, 2, 4, 3])
    X = y[:, None] + rng.normal(size=(len(y), 2))
    return SemiCRFSegmenter(
        encoder,
        hidden_size=4,
        num_layers=1,
        kernel_size=3,
        max_epochs=2,
        boundary_scores=True,
        dtype="float64",
        random_state=0,
        **params,
    ).fit(X, y)


def table_of(rows):
    return SegmentTable(torch.zeros(len(rows), dtype=torch.long), *torch.tensor(rows).unbind(1))


def loss_of_crop(segmenter, x, rows, start, stop, crop_length=4):
    """What the net's loss says of one crop, in nats."""
    dataset = SequenceDataset([x], table_of(rows))
    context = encoder_context(segmenter.module_.encoder)
    cropped = CroppedDataset(dataset, crop_length, context)
    inputs, columns = cropped.collate([cropped[Crop(0, start, stop)]])
    hidden = segmenter.module_(**inputs)
    loss = segmenter.net_.get_loss(hidden, columns, inputs) * inputs["lengths"].sum()
    return loss, inputs


def held(rows, start, stop, length):
    """What the likelihood of a crop takes as given, of a segmentation of the whole."""
    first = next(row for row in rows if row[0] <= start < row[1])
    last = next(row for row in rows if row[0] <= stop - 1 < row[1])
    begin = 0 if start == 0 else first[0]
    end = length if stop == length else last[1]
    outside = [row for row in rows if row[1] <= begin or row[0] >= end]
    return (
        outside,
        None if start == 0 else (first[0], first[2]),
        None if stop == length else (last[1], last[2]),
    )


@pytest.mark.parametrize("encoder", ["linear", "cnn"])
@pytest.mark.parametrize("cut", [(0, 4), (3, 7), (2, 5), (4, 9), (5, 6), (7, 8)])
def test_crop_loss_is_the_conditional_likelihood(encoder, cut):
    """By enumeration: among all segmentations of the whole that share what is given."""
    segmenter = fitted_model(encoder)
    module, length = segmenter.module_, 9
    x = np.random.default_rng(1).normal(size=(length, 2))
    gold = [(0, 2, 1), (2, 5, 0), (5, 6, 1), (6, 9, 0)]
    with torch.no_grad():
        loss, _ = loss_of_crop(segmenter, x, gold, *cut)
        lengths = torch.tensor([length])
        problem, _ = module.head.potentials(module(torch.from_numpy(x)[None], lengths), lengths)
        same = [
            rows
            for rows in enumerate_segmentations(length, 4, 2)
            if held(rows, *cut, length) == held(gold, *cut, length)
        ]
        scores = torch.cat([score_segments(problem, table_of(rows)) for rows in same])
        expected = torch.logsumexp(scores, 0) - score_segments(problem, table_of(gold))[0]
    assert len(same) > 1 or cut[1] - cut[0] == 1
    assert_close(loss, expected)


def test_crop_of_a_whole_sequence_is_its_likelihood():
    segmenter = fitted_model()
    x = np.random.default_rng(1).normal(size=(9, 2))
    rows = [(0, 2, 1), (2, 5, 0), (5, 6, 1), (6, 9, 0)]
    loss, inputs = loss_of_crop(segmenter, x, rows, 0, 9)
    assert inputs["crop"].tolist() == [[0, 0, 0, 0]]
    assert float(loss.detach()) == pytest.approx(-segmenter.log_likelihood(x, rows), rel=1e-9)


def test_crop_of_one_segment_says_how_it_splits_only():
    """Both cuts in one segment of a duration that cannot be split between them: no information."""
    segmenter = fitted_model()
    x = np.random.default_rng(1).normal(size=(9, 2))
    rows = [(0, 3, 1), (3, 7, 0), (7, 9, 1)]
    loss, _ = loss_of_crop(segmenter, x, rows, 5, 6)
    assert_close(loss.detach(), torch.tensor(0.0, dtype=torch.float64))


def test_crops_see_the_context_of_the_encoder():
    segmenter = fitted_model("cnn")
    x = np.random.default_rng(1).normal(size=(40, 2))
    rows = [(i, i + 2, (i // 2) % 2) for i in range(0, 40, 2)]
    _, inputs = loss_of_crop(segmenter, x, rows, 21, 25)
    reach = encoder_context(segmenter.module_.encoder).reach
    assert inputs["lengths"].tolist() == [6]
    assert inputs["crop"].tolist() == [[reach, reach, 2, 2]]
    with torch.no_grad():
        whole = segmenter.module_(torch.from_numpy(x)[None], torch.tensor([40]))
        assert_close(segmenter.module_(**inputs)[0], whole[0, 20:26])


def test_gradients_of_crops_are_finite_and_flow_to_everything():
    segmenter = fitted_model("cnn", transition_constraints="observed", min_duration={1: 2})
    x = np.random.default_rng(1).normal(size=(9, 2))
    rows = [(0, 2, 1), (2, 5, 0), (5, 7, 1), (7, 9, 0)]
    segmenter.module_.zero_grad()
    loss, _ = loss_of_crop(segmenter, x, rows, 1, 8)
    loss.backward()
    for name, parameter in segmenter.module_.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert float(segmenter.module_.head.projection.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("crop_length", [1, 7, 50, 1000])
def test_crop_sampler_covers_each_position_once(shuffle, crop_length):
    lengths = np.array([3, 50, 51, 200])
    sampler = CropSampler(lengths, crop_length, 4, shuffle, seed=0)
    epochs = [[crop for batch in sampler for crop in batch] for _ in range(2)]
    for crops in epochs:
        seen = sorted((c.sequence, i) for c in crops for i in range(c.start, c.stop))
        assert seen == [(s, i) for s, length in enumerate(lengths) for i in range(length)]
        assert max(c.stop - c.start for c in crops) <= crop_length
    if not shuffle:
        assert epochs[0] == epochs[1]
        assert len(list(sampler)) == len(sampler)
    elif crop_length == 7:
        assert set(epochs[0]) != set(epochs[1])


def test_crop_loader_repeats_by_seed():
    values = [np.arange(60.0)[:, None], np.arange(5.0)[:, None]]
    sequence = torch.tensor([0] * 20 + [1])
    start = torch.cat([torch.arange(0, 60, 3), torch.tensor([0])])
    stop = torch.cat([torch.arange(3, 61, 3), torch.tensor([5])])
    table = SegmentTable(sequence, start, stop, torch.arange(21) % 2)
    cropped = CroppedDataset(SequenceDataset(values, table), 10)

    def batches(seed):
        loader = bucketed_loader(cropped, 2, shuffle=True, seed=seed)
        return [[inputs["x"].tolist() for inputs, _ in loader] for _ in range(2)]

    assert batches(0) == batches(0)
    assert batches(0)[0] != batches(0)[1]
    assert batches(0) != batches(1)


def alternating(num_segments, seed):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(num_segments) % 2, rng.integers(5, 12, num_segments))
    return y[:, None] + 0.6 * rng.normal(size=(len(y), 1)), y


def test_fit_on_crops_finds_the_model_of_the_whole():
    """Same decisions, nearly the same likelihood."""
    X, y = alternating(200, 0)
    test = alternating(60, 1)
    quick = {"random_state": 0, "learning_rate": 0.05, "max_epochs": 40, "dtype": "float64"}
    whole = SemiCRFSegmenter(**quick, max_duration=12).fit(X, y)
    cropped = SemiCRFSegmenter(**quick, max_duration=12, crop_length=30, batch_size=64).fit(X, y)
    assert cropped.history_[-1]["train_loss"] < 0.5 * cropped.history_[0]["train_loss"]
    values = [model.log_likelihood(*test) / len(test[1]) for model in (whole, cropped)]
    assert values[1] == pytest.approx(values[0], abs=0.01)
    assert np.mean(whole.predict(test[0]) == cropped.predict(test[0])) > 0.99


def test_fit_on_crops_longer_than_all_sequences_changes_nothing():
    data = [alternating(6, seed) for seed in range(4)]
    X, y = [list(part) for part in zip(*data, strict=True)]
    quick = {"random_state": 0, "max_epochs": 3, "max_duration": 12}
    a = SemiCRFSegmenter(**quick).fit(X, y)
    b = SemiCRFSegmenter(crop_length=1000, **quick).fit(X, y)
    np.testing.assert_allclose(a.log_likelihood(X, y), b.log_likelihood(X, y), rtol=1e-3)


@pytest.mark.parametrize("encoder", ["cnn", "gru"])
def test_fits_on_crops_are_bitwise_equal_and_validate(encoder):
    data = [alternating(12, seed) for seed in range(3)]
    X, y = [list(part) for part in zip(*data, strict=True)]
    models = [
        SemiCRFSegmenter(
            encoder,
            hidden_size=4,
            num_layers=1,
            crop_length=25,
            early_stopping=True,
            max_epochs=2,
            random_state=3,
        )
        .fit(X, y)
        .partial_fit(X, y)
        for _ in range(2)
    ]
    states = [model.module_.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert "valid_loss" in models[0].history_[0]

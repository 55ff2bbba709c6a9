"""Batches, loaders, the private random state and the penalty."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from flash_semicrf.duration import LearnedDuration
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._training.data import (
    LengthBucketSampler,
    SequenceDataset,
    bucketed_loader,
    collate_sequences,
)

CPU = torch.device("cpu")


def dataset():
    values = [np.full((n, 1), n, dtype=np.float32) for n in (3, 1, 4)]
    columns = [[0, 0, 1, 2, 2, 2], [0, 2, 0, 0, 1, 3], [2, 3, 1, 1, 3, 4], [0, 1, 0, 1, 0, 1]]
    return SequenceDataset(values, SegmentTable(*map(torch.tensor, columns)))


def test_collate_sequences_pads_and_renumbers():
    data = dataset()
    inputs, columns = collate_sequences([data[2], data[1]])
    assert inputs["x"].shape == (2, 4, 1)
    assert inputs["x"][1, :, 0].tolist() == [1, 0, 0, 0]
    assert inputs["lengths"].tolist() == [4, 1]
    table = SegmentTable(*columns)
    assert table.sequence.tolist() == [0, 0, 0, 1]
    assert table.stop.tolist() == [1, 3, 4, 1]


def test_sequence_dataset_subset():
    part = dataset().subset(np.array([1, 2]))
    assert part.lengths.tolist() == [1, 4]
    assert part[1][1].tolist() == [[0, 1, 1], [1, 3, 0], [3, 4, 1]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_length_bucket_sampler_covers_each_sequence_once(shuffle, count):
    lengths = np.random.default_rng(0).integers(1, 1000, count)
    sampler = LengthBucketSampler(lengths, 4, shuffle, seed=0)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(sum(batches, [])) == list(range(count))


def test_length_bucket_sampler_wastes_little_padding():
    lengths = np.random.default_rng(0).integers(1, 1000, 640)
    batches = list(LengthBucketSampler(lengths, 16, seed=0))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()


def test_bucketed_loader_orders_differ_by_epoch_and_repeat_by_seed():
    def epochs(seed):
        loader = bucketed_loader(dataset(), 1, shuffle=True, seed=seed)
        return [[int(inputs["lengths"][0]) for inputs, _ in loader] for _ in range(4)]

    assert epochs(0) == epochs(0)
    assert len({tuple(epoch) for epoch in epochs(0)}) > 1


def test_bucketed_loader_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    list(bucketed_loader(dataset(), 2, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())


def test_private_rng_continues_and_restores():
    before = torch.get_rng_state()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.set_rng_state(before)
    rng = PrivateRNG(3, CPU)
    with rng.use():
        first = torch.rand(2)
    torch.rand(5)
    torch.set_rng_state(before)
    with rng.use():
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(before, torch.get_rng_state())


def test_private_rng_in_threads_gives_the_same_numbers():
    def draw(seed, into):
        rng = PrivateRNG(seed, CPU)
        for _ in range(50):
            with rng.use():
                into.append(torch.rand(()).item())

    alone: list[float] = []
    draw(1, alone)
    results: list[list[float]] = [[], []]
    threads = [threading.Thread(target=draw, args=(1, into)) for into in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone, alone]


def test_segmentation_module_penalty():
    bias = torch.tensor([[0.5, -1.0], [2.0, -torch.inf]])
    durations = LearnedDuration(2, 2, init_bias=bias)
    head = SemiMarkovCRFHead(2, 2, 3, duration_distribution=durations, initial_scores=True)
    module = SegmentationModule(nn.Linear(1, 3), head)
    weights = [module.encoder.weight, head.projection.weight, head.transition]
    expected = 0.5 * sum(float(w.detach().square().sum()) for w in weights)
    assert float(module.penalty().detach()) == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        durations.duration_bias[0, 0] += 2.0
        head.initial_scores += 1.0
    penalty = module.penalty()
    assert float(penalty.detach()) == pytest.approx(expected + 2.0, rel=1e-6)
    penalty.backward()
    assert bool(torch.isfinite(durations.duration_bias.grad).all())

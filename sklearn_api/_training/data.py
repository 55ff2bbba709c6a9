"""Sequences with gold segments, and mini-batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._model.sparse import pad_sparse

__all__ = [
    "Batches",
    "LengthBucketSampler",
    "SequenceDataset",
    "bucketed_loader",
    "collate_sequences",
    "pad_values",
]


class Batches(Protocol):
    """Training data that cuts itself into mini-batches; `lengths` (n,) are of its sequences."""

    lengths: np.ndarray

    def __getitem__(self, key: Any) -> Any: ...

    def sampler(self, batch_size: int, shuffle: bool, seed: int) -> Sampler[Any]: ...

    def collate(self, items: list[Any]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]: ...


class SequenceDataset(Dataset[Any]):
    """Sequences with their gold segments.

    Parameters
    ----------
    values : list of ndarray, or CSR matrices, of shape (T_i, D)
    table : SegmentTable
        Gold segments of all sequences, ordered by sequence.
    """

    def __init__(self, values: list[np.ndarray], table: SegmentTable) -> None:
        self.values = values
        self.segments = torch.stack(table[1:], dim=1)
        counts = torch.bincount(table.sequence, minlength=len(values))
        self.offsets = [0, *torch.cumsum(counts, 0).tolist()]
        self.lengths = np.array([x.shape[0] for x in values], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Tensor]:
        return self.values[index], self.segments[self.offsets[index] : self.offsets[index + 1]]

    def subset(self, indices: np.ndarray) -> SequenceDataset:
        """The sequences at `indices`, which are sorted."""
        rows = [self[i][1] for i in indices]
        sequence = torch.repeat_interleave(torch.tensor([len(r) for r in rows]))
        table = SegmentTable(sequence, *torch.cat(rows).unbind(1))
        return SequenceDataset([self.values[i] for i in indices], table)

    def sampler(self, batch_size: int, shuffle: bool, seed: int) -> Sampler[Any]:
        """Batches of indices for an epoch."""
        return LengthBucketSampler(self.lengths, batch_size, shuffle, seed)

    @staticmethod
    def collate(
        items: list[tuple[np.ndarray, Tensor]],
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """One batch; see `collate_sequences`."""
        return collate_sequences(items)


def pad_values(values: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stack (T_i, D) arrays into a zero-padded (B, T, D) tensor; also return lengths (B,)."""
    lengths = torch.tensor([len(x) for x in values])
    dtype = np.result_type(*{value.dtype for value in values})
    x = np.zeros((len(values), int(lengths.max()), values[0].shape[1]), dtype)
    for row, value in zip(x, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(x), lengths


def collate_sequences(
    items: list[tuple[np.ndarray, Tensor]],
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """One batch: the module's arguments, and the columns of a `SegmentTable`."""
    values = [value for value, _ in items]
    x, lengths = pad_sparse(values) if sp.issparse(values[0]) else pad_values(values)
    segments = [rows for _, rows in items]
    sequence = torch.repeat_interleave(torch.tensor([len(rows) for rows in segments]))
    return {"x": x, "lengths": lengths}, (sequence, *torch.cat(segments).unbind(1))


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of sequences of similar length, in a new random order each epoch.

    Sequences are shuffled, sorted by length within chunks of many batches, cut into batches, and
    the batches are shuffled. With equal lengths this is a plain shuffle.

    Parameters
    ----------
    lengths : ndarray of shape (n,)
    batch_size : int
    shuffle : bool
        False keeps one order, longest sequences last.
    seed : int
    """

    _BATCHES_PER_CHUNK = 32

    def __init__(
        self, lengths: np.ndarray, batch_size: int, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.lengths))
        if not self.shuffle:
            order = order[np.argsort(self.lengths, kind="stable")]
            yield from self._cut(order)
            return
        self.rng.shuffle(order)
        chunk = self.batch_size * self._BATCHES_PER_CHUNK
        batches: list[list[int]] = []
        for first in range(0, len(order), chunk):
            part = order[first : first + chunk]
            batches += self._cut(part[np.argsort(self.lengths[part], kind="stable")])
        for i in self.rng.permutation(len(batches)):
            yield batches[i]

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        size = self.batch_size
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]


def bucketed_loader(
    dataset: SequenceDataset, batch_size: int, shuffle: bool = False, seed: int = 0, **kwargs: Any
) -> DataLoader[Any]:
    """Loader of length-bucketed batches; `kwargs` go to `torch.utils.data.DataLoader`."""
    sampler = dataset.sampler(batch_size, shuffle, seed)
    # Without a generator of its own a loader draws from the global one.
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"collate_fn": dataset.collate, "generator": generator, **kwargs}
    return DataLoader(dataset, batch_sampler=sampler, **kwargs)

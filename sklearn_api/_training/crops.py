"""Training on random crops of long sequences.

Each epoch cuts every sequence that is longer than `crop_length` at a random offset and every
`crop_length` positions from there: each position is in one piece per epoch. A piece is widened to
the gold segments that its cuts pass through, by less than the longest segment on either side, and
by the encoder's context; its loss is defined in `sklearn_api._training.crop_likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from sklearn_api._model.windows import Context
from sklearn_api._training.data import LengthBucketSampler, SequenceDataset, collate_sequences

__all__ = ["Crop", "CropSampler", "CroppedDataset"]


class Crop(NamedTuple):
    """Positions ``[start, stop)`` of a sequence, before widening."""

    sequence: int
    start: int
    stop: int


class CroppedDataset(SequenceDataset):
    """The crops of the sequences of a dataset, indexed by `Crop`.

    Parameters
    ----------
    dataset : SequenceDataset
    crop_length : int
    context : Context, optional
        What the encoder has to see around a crop; None: nothing is added.
    """

    def __init__(
        self, dataset: SequenceDataset, crop_length: int, context: Context | None = None
    ) -> None:
        self.values = dataset.values
        self.segments = dataset.segments
        self.offsets = dataset.offsets
        self.lengths = dataset.lengths
        self.crop_length = crop_length
        self.context = context or Context(0, 1)

    def __getitem__(self, crop: Crop) -> tuple[np.ndarray, Tensor, Tensor]:
        """Features with their context, gold segments of the widened crop, and four numbers:

        positions of context on the left and on the right, and positions held by the first and by
        the last segment, as `known_ends` takes them.
        """
        values, rows = super().__getitem__(crop.sequence)
        inside = (rows[:, 1] > crop.start) & (rows[:, 0] < crop.stop)
        rows = rows[inside]
        start, stop = int(rows[0, 0]), int(rows[-1, 1])
        length = int(self.lengths[crop.sequence])
        first, last = self.context.span(start, stop, length)
        held_start = crop.start - start + 1 if crop.start > 0 else 0
        held_end = stop - crop.stop + 1 if crop.stop < length else 0
        rows = rows - torch.tensor([start, start, 0])
        around = torch.tensor([start - first, last - stop, held_start, held_end])
        return values[first:last], rows, around

    def widened(self, crop: Crop) -> tuple[int, int]:
        """Start and stop of the gold segments that a crop touches."""
        _, rows = super().__getitem__(crop.sequence)
        inside = (rows[:, 1] > crop.start) & (rows[:, 0] < crop.stop)
        return int(rows[inside][0, 0]), int(rows[inside][-1, 1])

    def sampler(self, batch_size: int, shuffle: bool, seed: int) -> CropSampler:
        """Batches of crops."""
        return CropSampler(self.lengths, self.crop_length, batch_size, shuffle, seed)

    @staticmethod
    def collate(
        items: list[tuple[np.ndarray, Tensor, Tensor]],
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """One batch; ``lengths`` are those of the crops without their context."""
        inputs, columns = collate_sequences([item[:2] for item in items])
        crop = torch.stack([item[2] for item in items])
        lengths = inputs["lengths"] - crop[:, 0] - crop[:, 1]
        return {"x": inputs["x"], "lengths": lengths, "crop": crop}, columns


class CropSampler(Sampler[list[Crop]]):
    """Batches of `Crop` of similar length, cut anew each epoch.

    Parameters
    ----------
    lengths : ndarray of shape (n,)
    crop_length, batch_size : int
    shuffle : bool
        False cuts at the multiples of `crop_length`, in one order.
    seed : int
    """

    def __init__(
        self,
        lengths: np.ndarray,
        crop_length: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.lengths = lengths
        self.crop_length = crop_length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Number of batches where sequences are cut at the multiples of `crop_length`."""
        return -(-int((-(-self.lengths // self.crop_length)).sum()) // self.batch_size)

    def __iter__(self) -> Iterator[list[Crop]]:
        crops = self._cut()
        lengths = np.array([crop.stop - crop.start for crop in crops])
        seed = int(self.rng.integers(2**31))
        for batch in LengthBucketSampler(lengths, self.batch_size, self.shuffle, seed):
            yield [crops[i] for i in batch]

    def _cut(self) -> list[Crop]:
        crops = []
        for i, length in enumerate(self.lengths.tolist()):
            cuts = [0, length]
            if length > self.crop_length:
                offset = int(self.rng.integers(self.crop_length)) if self.shuffle else 0
                inner = range(offset or self.crop_length, length, self.crop_length)
                cuts[1:1] = inner
            crops += [Crop(i, *cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]
        return crops

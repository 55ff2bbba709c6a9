"""Training: the batches, the module and the skorch net that `SemiCRFSegmenter` composes.

The loss of a batch is the negative log-likelihood of its gold segmentations per position,

    sum_b -log P(y_b | x_b) / sum_b T_b + penalty / N,

so that learning rates carry over between short and long sequences; N counts the positions of the
training set and the penalty is a Gaussian log-prior, so that the minimum is the MAP estimate.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, EarlyStopping
from skorch.helper import predefined_split
from skorch.utils import to_tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from flash_semicrf.duration import DurationDistribution
from flash_semicrf.inference.log_partition import log_partition
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.potentials import Potentials, score_segments, within_length
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._training.crop_likelihood import core_rows, crop_loss
from sklearn_api._training.divergence import all_finite, check_state, diverged
from sklearn_api._training.sparse import pad_sparse, problem_of_scores, project_sparse
from sklearn_api.encoders import Standardize

__all__ = [
    "LengthBucketSampler",
    "LossRecorder",
    "PlateauStopping",
    "PrivateRNG",
    "SegmentationModule",
    "SegmentationNet",
    "SequenceDataset",
    "StopTraining",
    "bucketed_loader",
    "collate_sequences",
]


class SequenceDataset(Dataset):
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

    def sampler(self, batch_size: int, shuffle: bool, seed: int) -> Sampler:
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


class LengthBucketSampler(Sampler):
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
) -> DataLoader:
    """Loader of length-bucketed batches; `kwargs` go to `torch.utils.data.DataLoader`."""
    sampler = dataset.sampler(batch_size, shuffle, seed)
    # Without a generator of its own a loader draws from the global one.
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"collate_fn": dataset.collate, "generator": generator, **kwargs}
    return DataLoader(dataset, batch_sampler=sampler, **kwargs)


class PrivateRNG:
    """A torch random state of one's own: the global one is put back after each use.

    Uses in several threads wait for each other, because there is one global state to borrow.

    Parameters
    ----------
    seed : int
    device : torch.device
    """

    _lock = threading.RLock()

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.states: tuple[Tensor, ...] | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Draw from the private state inside the block."""
        on_gpu = self.device.type == "cuda"
        with self._lock, torch.random.fork_rng([self.device] if on_gpu else []):
            if self.states is None:
                torch.manual_seed(self.seed)
            else:
                torch.set_rng_state(self.states[0])
                if on_gpu and len(self.states) > 1:
                    torch.cuda.set_rng_state(self.states[1], self.device)
            try:
                yield
            finally:
                states = [torch.get_rng_state()]
                if on_gpu:
                    states.append(torch.cuda.get_rng_state(self.device))
                self.states = tuple(states)


class SegmentationModule(nn.Module):
    """Encoder and semi-Markov CRF head.

    Parameters
    ----------
    encoder : nn.Module
        Called as ``encoder(x, lengths)``.
    head : SemiMarkovCRFHead
    standardize : Standardize, optional
        Applied to the features first.
    """

    def __init__(
        self, encoder: nn.Module, head: SemiMarkovCRFHead, standardize: Standardize | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.standardize = standardize
        self._penalized = self._anchor()

    def _anchor(self) -> list[tuple[str, str | None]]:
        """Names of the penalised parameters, each with the buffer that holds its prior mean.

        Weights and transitions are drawn towards 0, durations towards where they start; biases,
        scales and the scores of the first and last label are free.
        """
        durations = set()
        for module in self.head.modules():
            if isinstance(module, DurationDistribution):
                durations.update(id(p) for p in module.parameters())
        penalized: list[tuple[str, str | None]] = []
        for name, parameter in list(self.named_parameters()):
            if id(parameter) in durations:
                anchor = f"anchor_{len(penalized)}"
                self.register_buffer(anchor, parameter.detach().clone())
                penalized.append((name, anchor))
            elif parameter.dim() >= 2:
                penalized.append((name, None))
        return penalized

    def duration_anchors(self) -> list[Tensor]:
        """Prior means of the durations' parameters, in the order of the distribution's."""
        return [getattr(self, anchor) for _, anchor in self._penalized if anchor is not None]

    def forward(self, x: Tensor, lengths: Tensor, crop: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, H) of features (B, T, D); scores (B, T, P) of sparse features.

        The first two columns of `crop` count the positions on either side that are context only;
        `lengths` does not count them and the result does not hold them.
        """
        if x.is_sparse:
            return project_sparse(self.head, x)
        if self.standardize is not None:
            x = self.standardize(x).to(self.head.transition.dtype)
        if crop is None:
            return self.encoder(x, lengths)
        hidden = self.encoder(x, lengths + crop[:, 0] + crop[:, 1])
        return core_rows(hidden, crop[:, 0], lengths)

    def penalty(self) -> Tensor:
        """Half the squared distance of the penalised parameters from their prior means."""
        parameters = dict(self.named_parameters())
        total = torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
        for name, anchor in self._penalized:
            value = parameters[name]
            if anchor is not None:
                mean = getattr(self, anchor)
                # A forbidden duration stays at -inf: it has no distance from itself.
                value = torch.where(torch.isfinite(mean), value - mean, 0.0)
            total = total + 0.5 * value.square().sum(dtype=total.dtype)
        return total


class StopTraining(KeyboardInterrupt):
    """Raised by a callback that ends training where it should end.

    skorch lets callbacks raise KeyboardInterrupt for that, which is also what Ctrl-C raises.
    """


class SegmentationNet(NeuralNet):
    """skorch net whose loss is the CRF's negative log-likelihood per position.

    Parameters
    ----------
    module : SegmentationModule
    alpha : float
        Strength of the module's penalty, which enters the loss as ``alpha / N``.
    rng : PrivateRNG, optional
        Random state of the training steps, where they draw random numbers (dropout).
    """

    def __init__(
        self,
        module: SegmentationModule,
        *args: Any,
        alpha: float = 0.0,
        rng: PrivateRNG | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, **kwargs)
        self.alpha = alpha
        self.rng = rng

    def run(
        self,
        train: SequenceDataset,
        valid: SequenceDataset | None = None,
        *,
        epochs: int,
        seed: int,
    ) -> SegmentationNet:
        """Train from the current parameters.

        Parameters
        ----------
        train, valid : SequenceDataset
        epochs : int
            Most epochs to run.
        seed : int
            Of the order of the batches.

        Raises
        ------
        KeyboardInterrupt
            On Ctrl-C, once training has ended as it does after the last epoch.
        ValueError
            Where training diverges.
        """
        self.num_positions_ = int(train.lengths.sum())
        self.first_epoch_ = len(self.history) + 1
        self.iterator_train__seed = seed
        self.max_epochs = epochs
        self.train_split = None if valid is None else predefined_split(valid)
        try:
            self.notify("on_train_begin", X=train, y=None)
            try:
                self.fit_loop(train)
            except KeyboardInterrupt as error:
                if not self._stopped_by_callback(error):
                    self.notify("on_train_end", X=train, y=None)
                    raise
            self.notify("on_train_end", X=train, y=None)
            check_state(self)
        finally:
            # A saved model must not carry its validation data.
            self.train_split = None
            self._set_training(False)
        return self

    def _stopped_by_callback(self, error: KeyboardInterrupt) -> bool:
        """Whether a callback ended training, rather than the user."""
        stopping = [cb for _, cb in self.callbacks_ if isinstance(cb, EarlyStopping)]
        return isinstance(error, StopTraining) or any(cb.misses_ >= cb.patience for cb in stopping)

    def check_result(self, dataset: SequenceDataset) -> None:
        """Raise if training diverged with its last step, which no loss has seen.

        Parameters
        ----------
        dataset : SequenceDataset
            Its shortest sequences are evaluated.
        """
        keys = next(iter(dataset.sampler(self.batch_size, False, 0)))
        inputs, columns = dataset.collate([dataset[key] for key in keys])
        with torch.no_grad():
            self.get_loss(self.infer(inputs), columns, X=inputs, training=True)

    def get_loss(
        self,
        y_pred: Tensor,
        y_true: tuple[Tensor, ...],
        X: dict[str, Tensor] | None = None,
        training: bool = False,
    ) -> Tensor:
        """Loss of a batch: `y_pred` is the module's, `y_true` segments and perhaps weights."""
        lengths = to_tensor(X["lengths"], device=self.device)
        columns = to_tensor(tuple(y_true), device=self.device)
        table = SegmentTable(*columns[:4])
        problem = within_length(self._problem(y_pred, lengths, X["x"].is_sparse, training))
        try:
            if "crop" in X:
                nll = crop_loss(problem, table, to_tensor(X["crop"], device=self.device))
            else:
                nll = log_partition(problem) - score_segments(problem, table)
        except ValueError:
            check_state(self)  # Parameters that are not finite are no fault of the data.
            raise
        if len(columns) == 5:
            nll = nll * columns[4]
        loss = nll.sum() / lengths.sum()
        if training and self.alpha:
            loss = loss + self.alpha / self.num_positions_ * self.module_.penalty()
        if not bool(loss.detach().isfinite()):
            raise diverged(self, "the loss", training)
        return loss

    def _problem(self, y_pred: Tensor, lengths: Tensor, sparse: bool, training: bool) -> Potentials:
        """The problem of a batch; raises where its scores are not finite."""
        head = self.module_.head
        try:
            if sparse:
                problem = problem_of_scores(head, y_pred, lengths)
            else:
                problem, _ = head.potentials(y_pred, lengths)
        except ValueError as error:
            if y_pred.dim() == 3 and not all_finite(lengths, y_pred):
                raise diverged(self, "the encoder's output", training) from error
            raise
        if not all_finite(lengths, problem.scores, problem.start_scores, problem.end_scores):
            raise diverged(self, "a score", training)
        return problem

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """One step of the optimiser."""
        try:
            return super().train_step(batch, **fit_params)
        except RuntimeError as error:
            if "without overflow" in str(error):  # torch's word on a step of 1e38
                raise diverged(self, "a step") from error
            raise

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Raise where the first epoch left numbers that are not finite; `run` looks again."""
        super().on_epoch_end(net, **kwargs)
        if len(self.history) == self.first_epoch_:
            check_state(self)

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """One forward and backward pass, drawing from the private random state."""
        with contextlib.nullcontext() if self.rng is None else self.rng.use():
            return super().train_step_single(batch, **fit_params)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # `module_` is the same object and is saved with its devices mapped; `module` would not be.
        state["module"] = SegmentationModule
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.rng is not None:
            self.rng.device = torch.device(self.device)

    def _check_device(self, requested_device: str, map_device: str) -> str:
        """Device of a loaded net: the CPU where the one it was trained on is absent, silently."""
        same = torch.device(requested_device).type == torch.device(map_device).type
        return requested_device if same else map_device


class LossRecorder(Callback):
    """Record ``train_loss`` and ``valid_loss`` per position, every position weighing the same."""

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """Start new sums."""
        self.sums_ = {True: [0.0, 0], False: [0.0, 0]}

    def on_batch_end(
        self, net: NeuralNet, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        """Add one batch."""
        positions = int(batch[0]["lengths"].sum())
        self.sums_[bool(training)][0] += float(kwargs["loss"].detach()) * positions
        self.sums_[bool(training)][1] += positions

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Write the means, and whether each is the best so far, to the history."""
        for training, name in ((True, "train_loss"), (False, "valid_loss")):
            total, positions = self.sums_[training]
            if positions:
                mean = total / positions
                earlier = [row[name] for row in net.history[:-1] if name in row]
                net.history.record(name, mean)
                net.history.record(f"{name}_best", all(mean < value for value in earlier))


class PlateauStopping(EarlyStopping):
    """Stop when the monitored loss no longer improves; epochs without it do not count."""

    def on_train_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Load the best epoch, if that was asked for and one has ended."""
        if net.history:
            super().on_train_end(net, **kwargs)

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Compare the last epoch with the best."""
        if self.monitor in net.history[-1]:
            super().on_epoch_end(net, **kwargs)

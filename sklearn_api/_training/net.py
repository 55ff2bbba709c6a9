"""Training: the batches, the module and the skorch net that `SemiCRFSegmenter` composes.

The loss of a batch is that of its gold segmentations per position, for the likelihood

    sum_b -log P(y_b | x_b) / sum_b T_b + penalty / N,

so that learning rates carry over between short and long sequences; N counts the positions of the
training set and the penalty is a Gaussian log-prior, so that the minimum is the MAP estimate.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, EarlyStopping
from skorch.helper import predefined_split
from skorch.utils import to_tensor
from torch import Tensor

from flash_semicrf.problem.flags import Validate, reads_values
from flash_semicrf.problem.potentials import Potentials, within_length
from flash_semicrf.problem.segments import SegmentTable
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._model.sparse import problem_of_scores
from sklearn_api._training.data import Batches
from sklearn_api._training.divergence import all_finite, check_state, diverged
from sklearn_api._training.objective import Objective, losses_of

__all__ = ["LossRecorder", "PlateauStopping", "SegmentationNet", "StopTraining"]


class StopTraining(KeyboardInterrupt):
    """Raised by a callback that ends training where it should end.

    skorch lets callbacks raise KeyboardInterrupt for that, which is also what Ctrl-C raises.
    """


class SegmentationNet(NeuralNet):
    """skorch net whose loss is a loss of the CRF per position.

    Parameters
    ----------
    module : SegmentationModule
    alpha : float
        Strength of the module's penalty, which enters the loss as ``alpha / N``.
    objective : Objective
        What the loss is.
    rng : PrivateRNG, optional
        Random state of the training steps, where they draw random numbers (dropout).
    """

    is_first_batch_ = True
    """Whether the values of the next batch are read where that makes the device wait."""

    def __init__(
        self,
        module: SegmentationModule,
        *args: Any,
        alpha: float = 0.0,
        objective: Objective = Objective(),  # noqa: B008  (a named tuple)
        rng: PrivateRNG | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, **kwargs)
        self.alpha = alpha
        self.objective = objective
        self.rng = rng

    def run(
        self,
        train: Batches,
        valid: Batches | None = None,
        *,
        epochs: int,
        seed: int,
    ) -> SegmentationNet:
        """Train from the current parameters.

        Parameters
        ----------
        train, valid : Batches
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
        self.is_first_batch_ = True
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
            self.module_.head.validate = "auto"
            self._set_training(False)
        return self

    def _stopped_by_callback(self, error: KeyboardInterrupt) -> bool:
        """Whether a callback ended training, rather than the user."""
        stopping = [cb for _, cb in self.callbacks_ if isinstance(cb, EarlyStopping)]
        return isinstance(error, StopTraining) or any(cb.misses_ >= cb.patience for cb in stopping)

    def check_result(self, dataset: Batches) -> None:
        """Raise if training diverged with its last step, which no loss has seen.

        Parameters
        ----------
        dataset : Batches
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
        batch = y_pred, y_true, X, training
        loss = self._loss(*batch, "values" if self.is_first_batch_ else "auto")
        self.is_first_batch_ = False
        if not bool(loss.detach().isfinite()):
            self._loss(*batch, "values")  # raises where it finds the value at fault
            raise diverged(self, "the loss", training)
        return loss

    def _loss(
        self,
        y_pred: Tensor,
        y_true: tuple[Tensor, ...],
        X: dict[str, Tensor],
        training: bool,
        validate: Validate,
    ) -> Tensor:
        """`get_loss`; a bad value makes it NaN where `validate` does not read them."""
        lengths = to_tensor(X["lengths"], device=self.device)
        columns = to_tensor(tuple(y_true), device=self.device)
        table = SegmentTable(*columns[:4])
        self.module_.head.validate = validate
        problem = within_length(self._problem(y_pred, lengths, X["x"].is_sparse, training))
        crop = to_tensor(X["crop"], device=self.device) if "crop" in X else None
        weights = columns[4] if len(columns) == 5 else None
        try:
            losses = losses_of(self.objective, problem, table, crop, weights, validate)
        except ValueError:
            check_state(self)  # Parameters that are not finite are no fault of the data.
            raise
        loss = losses.sum() / lengths.sum()
        if training and self.alpha:
            loss = loss + self.alpha / self.num_positions_ * self.module_.penalty()
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
        scores = (problem.scores, problem.start_scores, problem.end_scores)
        if reads_values(head.validate, problem.device) and not all_finite(lengths, *scores):
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

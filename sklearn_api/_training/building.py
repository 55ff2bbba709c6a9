"""The skorch net that trains a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._training.data import bucketed_loader
from sklearn_api._training.net import LossRecorder, PlateauStopping, SegmentationNet
from sklearn_api._training.objective import Objective

__all__ = ["Options", "build_net"]


class Options(NamedTuple):
    """Parameters of `SemiCRFSegmenter` that training by mini-batches reads."""

    solver: str
    optimizer: Callable[..., torch.optim.Optimizer] | None
    learning_rate: float
    batch_size: int
    alpha: float
    objective: Objective
    tol: float
    n_iter_no_change: int
    early_stopping: bool
    verbose: int


_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def build_net(
    module: SegmentationModule,
    options: Options,
    *,
    callbacks: Iterable[Any],
    device: torch.device,
    rng: PrivateRNG | None,
    routed: Mapping[str, Any],
) -> SegmentationNet:
    """An initialised skorch net around `module`.

    Parameters
    ----------
    module : SegmentationModule
    options : Options
    callbacks : iterable
        Copied, and run after the losses are recorded.
    device : torch.device
    rng : PrivateRNG, optional
        Random state of training steps that draw random numbers.
    routed : mapping
        Further parameters of skorch's net.
    """
    stopping = PlateauStopping(
        monitor="valid_loss" if options.early_stopping else "train_loss",
        patience=options.n_iter_no_change,
        threshold=options.tol,
        threshold_mode="abs",
        load_best=options.early_stopping,
    )
    callbacks = [("losses", LossRecorder()), *copy.deepcopy(list(callbacks))]
    net = SegmentationNet(
        module,
        criterion=torch.nn.Identity,
        optimizer=options.optimizer or _OPTIMIZERS.get(options.solver, torch.optim.SGD),
        lr=options.learning_rate,
        batch_size=options.batch_size,
        iterator_train=bucketed_loader,
        iterator_train__shuffle=True,
        iterator_valid=bucketed_loader,
        train_split=None,
        callbacks=[*callbacks, ("stopping", stopping)],
        callbacks__train_loss=None,
        callbacks__valid_loss=None,
        device=str(device),
        verbose=int(options.verbose),
        alpha=options.alpha,
        objective=options.objective,
        rng=rng,
        **routed,
    )
    net.initialize()
    return net

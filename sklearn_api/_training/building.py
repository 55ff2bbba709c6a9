"""From an estimator's parameters to the skorch net that trains its module."""

from __future__ import annotations

import copy
from typing import Any

import torch

from sklearn_api._model.building import resolve_device
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._training.data import bucketed_loader
from sklearn_api._training.net import LossRecorder, PlateauStopping, SegmentationNet

__all__ = ["build_net"]


_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def build_net(estimator: Any, module: SegmentationModule, rng: PrivateRNG) -> SegmentationNet:
    """An initialised skorch net around `module`.

    Parameters
    ----------
    estimator : SemiCRFSegmenter
    module : SegmentationModule
    rng : PrivateRNG
    """
    e = estimator
    # An encoder of the user's may draw random numbers in training; ours do for dropout only.
    stochastic = not isinstance(e.encoder, str) or e.dropout > 0
    stopping = PlateauStopping(
        monitor="valid_loss" if e.early_stopping else "train_loss",
        patience=e.n_iter_no_change,
        threshold=e.tol,
        threshold_mode="abs",
        load_best=e.early_stopping,
    )
    callbacks = [("losses", LossRecorder()), *copy.deepcopy(list(e.callbacks or []))]
    params = {
        name: value
        for name, value in e.get_params(deep=False).items()
        if name.startswith(("optimizer__", "iterator_train__", "iterator_valid__", "callbacks__"))
    }
    net = SegmentationNet(
        module,
        criterion=torch.nn.Identity,
        optimizer=e.optimizer or _OPTIMIZERS.get(e.solver, torch.optim.SGD),
        lr=e.learning_rate,
        batch_size=e.batch_size,
        iterator_train=bucketed_loader,
        iterator_train__shuffle=True,
        iterator_valid=bucketed_loader,
        train_split=None,
        callbacks=[*callbacks, ("stopping", stopping)],
        callbacks__train_loss=None,
        callbacks__valid_loss=None,
        device=str(resolve_device(e.device)),
        verbose=int(e.verbose),
        alpha=e.alpha,
        rng=rng if stochastic else None,
        **params,
    )
    return net.initialize()

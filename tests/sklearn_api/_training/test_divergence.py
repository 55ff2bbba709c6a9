"""Training whose numbers leave the range of floating point ends with one clear error."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn

from flash_semicrf.nn import SemiMarkovCRFHead
from sklearn_api import SemiCRFSegmenter
from sklearn_api._model.module import SegmentationModule
from sklearn_api._training.net import SegmentationNet


def data(scale=1.0):
    rng = np.random.default_rng(0)
    y = [np.repeat(["a", "b", "a"], rng.integers(3, 9, 3)) for _ in range(4)]
    X = [scale * ((one == "b")[:, None] + rng.normal(size=(len(one), 2))) for one in y]
    return X, y


def small(encoder="linear", **params):
    defaults = {"hidden_size": 4, "num_layers": 1, "max_epochs": 4, "random_state": 0}
    return SemiCRFSegmenter(encoder, **{**defaults, **params})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"encoder": "mlp", "solver": "sgd"}, "epoch 2: .* is not"),
        ({"solver": "sgd", "learning_rate": 1e39, "dtype": "float64"}, "epoch .: .* is not finite"),
        ({"solver": "sgd"}, "epoch 2: the loss is not"),
        ({"solver": "adamw"}, "epoch 2: .* is not"),
        ({"solver": "sgd", "boundary_scores": True}, "epoch 2: .* is not"),
        ({"solver": "sgd", "crop_length": 9}, "epoch 2: .* is not"),
        ({"learning_rate": 1e38}, "epoch 1: a step is not"),
        # The last step: no later one sees what it did.
        ({"encoder": "mlp", "max_epochs": 1}, "epoch 1: .* is not"),
        ({"solver": "sgd", "early_stopping": True, "encoder": "mlp"}, "epoch 1: .* held-out seq"),
    ],
    ids=str,
)
def test_diverging_training_ends_with_what_to_do(params, message):
    model = small(**{"learning_rate": 1e30, **params})
    with pytest.raises(ValueError, match=f"Training diverged at {message}.*Lower `learning_rate`"):
        model.fit(*data())


@pytest.mark.parametrize("form", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_lbfgs_ends_where_its_loss_or_gradient_overflows(form, early_stopping):
    X, y = data(scale=1e38)
    model = small(solver="lbfgs", early_stopping=early_stopping)
    with pytest.raises(ValueError, match="diverged at iteration 1: .* not finite. Scale `X`"):
        model.fit([form(x) for x in X], y)


def test_squares_of_gradients_must_be_finite():
    """Adam takes steps of 0 from then on: the loss is finite, and never changes again."""
    with pytest.raises(ValueError, match="at epoch 1: the optimiser's state is not finite"):
        small().fit(*data(scale=1e25))


def test_partial_fit_must_leave_finite_parameters():
    X, y = data(scale=1e5)
    with pytest.raises(ValueError, match="at epoch 1: a parameter is not finite"):
        small(solver="sgd", learning_rate=1e37).partial_fit(X, y)


class FiniteInTraining(nn.Module):
    """An encoder that overflows as soon as it is evaluated."""

    def __init__(self, in_features):
        super().__init__()
        self.layer = nn.Linear(in_features, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return hidden if self.training else hidden * torch.inf


def test_validation_loss_must_be_finite():
    model = small(FiniteInTraining, early_stopping=True)
    with pytest.raises(ValueError, match="at epoch 1: .* of held-out sequences is not finite"):
        model.fit(*data())


@pytest.mark.parametrize("large", [1.0, 5e37])
def test_scores_must_be_finite_but_for_padding(large):
    # The sum of the large ones overflows, which is no reason to stop.
    head = SemiMarkovCRFHead(2, 3, long_segments="error")
    module = SegmentationModule(nn.Identity(), head)
    net = SegmentationNet(module, criterion=nn.Identity, train_split=None).initialize()
    net.num_positions_ = 5
    hidden = torch.full((2, 3, 2), large)
    hidden[1, 2] = torch.nan
    gold = tuple(torch.tensor(column) for column in ([0, 1], [0, 0], [3, 2], [0, 1]))
    inputs = {"x": hidden, "lengths": torch.tensor([3, 2])}
    assert net.get_loss(hidden, gold, X=inputs, training=True).isfinite()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        hidden[0, 1, 0] = wrong
        with pytest.raises(ValueError, match="Training diverged"):
            net.get_loss(hidden, gold, X=inputs, training=True)
